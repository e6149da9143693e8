"""Modules of all families."""

from pyops.spherical.factored_linear import FactoredSphericalLinear
from pyops.spherical.linear_loss import SphericalLinearLoss
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
    "FactoredSphericalLinear",
    "MSEOneHotLoss",
    "PackedBitLinear",
    "SphericalLinearLoss",
    "SphericalSoftmaxLoss",
    "TaylorSoftmaxLoss",
    "ZLoss",
]
