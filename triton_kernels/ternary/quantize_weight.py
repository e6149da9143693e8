"""Ternary quantization of weights: gamma', then T = sign(W) where |W (1 / gamma')| > 0.5, in format t2.

Nothing waits for the device. The mean is a float64 sum of |W|, cut into parts that the shape decides and added in one
order. The lower median is selected, not sorted: three counts of the 31 bits of |W|, 11, 10 and 10 at a time from the
top, each among the weights that agree with what has been selected so far. Counts are integers, so their atomic sums
do not depend on an order. Per row, one program does all three; per tensor, many programs count and one selects.
A weight that is not finite makes the sum so, or falls into the topmost counts; gamma' is NaN then (a given scale
does not spare the sum). The weight is read once for the mean, three times for the median, and once more for T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyops.ternary import _checks, reference_ops
from pyops.ternary._formats import packed_shape

from .._device import on_device_of
from . import _common
from ._common import WANTED_PROGRAMS

MEAN, MEDIAN = 0, 1
COLUMNS = 2048  # weights of one step of a program
PART_CAPACITY = 2048
FINISH_ROWS = 128
BINS = tl.constexpr(2048)  # the first count needs 2^11, the others 2^10
FINITE_BINS = tl.constexpr(0x7F8)  # of the first count: sign, exponent and three bits above are of NaN or infinity
ENCODE_BYTES = 512


# ------------------------------------------------------------------------------------------- device functions


@triton.jit
def magnitude_bits(weight, column, stop):
    """|W| as an integer, which orders it; 0 from `stop` on."""
    value = tl.load(weight + column, mask=column < stop, other=0).to(tl.float32)
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def effective(found, finite, eps, ADD_EPS: tl.constexpr):
    """gamma' from gamma; NaN if a weight is not finite."""
    gamma = found + eps if ADD_EPS else tl.where(found < eps, eps, found)
    return tl.where(finite, gamma, float("nan"))


@triton.jit
def digit_span(turn):
    """[low, high) of the bits that are counted in a turn: 11 from bit 20, 10 from bit 10, 10 from bit 0."""
    low = 20 - 10 * turn
    return low, tl.where(turn == 0, 31, low + 10)


@triton.jit
def counted(bits, there, prefix, turn):
    """How many of the weights that agree with the prefix have each value of the bits of this turn."""
    low, high = digit_span(turn)
    agree = there & ((bits >> high) == (prefix >> high))
    return tl.histogram((bits >> low) & ((1 << (high - low)) - 1), BINS, mask=agree)


@triton.jit
def select(counts, rank):
    """(the digit of the element of this rank, its rank among those with this digit)."""
    below = tl.cumsum(counts, 0)
    digit = tl.sum((below <= rank).to(tl.int32), 0)
    return digit, rank - tl.sum(tl.where(tl.arange(0, BINS) < digit, counts, 0), 0)


# ------------------------------------------------------------------------------------------------------ the mean


@triton.jit(do_not_specialize=["parts"])
def sum_magnitudes(weight, sums, columns, part_columns, parts, COLUMNS: tl.constexpr):
    """sums[row, part] = the float64 sum of |W| over a part of a row."""
    program = tl.program_id(0).to(tl.int64)
    start = program % parts * part_columns
    stop = tl.minimum(start + part_columns, columns)
    weight += program // parts * columns
    total = tl.zeros((COLUMNS,), tl.float64)
    for first in range(start, stop, COLUMNS):
        bits = magnitude_bits(weight, first + tl.arange(0, COLUMNS), stop)
        total += bits.to(tl.float32, bitcast=True).to(tl.float64)
    tl.store(sums + program, tl.sum(total, 0))


@triton.jit(do_not_specialize=["rows", "columns", "parts"])
def finish_means(sums, scale, gamma, rows, columns, parts, eps,
                 ADD_EPS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)
    mask = (row < rows)[:, None] & (part < parts)[None, :]
    total = tl.sum(tl.load(sums + row[:, None] * parts + part[None, :], mask=mask, other=0), 1)
    found = (total / tl.full((), columns, tl.float64)).to(tl.float32)
    if scale is not None:
        found = tl.load(scale + row, mask=row < rows, other=0)
    tl.store(gamma + row, effective(found, total < float("inf"), eps, ADD_EPS), mask=row < rows)


