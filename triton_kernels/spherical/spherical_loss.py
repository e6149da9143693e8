"""Spherical losses (z, Taylor softmax, spherical softmax, one-hot squared error) on given logits, rows x classes.

A spherical loss depends on the logits o_k of a row only through their mean, m2 = sum_k (o_k - mean)^2 and the
logits of the targets; smoothing of the two softmax alternatives adds sum_log = sum_k log n(o_k), with n the
unnormalised probability. Row formulas and the columns of `statistics` are those of
csrc/spherical/spherical_loss_formula.h, to the letter: a backward of one backend follows a forward of another.

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
    widen,
)

# Numbers of the losses, as the op takes them.
Z = tl.constexpr(0)
TAYLOR_SOFTMAX = tl.constexpr(1)
SPHERICAL_SOFTMAX = tl.constexpr(2)
MSE_ONEHOT = tl.constexpr(3)

# Columns of `statistics`.
CENTER = tl.constexpr(0)
INVERSE_SCALE = tl.constexpr(1)
SLOPE = tl.constexpr(2)
SHIFT = tl.constexpr(3)
SMOOTH = tl.constexpr(4)
TARGET_GRADIENT = tl.constexpr(5)

# Planes of the partial results.
MEAN = tl.constexpr(0)
M2 = tl.constexpr(1)
SUM_LOG = tl.constexpr(2)

# The pivot is the mean of this many elements at the start of a program's share of the row.
PIVOT_COLUMNS = 256
# Squares below this (per element) have lost bits in float32; above its range they are infinite. Rows where that
# matters are taken again in float64, this many columns at a time.
SMALLEST_SQUARE = tl.constexpr(1e-30)
NEGLIGIBLE_EPS = tl.constexpr(1e-20)
RESCUE_COLUMNS = tl.constexpr(1024)


# ------------------------------------------------------------------------------------------------ row formulas


@triton.jit
def unnormalised(o, eps, LOSS: tl.constexpr):
    """n(o) of the two softmax alternatives."""
    if LOSS == TAYLOR_SOFTMAX:
        return 1 + o + 0.5 * o * o
    else:
        return o * o + eps


@triton.jit
def smooth_term(o, eps, LOSS: tl.constexpr):
    """d log n(o) / d o = 2 u / (u^2 + e), also where the square leaves the range of float32."""
    if LOSS == TAYLOR_SOFTMAX:
        u = 1 + o
        eps = 1.0
    else:
        u = o
    huge = (tl.abs(u) > 1e18) & (tl.abs(u) < float("inf"))
    return tl.where(huge, 2.0, u + u) / tl.where(huge, u, u * u + eps)


@triton.jit
def sum_of_squares(mean, m2, classes):
    """A row with an infinity and no NaN has m2 = inf, and a mean that may be inf - inf."""
    return tl.where(m2 == float("inf"), m2, m2 + classes * mean * mean)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) without overflow, and with full relative accuracy where it is tiny: for u = 1 + y rounded,
    log(u) * y / (u - 1) undoes the rounding (Triton has no log1p that its interpreter runs)."""
    y = tl.exp(-tl.abs(x))
    u = 1 + y
    log1p = tl.where(u == 1, y, tl.log(u) * (y / tl.where(u == 1, 1.0, u - 1)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def sigmoid(x):
    y = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, y) / (1 + y)


@triton.jit
def target_terms(o, omega, mean, m2, sum_log, scale, classes, a, b, eps, smoothing, LOSS: tl.constexpr):
    """What a target of weight omega (target weight times class weight) and logit o adds to (loss, slope, shift,
    smooth), and its target gradient; all per row and in float64."""
    keep = 1 - smoothing
    smooth = omega * 0
    if LOSS == Z:
        # sum_k t_k z_k = keep * z_c because the mean of z is 0: smoothing only rescales z_c.
        z = (o - mean) * scale
        u = a * (b - keep * z)
        rho = omega * keep * sigmoid(u)
        loss = omega * softplus(u) / a
        shift = rho * scale / classes
        slope = shift * z
        gradient = -rho * scale
        # Two classes: z^2 = v / (v + eps), and what is left of the gradient is eps / (v + eps), without cancellation.
        gradient = tl.where(classes == 2, gradient * (eps * scale * scale), gradient)
        shift = tl.where(classes == 2, -0.5 * gradient, shift)
        slope = tl.where(classes == 2, 0.0, slope)
    elif LOSS == MSE_ONEHOT:
        # sum_k (o_k - t_k)^2 with t = keep * onehot + smoothing / classes.
        target_squares = keep * keep + (2 * keep + smoothing) * smoothing / classes
        squares = sum_of_squares(mean, m2, classes)
        cross = tl.where(squares == float("inf"), 0.0, 2 * (keep * o + smoothing * mean))
        loss = omega * (squares - cross + target_squares)
        slope = 2 * omega
        shift = -2 * omega * smoothing / classes
        gradient = -2 * omega * keep
    else:
        if LOSS == TAYLOR_SOFTMAX:
            total = classes * (1 + mean + 0.5 * mean * mean) + 0.5 * m2
            shift = omega / total
            slope = shift / scale
        else:
            total = sum_of_squares(mean, m2, classes) + classes * eps
            slope = 2 * omega / total / scale
            shift = slope * 0
        log_chosen = tl.log(unnormalised(o, eps, LOSS))
        loss = omega * (tl.log(total) - keep * log_chosen - smoothing / classes * sum_log)
        smooth = -omega * smoothing / classes
        gradient = -omega * keep * smooth_term(o, eps, LOSS)
        several = tl.where(classes == 1, 0.0, 1.0)  # one class: the probability is 1 whatever the logit
        slope, shift, smooth, gradient = slope * several, shift * several, smooth * several, gradient * several
    counts = omega != 0  # a class of weight 0 adds nothing, whatever its logit
    return (
        tl.where(counts, loss, 0.0),
        tl.where(counts, slope, 0.0),
        tl.where(counts, shift, 0.0),
        tl.where(counts, smooth, 0.0),
        tl.where(counts, gradient, 0.0),
    )


# --------------------------------------------------------------------------------------- forward, 1: streaming


@triton.jit
def log_unnormalised(o, eps, LOSS: tl.constexpr):
    """log n(o), also where the square in n leaves the range of float32."""
    huge = tl.abs(o) > 1e9
    log = tl.log(tl.where(huge, tl.abs(o), unnormalised(o, eps, LOSS)))
    return tl.where(huge, 2 * log - (0.6931471805599453 if LOSS == TAYLOR_SOFTMAX else 0.0), log)


@triton.jit
def tile_moments(o, pivot, mask, count):
    """(mean - pivot, sum of squares about the mean) of the columns of a tile, in the type of o: differences from
    the pivot are small, so float32 is good for their sum and squares, and equal logits give exact zeros."""
    shifted = tl.where(mask, o - pivot[:, None], 0.0)
    offset = tl.sum(shifted, 1) / count
    centred = tl.where(mask, shifted - offset[:, None], 0.0)
    return offset, tl.sum(centred * centred, 1)


@triton.jit
def start_pivot(
    logits, first_row, rows, row_stride, begin, start, stop,
    ACCUMULATOR: tl.constexpr, EVEN: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean of the first columns of the program's share of each row, as first element plus mean difference from it:
    exact for equal logits. (The first element alone would be a bad pivot when it is an outlier.)"""
    row = first_row + tl.arange(0, ROWS)
    place = logits + row * row_stride + start
    element = tl.load(place, mask=row < tl.where(start < stop, rows, 0), other=0).to(ACCUMULATOR)
    _, mask, whole, count = tile_mask(begin, start, stop, first_row, rows, EVEN, VECTOR, ROWS, COLUMNS)
    pointers = tile_pointers(logits, first_row, row_stride, begin, EVEN or ROWS == 1, VECTOR, ROWS, COLUMNS)
    sample = load_tile(pointers, mask, whole, 0.0, ACCUMULATOR)
    difference = tl.where(mask, sample - element[:, None], 0.0)
    return element + tl.sum(difference, 1) / tl.maximum(count, 1).to(ACCUMULATOR)


@triton.jit(do_not_specialize=[
    "rows", "lead", "target_row_stride", "target_column_stride", "weight_row_stride", "weight_column_stride",
    "ignore_index",
])  # fmt: skip
def row_moments(
    logits, target, target_weight, partials, rows, classes, row_stride, lead, target_count,
    target_row_stride, target_column_stride, weight_row_stride, weight_column_stride, ignore_index,
    part_columns, eps: tl.float64,
    LOG_OF: tl.constexpr, ACCUMULATOR: tl.constexpr, EVEN: tl.constexpr, PEEL: tl.constexpr,
    VECTOR: tl.constexpr, PIVOT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(mean, m2 = sum (o - mean)^2, sum_log) of one part of the columns of ROWS rows.

    Program (i, p) owns rows [i ROWS, (i + 1) ROWS) and part p of their columns, which it walks tile by tile. A
    tile is in registers when its mean and then its centred squares are taken: two sums across the program per
    tile, in ACCUMULATOR (float32; float64 for float64 logits). Tiles are merged per row in float64 by Chan's
    formula, never as q / D - mean^2. partials[plane, row, part], float64, belongs to this program alone. Programs
    whose rows are all ignored read no logits but for the pivot, and what they leave is not used.
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    part = tl.program_id(1).to(tl.int64)
    row = first_row + tl.arange(0, ROWS)
    skew = row_skew(first_row, row_stride, lead, PEEL, VECTOR)
    start, stop = part_span(part, skew, part_columns, classes)
    begin = part * part_columns - skew
    # Also for rows that are ignored: this load need not wait for that of the targets.
    pivot = start_pivot(logits, first_row, rows, row_stride, begin, start, stop, ACCUMULATOR, EVEN, VECTOR, ROWS, PIVOT)
    counting = rows_that_count(
        target, target_weight, row, rows, target_count, target_row_stride, target_column_stride,
        weight_row_stride, weight_column_stride, ignore_index,
    )  # fmt: skip
    stop = tl.where(tl.max(counting, 0) > 0, stop, begin)
    eps = tl.full((), eps, tl.float64).to(ACCUMULATOR)
    seen = tl.zeros((), tl.float64)
    mean = pivot.to(tl.float64)
    m2 = tl.zeros((ROWS,), tl.float64)
    sum_log = tl.zeros((ROWS,), tl.float64)
    for first in range(begin, stop, COLUMNS):
        _, mask, whole, count = tile_mask(first, start, stop, first_row, rows, EVEN, VECTOR, ROWS, COLUMNS)
        pointers = tile_pointers(logits, first_row, row_stride, first, EVEN or ROWS == 1, VECTOR, ROWS, COLUMNS)
        o = load_tile(pointers, mask, whole, 0.0, ACCUMULATOR)
        offset, squares = tile_moments(o, pivot, mask, count.to(ACCUMULATOR))
        if LOG_OF != Z:
            sum_log += tl.sum(tl.where(mask, log_unnormalised(o, eps, LOG_OF), 0.0), 1).to(tl.float64)
        together = seen + count.to(tl.float64)
        share = count.to(tl.float64) / together
        delta = (pivot.to(tl.float64) - mean) + offset.to(tl.float64)
        mean += delta * share
        m2 += squares.to(tl.float64) + delta * delta * (seen * share)
        seen = together
    planes = partials + row * tl.num_programs(1) + part
    plane_stride = tl.cast(rows, tl.int64) * tl.num_programs(1)
    tl.store(planes + MEAN * plane_stride, mean, mask=row < rows)
    tl.store(planes + M2 * plane_stride, m2, mask=row < rows)
    if LOG_OF != Z:
        tl.store(planes + SUM_LOG * plane_stride, sum_log, mask=row < rows)


# -------------------------------------------------------------------------------------- forward, 2: row formulas


@triton.jit
def merge_parts(partials, row, rows, classes, row_stride, lead, parts, part_columns,
                LOG_OF: tl.constexpr, PEEL: tl.constexpr, VECTOR: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """(mean, m2, sum_log) of whole rows: Chan's merge of all parts at once, in float64."""
    part = tl.arange(0, PARTS)[None, :]
    skew = row_skew(row, row_stride, lead, PEEL, VECTOR)
    start, stop = part_span(part.to(tl.int64), skew[:, None], part_columns, classes)
    mask = (row < rows)[:, None] & (part < parts)
    count = tl.where(mask, stop - start, 0).to(tl.float64)
    planes = partials + row[:, None] * parts + part
    plane_stride = tl.cast(rows, tl.int64) * parts
    means = tl.load(planes + MEAN * plane_stride, mask=mask, other=0.0)
    squares = tl.load(planes + M2 * plane_stride, mask=mask, other=0.0)
    # Relative to the first part: equal logits then have m2 = 0 exactly.
    origin = tl.load(partials + MEAN * plane_stride + row * parts, mask=row < rows, other=0.0)
    apart = tl.where(mask, means - origin[:, None], 0.0)
    mean = origin + tl.sum(count * apart, 1) / tl.maximum(tl.full((), classes, tl.float64), 1.0)
    apart = means - mean[:, None]
    m2 = tl.sum(squares + count * apart * apart, 1)
    sum_log = tl.zeros(row.shape, tl.float64)
    if LOG_OF != Z:
        sum_log = tl.sum(tl.load(planes + SUM_LOG * plane_stride, mask=mask, other=0.0), 1)
    return mean, m2, sum_log


@triton.jit
def in_float64(logits, lost, mean, m2, row, first_row, row_stride, classes, ROWS: tl.constexpr):
    """Replaces (mean, m2) of the lost rows by two passes in float64, one row after the other."""
    lane = tl.arange(0, RESCUE_COLUMNS)
    classes = tl.cast(classes, tl.int64)
    for r in range(ROWS):
        this = row == first_row + r
        if tl.max(tl.where(this, lost, 0), 0) > 0:
            start = logits + (first_row + r) * row_stride
            total = tl.zeros((RESCUE_COLUMNS,), tl.float64)
            for first in range(0, classes, RESCUE_COLUMNS):
                total += widen(tl.load(start + first + lane, mask=first + lane < classes, other=0))
            center = tl.sum(total, 0) / classes.to(tl.float64)
            origin = tl.where(center - center == 0, center, 0.0)  # infinities stay infinities
            total = tl.zeros((RESCUE_COLUMNS,), tl.float64)
            for first in range(0, classes, RESCUE_COLUMNS):
                inside = first + lane < classes
                centred = tl.where(inside, widen(tl.load(start + first + lane, mask=inside, other=0)) - origin, 0.0)
                total += centred * centred
            mean = tl.where(this, center, mean)
            m2 = tl.where(this, tl.sum(total, 0), m2)
    return mean, m2


@triton.jit
def lost_rows(mean, m2, counting, classes, eps, LOSS: tl.constexpr, NARROW: tl.constexpr):
    """Rows whose squares left the range of their type: 1 where m2 is infinite or NaN, or so small that bits are lost
    and matter, which they do next to a small eps only. A row of zeros has lost nothing."""
    lost = (m2 < float("inf")) == 0
    if NARROW and LOSS != TAYLOR_SOFTMAX and LOSS != MSE_ONEHOT:
        small = (m2 < SMALLEST_SQUARE * classes) & ((m2 != 0) | (mean != 0))
        lost = lost | (small & (tl.zeros(m2.shape, tl.float64) + eps < NEGLIGIBLE_EPS))
    return tl.where(lost, counting, 0)


@triton.jit
def store_row(statistics, mean, scale, slope, shift, smooth, live, mask, ACCUMULATOR: tl.constexpr):
    """The five row numbers; zeros for ignored rows. The centre is rounded to ACCUMULATOR, and what
    that loses of it goes into the shift: an offset of 1e4 on float32 logits costs no accuracy."""
    dtype = statistics.dtype.element_ty
    center = mean.to(ACCUMULATOR)
    shift = shift - slope * ((mean - center.to(tl.float64)) * scale)
    tl.store(statistics + CENTER, tl.where(live, center, 0.0).to(dtype), mask=mask)
    tl.store(statistics + INVERSE_SCALE, tl.where(live, scale, 0.0).to(dtype), mask=mask)
    tl.store(statistics + SLOPE, tl.where(live, slope, 0.0).to(dtype), mask=mask)
    tl.store(statistics + SHIFT, tl.where(live, shift, 0.0).to(dtype), mask=mask)
    tl.store(statistics + SMOOTH, tl.where(live, smooth, 0.0).to(dtype), mask=mask)


@triton.jit(debug=True, do_not_specialize=[
    "rows", "lead", "target_row_stride", "target_column_stride", "weight_row_stride", "weight_column_stride",
    "ignore_index", "parts", "row_stride", "classes", "part_columns",
])  # fmt: skip
def finish_rows(
    logits, target, target_weight, weight, partials, statistics, loss, block_sums,
    rows, classes, row_stride, lead, target_count, target_row_stride, target_column_stride,
    weight_row_stride, weight_column_stride, ignore_index, parts, part_columns,
    a: tl.float64, b: tl.float64, eps: tl.float64, smoothing: tl.float64,
    LOSS: tl.constexpr, LOG_OF: tl.constexpr, REDUCE: tl.constexpr, PEEL: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Row formulas: `statistics` of ROWS rows, and their losses (REDUCE 0) or the sums of their losses and row
    weights in block_sums[:, program]. Everything is float64 until stored. `debug` is what arms the assertion.
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)
    there = row < rows
    mean, m2, sum_log = merge_parts(
        partials, row, rows, classes, row_stride, lead, parts, part_columns, LOG_OF, PEEL, VECTOR, PARTS
    )
    columns = tl.full((), classes, tl.float64)
    a, b = tl.full((), a, tl.float64), tl.full((), b, tl.float64)
    eps, smoothing = tl.full((), eps, tl.float64), tl.full((), smoothing, tl.float64)
    counting = rows_that_count(
        target, target_weight, row, rows, target_count, target_row_stride, target_column_stride,
        weight_row_stride, weight_column_stride, ignore_index,
    )  # fmt: skip
    # The squares of float16 and float64 logits do not get too small for their accumulator.
    narrow: tl.constexpr = logits.dtype.element_ty == tl.float32 or logits.dtype.element_ty == tl.bfloat16
    lost = lost_rows(mean, m2, counting, columns, eps, LOSS, narrow)
    if tl.max(lost, 0) > 0:
        mean, m2 = in_float64(logits, lost, mean, m2, row, first_row, row_stride, classes, ROWS)
    scale = tl.full((ROWS,), 1.0, tl.float64)
    if LOSS == Z:
        sigma = tl.sqrt(m2 / columns + eps)
        # Equal logits and eps = 0, or one class: z and its gradient are 0.
        inverse = tl.where(sigma == 0, 0.0, 1 / tl.where(sigma == 0, 1.0, sigma))
        scale = tl.where(sigma * 0 + columns == 1, 0.0, inverse)
    elif LOSS != MSE_ONEHOT:
        # At the largest logits slope = 1/total is below float32, although slope * o is not.
        squares = sum_of_squares(mean, m2, columns) / columns
        huge = (squares > 1e30) & (squares < float("inf"))
        scale = tl.where(huge, tl.exp2(-tl.floor(0.5 * tl.log2(tl.where(huge, squares, 1.0)))), 1.0)
    zero = tl.zeros((ROWS,), tl.float64)
    row_loss, slope, shift, smooth, class_weights, counted = zero, zero, zero, zero, zero, zero
    row_statistics = statistics + row * (TARGET_GRADIENT + target_count)
    for j in range(target_count):
        index, counts, own = load_target(
            target, target_weight, row, rows, j, target_row_stride, target_column_stride,
            weight_row_stride, weight_column_stride, ignore_index,
        )  # fmt: skip
        inside = (index >= 0) & (index < classes)
        valid = inside | (index == ignore_index) | (row >= rows)
        tl.device_assert(valid, "pyops::spherical_loss: target must be in [0, classes) or ignore_index")
        counts = counts & inside
        o, class_weight = load_chosen(logits, weight, row, row_stride, index, counts)
        omega = tl.where(counts, own * class_weight, 0.0)
        loss_j, slope_j, shift_j, smooth_j, gradient = target_terms(
            o, omega, mean, m2, sum_log, scale, columns, a, b, eps, smoothing, LOSS
        )
        row_loss, slope, shift, smooth = row_loss + loss_j, slope + slope_j, shift + shift_j, smooth + smooth_j
        class_weights += class_weight
        counted += tl.where(counts, 1.0, 0.0)
        tl.store(row_statistics + TARGET_GRADIENT + j, gradient.to(statistics.dtype.element_ty), mask=there)
    live = counted > 0
    centre = mean if LOSS == Z else zero
    accumulator: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    store_row(row_statistics, centre, scale, slope, shift, smooth, live, there, accumulator)
    if REDUCE == 0:
        tl.store(loss + row, round_to(row_loss, loss.dtype.element_ty), mask=there)
    else:
        tl.store(block_sums + tl.program_id(0), tl.sum(row_loss, 0))
        row_weight = class_weights / tl.maximum(counted, 1.0)
        tl.store(block_sums + tl.num_programs(0) + tl.program_id(0), tl.sum(row_weight, 0))


# ----------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=[
    "rows", "lead", "target_row_stride", "target_column_stride", "grad_loss_stride", "statistics_stride",
    "column_blocks",
])  # fmt: skip
def logits_gradient(
    grad_loss, logits, target, statistics, normalizer, grad_logits, rows, classes, row_stride, grad_row_stride,
    lead, grad_loss_stride, target_count, target_row_stride, target_column_stride, statistics_stride,
    column_blocks, eps: tl.float64,
    LOSS: tl.constexpr, ACCUMULATOR: tl.constexpr, EVEN: tl.constexpr, PEEL: tl.constexpr, VECTOR: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d loss / d o_k = slope ((o_k - center) inverse_scale) + shift + smooth smooth_term(o_k)
                       + sum_j target_gradient_j [k = c_j],     slope to target_gradient times grad_loss / normalizer.

    One program per tile of the gradient, which it alone writes; `grad_logits` may be `logits`. Row numbers are
    scaled in float64, elements are worked on in ACCUMULATOR and rounded once. The product slope * inverse_scale is
    not formed: it can overflow float32 when the gradient does not. Rows whose row numbers are all 0 (ignored)
    get exact zeros and are not read unless they share a tile with others.
    """
    block = tl.program_id(0).to(tl.int64)
    first_row = block // column_blocks * ROWS
    row = first_row + tl.arange(0, ROWS)
    there = row < rows
    first = block % column_blocks * COLUMNS - row_skew(first_row, row_stride, lead, PEEL, VECTOR)
    scale = load_upstream(grad_loss, grad_loss_stride, row, rows) / tl.load(normalizer)
    numbers = statistics + row * statistics_stride
    center = tl.load(numbers + CENTER, mask=there, other=0).to(ACCUMULATOR)
    inverse_scale = tl.load(numbers + INVERSE_SCALE, mask=there, other=0).to(ACCUMULATOR)
    slope = scaled_statistic(tl.load(numbers + SLOPE, mask=there, other=0), scale, ACCUMULATOR)
    shift = scaled_statistic(tl.load(numbers + SHIFT, mask=there, other=0), scale, ACCUMULATOR)
    smooth = scaled_statistic(tl.load(numbers + SMOOTH, mask=there, other=0), scale, ACCUMULATOR)
    live = (inverse_scale != 0) | (slope != 0) | (shift != 0) | (smooth != 0)
    any_live = tl.max(live.to(tl.int32), 0) > 0

    _, mask, whole, _ = tile_mask(first, 0, classes, first_row, rows, EVEN, VECTOR, ROWS, COLUMNS)
    pointers = tile_pointers(logits, first_row, row_stride, first, EVEN or ROWS == 1, VECTOR, ROWS, COLUMNS)
    o = load_tile(pointers, mask & live[:, None], whole & any_live, 0.0, ACCUMULATOR)
    # Logits of 1e30 and more: o - center could overflow although its product with the scale does not.
    unit = tl.where(inverse_scale < 1e-30, 0.5**20, 1.0).to(ACCUMULATOR)
    center, inverse_scale = center * unit, inverse_scale / unit
    gradient = slope[:, None] * ((o * unit[:, None] - center[:, None]) * inverse_scale[:, None]) + shift[:, None]
    if LOSS != Z and LOSS != MSE_ONEHOT:  # noqa: SIM102  (decided at compile time)
        if tl.max((smooth != 0).to(tl.int32), 0) > 0:
            term = smooth_term(o, tl.full((), eps, tl.float64).to(ACCUMULATOR), LOSS)
            gradient += tl.where((smooth != 0)[:, None], smooth[:, None] * term, 0.0)
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
    if op == "spherical_loss":
        logits, target, target_weight, weight = arguments[:4]
        reasons = _common.common_reasons(logits, target, target_weight, weight)
        return reasons + _loss_reasons(arguments[4]) + _common.out_dtype_reasons(arguments[-1])
    grad_loss, logits, target, statistics, normalizer, loss, _eps = arguments
    reasons = _common.common_reasons(logits, target, grad_loss, statistics, normalizer) + _loss_reasons(loss)
    return reasons + (_common.in_place_reasons(logits) if op.endswith("_") else [])


def accumulator(logits: Tensor, loss: int):
    """The type in which a tile is worked on. The squared error near its minimum is a small difference of sums of
    squares, and its gradient one of logits: in float64 that costs conversions, hidden behind the memory."""
    if loss == MSE_ONEHOT.value and logits.dtype == torch.float32:
        return tl.float64
    return _common.accumulator(logits)


def _loss_reasons(loss: int) -> list[str]:
    return [] if 0 <= loss <= MSE_ONEHOT.value else [f"loss is {loss}; the Triton kernels know 0 to {MSE_ONEHOT.value}"]


def spherical_loss(
    logits: Tensor,
    target: Tensor,
    target_weight: Tensor | None,
    weight: Tensor | None,
    loss: int,
    a: float,
    b: float,
    eps: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    safe_mean: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, statistics, normalizer) of the op pyops::spherical_loss."""
    name = _checks.spherical_name(loss)
    _checks.spherical_options(name, a, b, eps)
    _checks.forward(name, logits, target, target_weight, weight, label_smoothing, reduction, out_dtype)
    _common.check_range(name, target, logits.size(1), ignore_index)
    logits = _common.rows_dense(logits)
    target, target_weight = _common.as_columns(target), _common.as_columns(target_weight)
    plan = _common.plan_rows(logits)
    tile = plan.tile
    rows, classes = logits.shape
    target_count = target.size(1)
    log_of = loss if label_smoothing and loss in (TAYLOR_SOFTMAX.value, SPHERICAL_SOFTMAX.value) else Z.value
    outputs = _common.allocate_outputs(
        logits, plan, TARGET_GRADIENT.value + target_count, reduction, out_dtype, z_term=False
    )
    partials = logits.new_empty((3 if log_of else 2, rows, plan.parts), dtype=torch.float64)
    walk = (rows, classes, logits.stride(0), plan.lead, target_count, *target.stride(),
            *_common.strides(target_weight), ignore_index)  # fmt: skip
    wide = accumulator(logits, loss)
    cut = {"LOG_OF": log_of, "PEEL": plan.peel, "VECTOR": plan.vector}
    with on_device_of(logits):
        _common.launch(
            row_moments, (plan.row_blocks, plan.parts),
            logits, target, target_weight, partials, *walk, plan.part_columns, eps,
            ACCUMULATOR=wide, EVEN=plan.even, PIVOT=min(PIVOT_COLUMNS, tile.columns),
            ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps, **cut,
            registers=255 if wide is tl.float64 else None,
        )  # fmt: skip
        _common.launch(
            finish_rows, (plan.finish_blocks,),
            logits, target, target_weight, None if weight is None else weight.contiguous(), partials,
            outputs.statistics, outputs.loss, outputs.block_sums, *walk, plan.parts, plan.part_columns,
            a, b, eps, label_smoothing,
            LOSS=loss, REDUCE=int(reduction != _common.REDUCE_NONE), ROWS=plan.finish_rows,
            PARTS=plan.part_capacity, num_warps=4, registers=128, **cut,
        )  # fmt: skip
        _common.finish_reduction(outputs, reduction, safe_mean)
    return outputs.loss, outputs.statistics, outputs.normalizer


def _write_gradient(grad_loss, logits, target, statistics, normalizer, loss, eps, grad_logits) -> None:
    """Into `grad_logits`, whose rows are dense like those of `logits` and which may be `logits`."""
    name = _checks.spherical_name(loss, "_backward")
    _checks.backward(name, grad_loss, logits, target, statistics, normalizer, TARGET_GRADIENT.value, 1)
    target, statistics = _common.as_columns(target), statistics.contiguous()
    plan = _common.plan_rows(logits)
    tile = plan.tile
    rows, classes = logits.shape
    grad_aligned = _common.grad_aligned(logits, grad_logits, plan)
    registers = _common.gradient_registers(logits, plan, grad_aligned, target.size(1))
    with on_device_of(logits):
        _common.launch(
            logits_gradient, (plan.row_blocks * plan.column_blocks,),
            grad_loss, logits, target, statistics, normalizer, grad_logits,
            rows, classes, logits.stride(0), grad_logits.stride(0), plan.lead,
            grad_loss.stride(0) if grad_loss.dim() else 0, target.size(1), *target.stride(), statistics.size(1),
            plan.column_blocks, eps,
            LOSS=loss, ACCUMULATOR=accumulator(logits, loss), EVEN=plan.even, PEEL=plan.peel,
            VECTOR=plan.vector, GRAD_ALIGNED=grad_aligned, ROWS=tile.rows,
            COLUMNS=tile.columns, num_warps=tile.num_warps, registers=registers,
        )  # fmt: skip


def spherical_loss_backward(grad_loss: Tensor, logits: Tensor, target: Tensor, statistics: Tensor,
                            normalizer: Tensor, loss: int, eps: float) -> Tensor:  # fmt: skip
    """grad_logits of the op pyops::spherical_loss_backward."""
    logits = _common.rows_dense(logits)
    grad_logits = logits.new_empty(logits.shape)
    _write_gradient(grad_loss, logits, target, statistics, normalizer, loss, eps, grad_logits)
    return grad_logits


def spherical_loss_backward_(grad_loss: Tensor, logits: Tensor, target: Tensor, statistics: Tensor,
                             normalizer: Tensor, loss: int, eps: float) -> None:  # fmt: skip
    """Overwrites the logits with their gradient: pyops::spherical_loss_backward_."""
    dense = _common.rows_dense(logits)
    _write_gradient(grad_loss, dense, target, statistics, normalizer, loss, eps, dense)
    if dense is not logits:
        logits.copy_(dense)
