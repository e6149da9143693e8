"""pyops: hand-written CPU (C++), CUDA and Triton kernels as drop-in PyTorch ops with autograd."""

from __future__ import annotations

from pyops import _lib

__version__ = "0.1.0"

try:
    _lib.load()
except ImportError as error:  # the pure-Python references stay importable; everything else says what is wrong
    _load_error: ImportError | None = error
else:
    _load_error = None

if _load_error is None:
    from pyops import nn, ternary
    from pyops._checks import FormatError
    from pyops._dispatch import use_backend
    from pyops._explain import explain
    from pyops.convert import convert, pack, revert
    from pyops.spherical.cross_entropy import cross_entropy
    from pyops.spherical.linear_cross_entropy import linear_cross_entropy
    from pyops.spherical.linear_loss import GramCache, spherical_linear_loss
    from pyops.spherical.spherical_loss import (
        mse_onehot_loss,
        spherical_softmax_loss,
        taylor_softmax_loss,
        z_loss,
    )
    from pyops.ternary.bitlinear import bitlinear

__all__ = [
    "FormatError",
    "GramCache",
    "bitlinear",
    "convert",
    "cross_entropy",
    "explain",
    "linear_cross_entropy",
    "mse_onehot_loss",
    "nn",
    "pack",
    "revert",
    "spherical_linear_loss",
    "spherical_softmax_loss",
    "taylor_softmax_loss",
    "ternary",
    "use_backend",
    "z_loss",
]


def __getattr__(name: str):
    if _load_error is not None and name in __all__:
        raise ImportError(str(_load_error)) from _load_error
    raise AttributeError(f"module 'pyops' has no attribute {name!r}")
