"""Modules of all families."""

from pyops.spherical.modules import (
    CrossEntropyLoss,
    MSEOneHotLoss,
    SphericalSoftmaxLoss,
    TaylorSoftmaxLoss,
    ZLoss,
)
from pyops.ternary.modules import BitLinear, PackedBitLinear

__all__ = [
    "BitLinear",
    "CrossEntropyLoss",
    "MSEOneHotLoss",
    "PackedBitLinear",
    "SphericalSoftmaxLoss",
    "TaylorSoftmaxLoss",
    "ZLoss",
]
