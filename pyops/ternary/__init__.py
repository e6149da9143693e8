"""Ternary (1.58-bit) weights: quantizers, training, packed inference, formats."""

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
    "linear_packed",
    "low_rank_compensation",
    "pack",
    "quantize_act",
    "quantize_weight",
    "repack",
    "unpack",
]