# ---------------------------------------------------------------------------------------------------- the median


@triton.jit(do_not_specialize=["turn"])
def count_digits(weight, counts, state, count, part_columns, turn, COLUMNS: tl.constexpr):
    """Adds the counts of a part of the tensor to counts[turn]; the prefix is in state[0]."""
    start = tl.program_id(0).to(tl.int64) * part_columns
    stop = tl.minimum(start + part_columns, count)
    prefix = tl.load(state).to(tl.int32)
    found = tl.zeros((BINS,), tl.int32)
    for first in range(start, stop, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        found += counted(magnitude_bits(weight, column, stop), column < stop, prefix, turn)
    tl.atomic_add(counts + turn * BINS + tl.arange(0, BINS), found.to(tl.int64), mask=found > 0, sem="relaxed")


@triton.jit(do_not_specialize=["turn"])
def select_digit(counts, state, gamma, eps, turn, ADD_EPS: tl.constexpr):
    """Puts the digit that counts[turn] select into the prefix: gamma' is right after the last turn.
    state: (prefix, rank, weights that are not finite)."""
    bins = tl.arange(0, BINS)
    here = tl.load(counts + turn * BINS + bins)
    digit, rank = select(here, tl.load(state + 1))
    low, _ = digit_span(turn)
    prefix = tl.load(state).to(tl.int32) | (digit << low)
    others = tl.load(state + 2) + tl.sum(tl.where((bins >= FINITE_BINS) & (turn == 0), here, 0), 0)
    tl.store(state, prefix.to(tl.int64))
    tl.store(state + 1, rank)
    tl.store(state + 2, others)
    tl.store(gamma, effective(prefix.to(tl.float32, bitcast=True), others == 0, eps, ADD_EPS))


@triton.jit
def row_medians(weight, gamma, columns, eps, ADD_EPS: tl.constexpr, COLUMNS: tl.constexpr):
    """gamma' of one row."""
    row = tl.program_id(0).to(tl.int64)
    weight += row * columns
    rank = tl.cast((columns - 1) // 2, tl.int32)
    prefix = tl.zeros((), tl.int32)
    others = tl.zeros((), tl.int32)
    for turn in range(3):
        counts = tl.zeros((BINS,), tl.int32)
        for first in range(0, columns, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            counts += counted(magnitude_bits(weight, column, columns), column < columns, prefix, turn)
        others += tl.sum(tl.where((tl.arange(0, BINS) >= FINITE_BINS) & (turn == 0), counts, 0), 0)
        digit, rank = select(counts, rank)
        low, _ = digit_span(turn)
        prefix |= digit << low
    tl.store(gamma + row, effective(prefix.to(tl.float32, bitcast=True), others == 0, eps, ADD_EPS))


# --------------------------------------------------------------------------------------------------------- codes


@triton.jit(do_not_specialize=["chunks", "gamma_stride"])
def encode(weight, gamma, packed, columns, row_bytes, chunks, gamma_stride, BYTES: tl.constexpr):
    """BYTES bytes of a row of T in t2; padding gets code 1."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    first = (program % chunks).to(tl.int32) * BYTES
    column = first * 4 + tl.arange(0, 4 * BYTES)
    inverse = tl.div_rn(1.0, tl.load(gamma + row * gamma_stride))
    value = tl.load(weight + row * columns + column, mask=column < columns, other=0).to(tl.float32)
    code = tl.where(tl.abs(value * inverse) > 0.5, tl.where(value < 0, 0, 2), 1)  # of a gamma' that is NaN, 1
    code = code << (2 * (column % 4))
    byte = first + tl.arange(0, BYTES)
    bytes_of_codes = tl.sum(tl.reshape(code, (BYTES, 4)), 1).to(tl.uint8)
    tl.store(packed + row * row_bytes + byte, bytes_of_codes, mask=byte < row_bytes)


# --------------------------------------------------------------------------------------------------- launchers


def reasons_against(op: str, weight: Tensor, *_) -> list[str]:
    """Why the launcher of this file cannot serve these arguments; empty when it can."""
    return _common.device_reasons(weight)


def _part_columns(columns: int, wanted: int) -> int:
    steps = triton.cdiv(columns, COLUMNS)
    return triton.cdiv(steps, min(steps, wanted)) * COLUMNS


def _means(weight: Tensor, scale: Tensor | None, gamma: Tensor, rows: int, eps: float, add_eps: bool) -> None:
    columns = weight.numel() // rows
    part_columns = _part_columns(columns, WANTED_PROGRAMS if rows == 1 else 1)
    parts = triton.cdiv(columns, part_columns)
    sums = weight.new_empty((rows, parts), dtype=torch.float64)
    _common.launch(
        sum_magnitudes,
        (rows * parts,),
        weight,
        sums,
        columns,
        part_columns,
        parts,
        COLUMNS=COLUMNS,
        num_warps=4,
        registers=128,
    )
    many = parts > 1
    finish_rows = 1 if many else FINISH_ROWS
    _common.launch(
        finish_means, (triton.cdiv(rows, finish_rows),), sums, scale, gamma, rows, columns, parts, eps,
        ADD_EPS=add_eps, ROWS=finish_rows, PARTS=PART_CAPACITY if many else 1, num_warps=4,
    )  # fmt: skip


def _median(weight: Tensor, gamma: Tensor, eps: float, add_eps: bool) -> None:
    count = weight.numel()
    part_columns = _part_columns(count, WANTED_PROGRAMS)
    counts = torch.zeros((3, BINS.value), dtype=torch.int64, device=weight.device)
    state = torch.zeros(3, dtype=torch.int64, device=weight.device)
    state[1].fill_((count - 1) // 2)
    for turn in range(3):
        _common.launch(
            count_digits, (triton.cdiv(count, part_columns),), weight, counts, state, count, part_columns,
            turn, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
        _common.launch(
            select_digit, (1,), counts, state, gamma, eps, turn, ADD_EPS=add_eps, num_warps=4
        )  # fmt: skip


def ternary_quantize_weight(
    weight: Tensor, scale: Tensor | None, measure: int, per_row: bool, eps: float, add_eps: bool
) -> tuple[Tensor, Tensor]:
    """(packed, gamma') of the op pyops::ternary_quantize_weight."""
    _checks.quantize_weight(weight, scale, measure, per_row, eps)
    out_features, in_features = weight.shape
    if weight.numel() == 0:
        return reference_ops.ternary_quantize_weight(weight, scale, measure, per_row, eps, add_eps)
    weight, scale = weight.contiguous(), None if scale is None else scale.contiguous()
    gamma = weight.new_empty((out_features,) if per_row else (), dtype=torch.float32)
    packed = weight.new_empty(packed_shape("t2", out_features, in_features), dtype=torch.uint8)
    row_bytes = packed.size(1)
    chunks = triton.cdiv(row_bytes, ENCODE_BYTES)
    with on_device_of(weight):
        if measure == MEAN or scale is not None:
            _means(weight, scale, gamma, out_features if per_row else 1, eps, add_eps)
        elif per_row:
            _common.launch(
                row_medians, (out_features,), weight, gamma, in_features, eps,
                ADD_EPS=add_eps, COLUMNS=COLUMNS, num_warps=4, registers=255,
            )  # fmt: skip
        else:
            _median(weight, gamma, eps, add_eps)
        _common.launch(
            encode, (out_features * chunks,), weight, gamma, packed, in_features, row_bytes, chunks, gamma.dim(),
            BYTES=ENCODE_BYTES, num_warps=4,
        )  # fmt: skip
    return _common.remember_valid(packed), gamma
