"""Softmax cross-entropy with the log-sum-exp-squared regulariser on given logits, rows x classes.

  loss_i = sum_j t_j [ (1 - s) w_cj (lse - o_cj) + s/D sum_k w_k (lse - o_k) ]  + lambda lse^2
with t the target weights, w the class weights, s the label smoothing, D the number of classes and lambda
`lse_square_scale`. Row formulas and the columns of `statistics` are those of
csrc/spherical/cross_entropy_formula.h, to the letter: a backward of one backend follows a forward of another.

Bytes: the forward reads the logits once, the backward reads and writes them once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyops.spherical import _checks

from .._device import on_device_of, round_to
from . import _common
from ._common import (
    add_target_gradients,
    load_chosen,
    load_target,
    load_tile,
    load_upstream,
    part_span,
    row_skew,
    rows_that_count,
    scaled_statistic,
    store_tile,
    tile_mask,
    tile_pointers,
)

# Columns of `statistics`.
MAXIMUM = tl.constexpr(0)
SLOPE = tl.constexpr(1)
Z_SLOPE = tl.constexpr(2)
SMOOTH = tl.constexpr(3)
TARGET_GRADIENT = tl.constexpr(4)

# Planes of the partial results: of exp(o - maximum) the sum; of w (o - maximum) and of w, only when smoothing.
PEAK = tl.constexpr(0)
EXPONENTIALS = tl.constexpr(1)
WEIGHTED = tl.constexpr(2)
WEIGHTS = tl.constexpr(3)

NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def shift_of(maximum):
    """What is subtracted from logits before the exponential: the maximum, but 0 while that is -inf, since
    exp(-inf - 0) is the 0 that exp(-inf + inf) is not."""
    return tl.where(maximum == NOTHING, 0.0, maximum)


# --------------------------------------------------------------------------------------- forward, 1: streaming


@triton.jit
def tile_weights(weight, first, inside, dtype: tl.constexpr, COLUMNS: tl.constexpr):
    """Class weights of the columns of a tile (1 x COLUMNS), 0 outside the program's share."""
    if weight is None:
        return tl.where(inside, 1.0, 0.0).to(dtype)[None, :]
    else:
        lane = tl.arange(0, COLUMNS)
        return tl.load(weight + first + lane, mask=inside, other=0).to(dtype)[None, :]


