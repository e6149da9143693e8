"""Losses on logits that depend on them only through their sum, squares and target entries; and cross-entropy; and the
output layer that such losses train at a cost without the number of classes."""

import importlib

# Imported when first used: the references of the family can be imported where the native library cannot.
_LATER = {"FactoredSphericalLinear": "pyops.spherical.factored_linear", "LRHook": "pyops.spherical.factored_linear"}

__all__ = ["FactoredSphericalLinear", "LRHook"]


def __getattr__(name: str):
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'pyops.spherical' has no attribute {name!r}")
