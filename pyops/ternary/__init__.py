"""Ternary (1.58-bit) weights: quantizers, training, packed inference, formats."""

import importlib

from pyops.ternary import reference_ops as _reference_ops  # noqa: F401  (registers the backends)
from pyops.ternary.bitlinear import bitlinear
from pyops.ternary.linear import linear_packed
from pyops.ternary.lowrank import bitlinear_lowrank, low_rank_compensation
from pyops.ternary.modules import BitLinear, PackedBitLinear
from pyops.ternary.quantize_activation import quantize_act
from pyops.ternary.quantize_weight import forget, quantize_weight
from pyops.ternary.repack import pack, repack, unpack

__all__ = [
    "BitLinear",
    "PackedBitLinear",
    "bitlinear",
    "bitlinear_lowrank",
    "forget",
    "from_gguf_blocks",
    "from_hf",
    "from_i2s",
    "linear_packed",
    "load_hf_checkpoint",
    "low_rank_compensation",
    "pack",
    "quantize_act",
    "quantize_weight",
    "repack",
    "to_gguf_blocks",
    "to_hf",
    "to_i2s",
    "unpack",
]

# Imported when first used, so that importing the package stays quick.
_LATER = dict.fromkeys(
    ("from_gguf_blocks", "from_hf", "from_i2s", "to_gguf_blocks", "to_hf", "to_i2s"), "pyops.ternary.interchange"
) | {"load_hf_checkpoint": "pyops.ternary.checkpoint"}


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module 'pyops.ternary' has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(_LATER[name]), name)
    return found
