"""Modules of all families."""

from pyops.spherical.modules import (
    CrossEntropyLoss,
    MSEOneHotLoss,
    SphericalSoftmaxLoss,
    TaylorSoftmaxLoss,
    ZLoss,
)

__all__ = ["CrossEntropyLoss", "MSEOneHotLoss", "SphericalSoftmaxLoss", "TaylorSoftmaxLoss", "ZLoss"]
