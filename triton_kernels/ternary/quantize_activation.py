"""Quantization of activations, one token (row) per program.

    largest = max(max |x|, eps);  q = clip(round(x * (qmax / largest)), -128, 127);  step = largest / qmax;  sum = sum q

float32 throughout, each operation rounded once. A token that is not finite has q = 0 and step = NaN. Magnitudes are
compared as integers, among which NaN is the largest. A token longer than a tile is read twice, the second time from
the cache. Bytes: x is read once, q is written once; for a product once more, in slabs (see `_common`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyops.ternary import _checks

from .._device import on_device_of
from . import _common
from ._common import SLAB_STEP, SLABS

# Adding 1.5 * 2^23 to a small number rounds it to an integer, ties to even, and leaves that in the low bits.
ROUNDER = tl.constexpr(12582912.0)
ROUNDER_BITS = tl.constexpr(0x4B400000)
INFINITY_BITS = tl.constexpr(0x7F800000)
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)

# Columns that a program holds at a time, and its warps: 4 to 32 numbers per thread.
TILES = ((512, 4), (2048, 4), (8192, 8))


@triton.jit
def load_activations(x, column, columns):
    """float32; 0 beyond the row."""
    return tl.load(x + column, mask=column < columns, other=0).to(tl.float32)


@triton.jit
def rounded(values, scale):
    """clip(round(values * scale), -128, 127) as int32."""
    scaled = tl.minimum(tl.maximum(values * scale, -128.0), 127.0)
    return (scaled + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS


@triton.jit
def quantize_rows(
    x, quantized, slabs, step, sums, columns, row_stride, slab_columns, eps, qmax,
    WHOLE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`quantized` is as x, `slabs` [tokens, 4, slab_columns] with zeros at the end; either may be missing. WHOLE: a
    row fits into a tile, which is then loaded once."""
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    lane = tl.arange(0, COLUMNS)
    magnitude = tl.zeros((COLUMNS,), tl.int32)
    values = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, columns, COLUMNS):
        values = load_activations(x, first + lane, columns)
        magnitude = tl.maximum(magnitude, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    magnitude = tl.max(magnitude, 0)
    finite = magnitude < INFINITY_BITS
    largest = tl.maximum(tl.where(finite, magnitude, 0).to(tl.float32, bitcast=True), eps)
    scale = tl.minimum(tl.div_rn(qmax, largest), FLOAT_MAX)
    total = tl.zeros((COLUMNS,), tl.int32)
    width = columns if slabs is None else SLABS * slab_columns
    place = tl.arange(0, COLUMNS // SLABS)[:, None]
    slab = tl.arange(0, SLABS)[None, :]
    for first in range(0, width, COLUMNS):
        column = first + lane
        if not WHOLE:
            values = load_activations(x, column, columns)
        q = rounded(tl.where(finite, values, 0.0), scale)
        total += q
        if quantized is not None:
            tl.store(quantized + row * columns + column, q.to(tl.int8), mask=column < columns)
        if slabs is not None:
            place_in_slab = first // SLABS + place
            pointers = slabs + (SLABS * row + slab) * slab_columns + place_in_slab
            by_slab = tl.reshape(q.to(tl.int8), (COLUMNS // SLABS, SLABS))
            tl.store(pointers, by_slab, mask=place_in_slab < slab_columns)
    tl.store(step + row, tl.where(finite, tl.div_rn(largest, qmax), float("nan")))
    tl.store(sums + row, tl.sum(total, 0))


# --------------------------------------------------------------------------------------------------- launchers


def reasons_against(op: str, x: Tensor, *_) -> list[str]:
    """Why the launcher of this file cannot serve these arguments; empty when it can."""
    return _common.device_reasons(x)


class Quantized(NamedTuple):
    """Tokens in 8 bits: as they lie in x (if asked for), in slabs (if asked for), their steps and sums."""

    values: Tensor | None
    slabs: Tensor | None
    step: Tensor
    sums: Tensor


def slab_columns(in_features: int) -> int:
    """Length of one slab of activations with its padding."""
    return triton.cdiv(triton.cdiv(in_features, SLABS.value), SLAB_STEP) * SLAB_STEP


def quantize(x: Tensor, qmax: int, eps: float, natural: bool, slabs: bool) -> Quantized:
    x = _common.rows_dense(x)
    tokens, columns = x.shape
    length = slab_columns(columns)
    result = Quantized(
        values=x.new_empty(x.shape, dtype=torch.int8) if natural else None,
        slabs=x.new_empty((tokens, SLABS.value, length), dtype=torch.int8) if slabs else None,
        step=x.new_empty(tokens, dtype=torch.float32),
        sums=x.new_empty(tokens, dtype=torch.int32),
    )
    width = SLABS.value * length
    tile, num_warps = next((tile for tile in TILES if width <= tile[0]), TILES[-1])
    with on_device_of(x):
        _common.launch(
            quantize_rows, (tokens,),
            x, result.values, result.slabs, result.step, result.sums, columns, x.stride(0), length, eps, float(qmax),
            WHOLE=width <= tile, COLUMNS=tile, num_warps=num_warps,
        )  # fmt: skip
    return result


def ternary_quantize_activation(x: Tensor, qmax: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(quantized, step, sum) of the op pyops::ternary_quantize_activation."""
    _checks.quantize_activation("ternary_quantize_activation", x, qmax, eps)
    result = quantize(x, qmax, eps, natural=True, slabs=False)
    return result.values, result.step, result.sums