@triton.jit(do_not_specialize=[
    "rows", "lead", "target_row_stride", "target_column_stride", "weight_row_stride", "weight_column_stride",
    "ignore_index",
])  # fmt: skip
def row_exponentials(
    logits, target, target_weight, weight, partials, rows, classes, row_stride, lead, target_count,
    target_row_stride, target_column_stride, weight_row_stride, weight_column_stride, ignore_index, part_columns,
    SMOOTHING: tl.constexpr, ACCUMULATOR: tl.constexpr, EVEN: tl.constexpr, PEEL: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(maximum, sum exp(o - maximum)) of one part of the columns of ROWS rows; with SMOOTHING also
    (sum w (o - maximum), sum w).

    Program (i, p) owns rows [i ROWS, (i + 1) ROWS) and part p of their columns, which it walks tile by tile: the
    tile's maximum, then its exponentials relative to the maximum so far, one each. Elements and the sums over a
    tile are in ACCUMULATOR (float32; float64 for float64 logits), the sums over tiles in float64. w (o - maximum)
    in place of w o: the terms are small even when the logits share an offset.
    partials[plane, row, part], float64, belongs to this program alone. Programs whose rows are all ignored read no
    logits and leave (-inf, 0).
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    part = tl.program_id(1).to(tl.int64)
    row = first_row + tl.arange(0, ROWS)
    skew = row_skew(first_row, row_stride, lead, PEEL, VECTOR)
    start, stop = part_span(part, skew, part_columns, classes)
    begin = part * part_columns - skew
    counting = rows_that_count(
        target, target_weight, row, rows, target_count, target_row_stride, target_column_stride,
        weight_row_stride, weight_column_stride, ignore_index,
    )  # fmt: skip
    stop = tl.where(tl.max(counting, 0) > 0, stop, begin)
    maximum = tl.full((ROWS,), NOTHING, ACCUMULATOR)
    total = tl.zeros((ROWS,), tl.float64)
    weighted = tl.zeros((ROWS,), tl.float64)
    weight_sum = tl.zeros((), tl.float64)
    for first in range(begin, stop, COLUMNS):
        inside, mask, whole, _ = tile_mask(first, start, stop, first_row, rows, EVEN, VECTOR, ROWS, COLUMNS)
        pointers = tile_pointers(logits, first_row, row_stride, first, EVEN or ROWS == 1, VECTOR, ROWS, COLUMNS)
        o = load_tile(pointers, mask, whole, NOTHING, ACCUMULATOR)
        risen = tl.maximum(maximum, tl.max(o, 1))
        shift = shift_of(risen)
        shifted = o - shift[:, None]
        total *= tl.exp(maximum - shift).to(tl.float64)
        total += tl.sum(tl.exp(shifted), 1).to(tl.float64)
        if SMOOTHING:
            w = tile_weights(weight, first, inside, ACCUMULATOR, COLUMNS)
            weighted += (shift_of(maximum) - shift).to(tl.float64) * weight_sum
            weighted += tl.sum(tl.where(mask, w * shifted, 0.0), 1).to(tl.float64)
            weight_sum += tl.sum(tl.sum(w, 1), 0).to(tl.float64)
        maximum = risen
    planes = partials + row * tl.num_programs(1) + part
    plane_stride = tl.cast(rows, tl.int64) * tl.num_programs(1)
    tl.store(planes + PEAK * plane_stride, maximum.to(tl.float64), mask=row < rows)
    tl.store(planes + EXPONENTIALS * plane_stride, total, mask=row < rows)
    if SMOOTHING:
        tl.store(planes + WEIGHTED * plane_stride, weighted, mask=row < rows)
        tl.store(planes + WEIGHTS * plane_stride, tl.zeros((ROWS,), tl.float64) + weight_sum, mask=row < rows)


# -------------------------------------------------------------------------------------- forward, 2: row formulas


@triton.jit
def merge_parts(partials, row, rows, parts, SMOOTHING: tl.constexpr, PARTS: tl.constexpr):
    """(maximum, sum exp(o - maximum), sum w (o - maximum), sum w) of whole rows, in float64."""
    part = tl.arange(0, PARTS)[None, :]
    mask = (row < rows)[:, None] & (part < parts)
    planes = partials + row[:, None] * parts + part
    plane_stride = tl.cast(rows, tl.int64) * parts
    peaks = tl.load(planes + PEAK * plane_stride, mask=mask, other=NOTHING)
    totals = tl.load(planes + EXPONENTIALS * plane_stride, mask=mask, other=0.0)
    maximum = tl.max(peaks, 1)
    shift = shift_of(maximum)[:, None]
    total = tl.sum(totals * tl.exp(peaks - shift), 1)
    weighted = tl.zeros(row.shape, tl.float64)
    weight_sum = tl.zeros(row.shape, tl.float64)
    if SMOOTHING:
        weights = tl.load(planes + WEIGHTS * plane_stride, mask=mask, other=0.0)
        parts_weighted = tl.load(planes + WEIGHTED * plane_stride, mask=mask, other=0.0)
        weighted = tl.sum(parts_weighted + tl.where(weights == 0, 0.0, (shift_of(peaks) - shift) * weights), 1)
        weight_sum = tl.sum(weights, 1)
    return maximum, total, weighted, weight_sum


@triton.jit
def store_row(statistics, maximum, slope, z_slope, smooth, live, mask):
    """The four row numbers; zeros for ignored rows."""
    dtype = statistics.dtype.element_ty
    tl.store(statistics + MAXIMUM, tl.where(live, maximum, 0.0).to(dtype), mask=mask)
    tl.store(statistics + SLOPE, tl.where(live, slope, 0.0).to(dtype), mask=mask)
    tl.store(statistics + Z_SLOPE, tl.where(live, z_slope, 0.0).to(dtype), mask=mask)
    tl.store(statistics + SMOOTH, tl.where(live, smooth, 0.0).to(dtype), mask=mask)


@triton.jit
def store_losses(loss, z_term, block_sums, row, there, row_loss, row_z, row_weight, live, REDUCE: tl.constexpr):
    """Per row the loss (regulariser included) and the regulariser, or the program's four sums."""
    if REDUCE == 0:
        tl.store(loss + row, round_to(row_loss + row_z, loss.dtype.element_ty), mask=there)
        tl.store(z_term + row, round_to(row_z, z_term.dtype.element_ty), mask=there)
    else:
        sums = block_sums + tl.program_id(0)
        blocks = tl.num_programs(0)
        tl.store(sums, tl.sum(row_loss, 0))
        tl.store(sums + blocks, tl.sum(row_weight, 0))
        tl.store(sums + 2 * blocks, tl.sum(row_z, 0))
        tl.store(sums + 3 * blocks, tl.sum(tl.where(live, 1.0, 0.0).to(tl.float64), 0))


@triton.jit(debug=True, do_not_specialize=[
    "rows", "classes", "row_stride", "target_row_stride", "target_column_stride", "weight_row_stride",
    "weight_column_stride", "ignore_index", "parts",
])  # fmt: skip
def finish_rows(
    logits, target, target_weight, weight, partials, statistics, loss, z_term, block_sums,
    rows, classes, row_stride, target_count, target_row_stride, target_column_stride,
    weight_row_stride, weight_column_stride, ignore_index, parts,
    label_smoothing: tl.float64, lse_square_scale: tl.float64,
    SMOOTHING: tl.constexpr, REDUCE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Row formulas: `statistics` of ROWS rows, and their losses (REDUCE 0) or the sums of their losses, row
    weights, regularisers and of rows that count in block_sums[:, program]. Everything is float64 until stored.
    `debug` is what arms the assertion.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    maximum, total, weighted, weight_sum = merge_parts(partials, row, rows, parts, SMOOTHING, PARTS)
    log_sum = tl.log(total)
    label_smoothing = tl.full((), label_smoothing, tl.float64)
    lse_square_scale = tl.full((ROWS,), lse_square_scale, tl.float64)
    zero = tl.zeros((ROWS,), tl.float64)
    row_loss, slope, target_weights, class_weights, counted = zero, zero, zero, zero, zero
    row_statistics = statistics + row * (TARGET_GRADIENT + target_count)
    for j in range(target_count):
        index, counts, own = load_target(
            target, target_weight, row, rows, j, target_row_stride, target_column_stride,
            weight_row_stride, weight_column_stride, ignore_index,
        )  # fmt: skip
        inside = (index >= 0) & (index < classes)
        valid = inside | (index == ignore_index) | (row >= rows)
        tl.device_assert(valid, "pyops::cross_entropy: target must be in [0, classes) or ignore_index")
        counts = counts & inside
        o, class_weight = load_chosen(logits, weight, row, row_stride, index, counts)
        share = tl.where(counts, (1 - label_smoothing) * (own * class_weight), 0.0)
        # A class of weight 0 adds nothing, whatever its logit.
        row_loss += tl.where(share == 0, 0.0, share * ((maximum - o) + log_sum))
        share = tl.where(classes == 1, 0.0, share)  # one class: the softmax is 1 whatever the logit
        slope += share
        target_weights += tl.where(counts, own, 0.0)
        class_weights += class_weight
        counted += tl.where(counts, 1.0, 0.0)
        tl.store(row_statistics + TARGET_GRADIENT + j, (-share).to(statistics.dtype.element_ty), mask=there)
    live = counted > 0
    smooth = zero
    if SMOOTHING:
        smooth = tl.where(classes <= 1, 0.0, label_smoothing / tl.full((), classes, tl.float64) * target_weights)
        row_loss += tl.where(smooth == 0, 0.0, smooth * (log_sum * weight_sum - weighted))
        slope += tl.where(smooth == 0, 0.0, smooth * weight_sum)
    lse = maximum + log_sum
    regularised = live & (lse_square_scale != 0)
    row_z = tl.where(regularised, lse_square_scale * lse * lse, 0.0)
    z_slope = tl.where(regularised, 2 * lse_square_scale * lse / total, 0.0)
    store_row(row_statistics, maximum, slope / total, z_slope, smooth, live, there)
    row_weight = class_weights / tl.maximum(counted, 1.0)
    store_losses(loss, z_term, block_sums, row, there, row_loss, row_z, row_weight, live, REDUCE)


# ----------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=[
    "rows", "lead", "target_row_stride", "target_column_stride", "grad_loss_stride", "statistics_stride",
    "column_blocks",
])  # fmt: skip
def logits_gradient(
    grad_loss, logits, target, weight, statistics, normalizer, grad_logits, rows, classes, row_stride,
    grad_row_stride, lead, grad_loss_stride, target_count, target_row_stride, target_column_stride,
    statistics_stride, column_blocks,
    ACCUMULATOR: tl.constexpr, EVEN: tl.constexpr, PEEL: tl.constexpr, VECTOR: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d loss / d o_k = (slope + z_slope) exp(o_k - maximum) - smooth w_k + sum_j target_gradient_j [k = c_j]
    times grad_loss, and over the divisors of the mean: normalizer[1] for z_slope, normalizer[0] for the others.

    One program per tile of the gradient, which it alone writes; `grad_logits` may be `logits`. Row numbers are
    scaled in float64, elements are worked on in ACCUMULATOR and rounded once. Rows whose row numbers are all 0
    (ignored) get exact zeros and are not read unless they share a tile with others.
    """
    block = tl.program_id(0).to(tl.int64)
    first_row = block // column_blocks * ROWS
    row = first_row + tl.arange(0, ROWS)
    there = row < rows
    first = block % column_blocks * COLUMNS - row_skew(first_row, row_stride, lead, PEEL, VECTOR)
    upstream = load_upstream(grad_loss, grad_loss_stride, row, rows)
    scale = upstream / tl.load(normalizer)
    z_scale = upstream / tl.load(normalizer + 1)
    numbers = statistics + row * statistics_stride
    maximum = tl.load(numbers + MAXIMUM, mask=there, other=0).to(ACCUMULATOR)
    slope = scaled_statistic(tl.load(numbers + SLOPE, mask=there, other=0), scale, tl.float64)
    z_slope = scaled_statistic(tl.load(numbers + Z_SLOPE, mask=there, other=0), z_scale, tl.float64)
    slope = (slope + z_slope).to(ACCUMULATOR)
    smooth = scaled_statistic(tl.load(numbers + SMOOTH, mask=there, other=0), scale, ACCUMULATOR)
    live = (slope != 0) | (smooth != 0)
    any_live = tl.max(live.to(tl.int32), 0) > 0

    inside, mask, whole, _ = tile_mask(first, 0, classes, first_row, rows, EVEN, VECTOR, ROWS, COLUMNS)
    pointers = tile_pointers(logits, first_row, row_stride, first, EVEN or ROWS == 1, VECTOR, ROWS, COLUMNS)
    o = load_tile(pointers, mask & live[:, None], whole & any_live, 0.0, ACCUMULATOR)
    gradient = slope[:, None] * tl.exp(o - maximum[:, None])
    if weight is None:
        gradient -= smooth[:, None]
    else:
        if tl.max((smooth != 0).to(tl.int32), 0) > 0:
            w = tile_weights(weight, first, inside, ACCUMULATOR, COLUMNS)
            gradient -= tl.where((smooth != 0)[:, None], smooth[:, None] * w, 0.0)
    gradient = tl.where(live[:, None], gradient, 0.0)
    gradient = add_target_gradients(
        gradient, target, statistics, scale, row, rows, first, target_count, target_row_stride,
        target_column_stride, statistics_stride, TARGET_GRADIENT, COLUMNS,
    )  # fmt: skip
    store_tile(
        tile_pointers(grad_logits, first_row, grad_row_stride, first, GRAD_ALIGNED, VECTOR, ROWS, COLUMNS),
        gradient, mask, whole,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- launchers


def reasons_against(op: str, *arguments) -> list[str]:
    """Why a launcher of this file cannot serve these arguments; empty when it can."""
    if op == "cross_entropy":
        logits, target, target_weight, weight = arguments[:4]
        reasons = _common.common_reasons(logits, target, target_weight, weight)
        return reasons + _common.out_dtype_reasons(arguments[-1])
    grad_loss, logits, target, weight, statistics, normalizer = arguments
    reasons = _common.common_reasons(logits, target, grad_loss, weight, statistics, normalizer)
    return reasons + (_common.in_place_reasons(logits) if op.endswith("_") else [])


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    target_weight: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    lse_square_scale: float,
    ignore_index: int,
    reduction: int,
    safe_mean: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, z_term, statistics, normalizer) of the op pyops::cross_entropy."""
    name = "cross_entropy"
    _checks.forward(name, logits, target, target_weight, weight, label_smoothing, reduction, out_dtype)
    _checks.lse_square_scale(lse_square_scale)
    _common.check_range(name, target, logits.size(1), ignore_index)
    logits = _common.rows_dense(logits)
    target, target_weight = _common.as_columns(target), _common.as_columns(target_weight)
    weight = None if weight is None else weight.contiguous()
    plan = _common.plan_rows(logits)
    tile = plan.tile
    rows, classes = logits.shape
    target_count = target.size(1)
    smoothing = bool(label_smoothing)
    outputs = _common.allocate_outputs(
        logits, plan, TARGET_GRADIENT.value + target_count, reduction, out_dtype, z_term=True
    )
    partials = logits.new_empty((4 if smoothing else 2, rows, plan.parts), dtype=torch.float64)
    targets = (target_count, *target.stride(), *_common.strides(target_weight), ignore_index)
    with on_device_of(logits):
        _common.launch(
            row_exponentials, (plan.row_blocks, plan.parts),
            logits, target, target_weight, weight, partials, rows, classes, logits.stride(0), plan.lead,
            *targets, plan.part_columns,
            SMOOTHING=smoothing, ACCUMULATOR=_common.accumulator(logits), EVEN=plan.even, PEEL=plan.peel,
            VECTOR=plan.vector, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps,
        )  # fmt: skip
        _common.launch(
            finish_rows, (plan.finish_blocks,),
            logits, target, target_weight, weight, partials, outputs.statistics, outputs.loss, outputs.z_term,
            outputs.block_sums, rows, classes, logits.stride(0), *targets, plan.parts,
            label_smoothing, lse_square_scale,
            SMOOTHING=smoothing, REDUCE=int(reduction != _common.REDUCE_NONE), ROWS=plan.finish_rows,
            PARTS=plan.part_capacity, num_warps=4, registers=128,
        )  # fmt: skip
        _common.finish_reduction(outputs, reduction, safe_mean)
    return outputs.loss, outputs.z_term, outputs.statistics, outputs.normalizer


def _write_gradient(grad_loss, logits, target, weight, statistics, normalizer, grad_logits) -> None:
    """Into `grad_logits`, whose rows are dense like those of `logits` and which may be `logits`."""
    name = "cross_entropy_backward"
    _checks.backward(name, grad_loss, logits, target, statistics, normalizer, TARGET_GRADIENT.value, 2)
    if weight is not None:
        _checks.class_weight(name, weight, logits)
    target, statistics = _common.as_columns(target), statistics.contiguous()
    plan = _common.plan_rows(logits)
    tile = plan.tile
    rows, classes = logits.shape
    grad_aligned = _common.grad_aligned(logits, grad_logits, plan)
    with on_device_of(logits):
        _common.launch(
            logits_gradient, (plan.row_blocks * plan.column_blocks,),
            grad_loss, logits, target, None if weight is None else weight.contiguous(), statistics,
            normalizer.contiguous(), grad_logits, rows, classes, logits.stride(0), grad_logits.stride(0), plan.lead,
            grad_loss.stride(0) if grad_loss.dim() else 0, target.size(1), *target.stride(), statistics.size(1),
            plan.column_blocks,
            ACCUMULATOR=_common.accumulator(logits), EVEN=plan.even, PEEL=plan.peel, VECTOR=plan.vector,
            GRAD_ALIGNED=grad_aligned, ROWS=tile.rows, COLUMNS=tile.columns,
            num_warps=tile.num_warps, registers=_common.gradient_registers(logits, plan, grad_aligned, target.size(1)),
        )  # fmt: skip


def cross_entropy_backward(grad_loss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None,
                           statistics: Tensor, normalizer: Tensor) -> Tensor:  # fmt: skip
    """grad_logits of the op pyops::cross_entropy_backward."""
    logits = _common.rows_dense(logits)
    grad_logits = logits.new_empty(logits.shape)
    _write_gradient(grad_loss, logits, target, weight, statistics, normalizer, grad_logits)
    return grad_logits


def cross_entropy_backward_(grad_loss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None,
                            statistics: Tensor, normalizer: Tensor) -> None:  # fmt: skip
    """Overwrites the logits with their gradient: pyops::cross_entropy_backward_."""
    dense = _common.rows_dense(logits)
    _write_gradient(grad_loss, dense, target, weight, statistics, normalizer, dense)
    if dense is not logits:
        logits.copy_(dense)
