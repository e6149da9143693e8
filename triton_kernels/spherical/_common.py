"""What the kernels of the spherical family share: tiles, the walk over a row, targets, the last reduction.

Every forward is three launches:
  1. a streaming kernel, the only one that reads all logits: one program per (block of rows, part of the columns)
     leaves a few float64 numbers per row and part;
  2. a finishing kernel, one lane per (row, part): merges the parts, gathers the target logits, applies the row
     formula in float64, writes `statistics` and either the row losses or one partial sum per program;
  3. `reduce_blocks`, one program: adds the partial sums of step 2 (not for reduction 'none').
The row formulas stay out of step 1 because there every thread of a program would repeat them: at 4096 classes
that is as much work as the streaming itself. Every sum is taken in an order that shapes and alignment alone
decide, and there are no atomics: equal calls give equal bits.

Vector access. A row of 50257 bfloat16 starts anywhere relative to the 16 bytes that a thread wants to load at
once. Long rows are therefore cut at 16-byte boundaries of memory, not at multiples of the tile ("peeled"): all
tiles but the first and the last of a row are then loaded without a mask and with full vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyops._autograd import reject

from .._device import INTERPRETED, round_to

REDUCE_NONE, REDUCE_MEAN, REDUCE_SUM = 0, 1, 2
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# --------------------------------------------------------------------------------------------------- sizes


class Tile(NamedTuple):
    """The block of logits that a streaming program holds in registers at a time."""

    rows: int
    columns: int
    num_warps: int


def configs(dtype: torch.dtype) -> tuple[Tile, ...]:
    """All tiles shipped for logits of a dtype, narrowest first; a row longer than the last one is walked.

    A thread of the long tile holds 32 elements of the 16-bit types or 16 of the wider ones: four 16-byte loads in
    flight (eight for float64). The others are bound by what surrounds the loads rather than by the loads; tiles of
    several rows need an address per element when rows are not 16-byte vectors, so a thread gets 8 elements there.
    """
    warps = 1 if dtype.itemsize == 2 else 2
    return (
        Tile(rows=16, columns=64, num_warps=4),
        Tile(rows=4, columns=256, num_warps=4),
        Tile(rows=1, columns=1024, num_warps=2 * warps),
        Tile(rows=1, columns=4096, num_warps=4 * warps),
    )


# A finishing program handles this many (row, part) pairs: 128 rows of one part, or 8 of 16, or one of 128 or 1024.
FINISH_LANES = 128
PART_CAPACITIES = (1, 16, 128, 1024)
# A row is cut into parts until this many streaming programs exist: eight on each of 132 multiprocessors. A
# constant, so that results do not depend on the model of the GPU.
WANTED_PROGRAMS = 1056
REDUCE_LANES = 1024
TINY_ROW = 4  # as in csrc/spherical/tiny_row.h


class Plan(NamedTuple):
    """How one call is shared out among programs."""

    tile: Tile
    even: bool  # rows start at 16-byte boundaries and are whole vectors long
    peel: bool  # rows are cut at 16-byte boundaries of memory
    vector: int  # elements in 16 bytes
    lead: int  # elements between a 16-byte boundary and logits[0, 0]
    row_blocks: int
    column_blocks: int  # tiles along a row
    parts: int  # programs that share a row in the forward
    part_columns: int
    part_capacity: int
    finish_rows: int  # rows of one finishing program
    finish_blocks: int


def plan_rows(logits: Tensor) -> Plan:
    rows, classes = logits.shape
    tiles = configs(logits.dtype)
    tile = next((tile for tile in tiles if classes <= tile.columns), tiles[-1])
    vector = 16 // logits.element_size()
    lead = logits.data_ptr() % 16 // logits.element_size()
    aligned = lead == 0 and (logits.stride(0) % vector == 0 or rows <= 1)
    # A tile of several rows cannot be shifted for each of them; its rows are short, so it gives up the vectors.
    peel = tile.rows == 1 and not aligned
    row_blocks = triton.cdiv(rows, tile.rows)
    # A peeled row may begin anywhere within its first vector.
    column_blocks = triton.cdiv(classes + (vector - 1 if peel else 0), tile.columns)
    # At least two tiles per part: a part costs one more pass of the merge.
    parts = min(triton.cdiv(WANTED_PROGRAMS, max(row_blocks, 1)), triton.cdiv(column_blocks, 2), PART_CAPACITIES[-1])
    tiles_per_part = triton.cdiv(column_blocks, max(parts, 1))
    parts = max(triton.cdiv(column_blocks, max(tiles_per_part, 1)), 1)
    capacity = next(capacity for capacity in PART_CAPACITIES if parts <= capacity)
    finish_rows = max(FINISH_LANES // capacity, 1)
    return Plan(
        tile=tile,
        even=aligned and classes % vector == 0,
        peel=peel,
        vector=vector,
        lead=lead,
        row_blocks=row_blocks,
        column_blocks=column_blocks,
        parts=parts,
        part_columns=max(tiles_per_part, 1) * tile.columns,
        part_capacity=capacity,
        finish_rows=finish_rows,
        finish_blocks=triton.cdiv(rows, finish_rows),
    )


# ---------------------------------------------------------------------------------- device functions: the walk


@triton.jit
def row_skew(row, row_stride, lead, PEEL: tl.constexpr, VECTOR: tl.constexpr):
    """Elements from the 16-byte boundary before the row to its start; 0 where rows are not peeled."""
    if PEEL:
        return (row * row_stride + lead) % VECTOR
    else:
        return row * 0


@triton.jit
def part_span(part, skew, part_columns, classes):
    """[start, stop) of the columns of a part of a row, cut at 16-byte boundaries; may be empty for the last one."""
    start = tl.maximum(part * part_columns - skew, 0)
    stop = tl.minimum((part + 1) * part_columns - skew, classes)
    return start, tl.maximum(stop, start)


@triton.jit
def tile_mask(first, start, stop, first_row, rows, EVEN: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
              COLUMNS: tl.constexpr):  # fmt: skip
    """For the tile of columns [first, first + COLUMNS): which columns are inside [start, stop), the same as a mask
    of the tile, whether that is all of it, and how many columns are inside.

    Lanes are compared in int32 with bounds relative to the tile: columns themselves may need 64 bits, and the
    compiler proves a mask constant over a 16-byte vector only in this form."""
    lane = tl.arange(0, COLUMNS)
    low = tl.minimum(tl.maximum(start - first, 0), COLUMNS).to(tl.int32)
    high = tl.maximum(tl.minimum(stop - first, COLUMNS), 0).to(tl.int32)
    if EVEN:
        low = tl.multiple_of(low, VECTOR)
        high = tl.multiple_of(high, VECTOR)
    inside = (lane >= low) & (lane < high)
    row = first_row + tl.arange(0, ROWS)
    mask = inside[None, :] & (row < rows)[:, None]
    whole = (low == 0) & (high == COLUMNS) & (first_row + ROWS <= rows)
    return inside, mask, whole, tl.maximum(high - low, 0)


@triton.jit
def tile_pointers(base, first_row, row_stride, first, ALIGNED: tl.constexpr, VECTOR: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Pointers to columns [first, first + COLUMNS) of ROWS rows. ALIGNED promises what the compiler cannot see:
    every row of the tile starts at a 16-byte boundary. For a tile of one row, peeling sees to that."""
    lane = tl.arange(0, COLUMNS)
    if ROWS == 1:
        begin = base + (first_row * row_stride + first)
        if ALIGNED:
            begin = tl.multiple_of(begin, 16)
        return begin + lane[None, :]
    else:
        offset = (first_row + tl.arange(0, ROWS)) * row_stride + first
        if ALIGNED:
            offset = tl.multiple_of(offset, VECTOR)
        return base + offset[:, None] + lane[None, :]


@triton.jit
def load_tile(pointers, mask, whole, FILL: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """A tile in the accumulator's type, FILL outside the mask. Whole tiles take the branch without a mask, which
    loads 16 bytes at a time whatever the bounds of the row are."""
    if whole:
        tile = tl.load(pointers).to(ACCUMULATOR)
    else:
        tile = tl.where(mask, tl.load(pointers, mask=mask, other=0).to(ACCUMULATOR), FILL)
    return tile


@triton.jit
def store_tile(pointers, tile, mask, whole):
    """Rounds to the type of the output here and nowhere earlier."""
    rounded = round_to(tile, pointers.dtype.element_ty)
    if whole:
        tl.store(pointers, rounded)
    else:
        tl.store(pointers, rounded, mask=mask)


# -------------------------------------------------------------------------------- device functions: the targets


@triton.jit
def load_target(target, target_weight, row, rows, j, target_row_stride, target_column_stride,
                weight_row_stride, weight_column_stride, ignore_index):  # fmt: skip
    """Target j of each row: (class index, whether it counts, its own weight in float64 and 0 where it does not).
    The index of a target that does not count may be anything; it must not be used for an address."""
    there = row < rows
    j = tl.cast(j, tl.int64)
    index = tl.load(target + row * target_row_stride + j * target_column_stride, mask=there, other=0).to(tl.int64)
    counts = there & (index != ignore_index)
    own = tl.full(row.shape, 1.0, tl.float64)
    if target_weight is not None:
        place = row * weight_row_stride + j * weight_column_stride
        own = widen(tl.load(target_weight + place, mask=there, other=0))
        counts = counts & (own != 0)
    return index, counts, tl.where(counts, own, 0.0)


@triton.jit
def widen(value):
    """To float64; from bfloat16 by way of float32, the only cast from it that the interpreter does right."""
    if value.dtype == tl.float64:
        return value
    else:
        return value.to(tl.float32).to(tl.float64)


@triton.jit
def load_chosen(logits, weight, row, row_stride, index, counts):
    """(logit, class weight) of a target of each row in float64; 0 where it does not count."""
    o = widen(tl.load(logits + row * row_stride + index, mask=counts, other=0))
    class_weight = tl.where(counts, 1.0, 0.0).to(tl.float64)
    if weight is not None:
        class_weight = widen(tl.load(weight + index, mask=counts, other=0))
    return o, class_weight


@triton.jit
def rows_that_count(target, target_weight, row, rows, target_count, target_row_stride, target_column_stride,
                    weight_row_stride, weight_column_stride, ignore_index):  # fmt: skip
    """1 for rows with a target that counts, 0 for ignored ones. A program without any reads no logits."""
    found = tl.zeros(row.shape, tl.int32)
    for j in range(target_count):
        _, counts, _ = load_target(
            target, target_weight, row, rows, j, target_row_stride, target_column_stride,
            weight_row_stride, weight_column_stride, ignore_index,
        )  # fmt: skip
        found = tl.where(counts, 1, found)
    return found


@triton.jit
def add_target_gradients(
    gradient, target, statistics, scale, row, rows, first, target_count, target_row_stride, target_column_stride,
    statistics_stride, COLUMN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds the target gradients (statistics columns COLUMN, COLUMN + 1, ...) that fall into the tile, before it is
    rounded: targets of one row may coincide. A target that does not count has gradient 0 and any index."""
    lane = tl.arange(0, COLUMNS)
    there = row < rows
    for j in range(target_count):
        j = tl.cast(j, tl.int64)
        place = target + row * target_row_stride + j * target_column_stride
        index = tl.load(place, mask=there, other=0).to(tl.int64)
        value = tl.load(statistics + row * statistics_stride + COLUMN + j, mask=there, other=0)
        inside = there & (value != 0) & (index >= first) & (index < first + COLUMNS)
        if tl.max(inside.to(tl.int32), 0) > 0:
            scaled = tl.where(inside, value.to(tl.float64) * scale, 0.0).to(gradient.dtype)
            local = tl.where(inside, index - first, -1).to(tl.int32)
            gradient += tl.where(lane[None, :] == local[:, None], scaled[:, None], 0.0)
    return gradient


@triton.jit
def load_upstream(grad_loss, grad_loss_stride, row, rows):
    """Upstream gradient of each row in float64; stride 0 repeats a scalar."""
    return widen(tl.load(grad_loss + row * grad_loss_stride, mask=row < rows, other=0))


@triton.jit
def scaled_statistic(statistic, scale, dtype: tl.constexpr):
    """statistic * scale, and 0 for 0 even where scale is 0/0 (the mean of an empty batch)."""
    return tl.where(statistic == 0, 0.0, statistic.to(tl.float64) * scale).to(dtype)


# -------------------------------------------------------------------------------------------- the last reduction


@triton.jit
def block_total(block_sums, blocks, LANES: tl.constexpr):
    """Sum of `blocks` float64 numbers in an order that depends on nothing else."""
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.float64)
    for first in range(0, blocks, LANES):
        total += tl.load(block_sums + first + lane, mask=first + lane < blocks, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["blocks"])
def reduce_blocks(block_sums, loss, z_term, normalizer, blocks,
                  MEAN: tl.constexpr, SAFE: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """loss = sum_p numerator_p / denominator_p over one or two parts; the second part alone goes to `z_term`.

    One program. `block_sums` holds per part a row of numerators and a row of denominators, one entry per program
    of the finishing kernel, all float64. Denominators count for MEAN only; what was divided by goes to
    `normalizer` (1 in place of an empty denominator when SAFE, as the loss is then 0).
    """
    total = tl.zeros((), tl.float64)
    for part in tl.static_range(1 if z_term is None else 2):
        value = block_total(block_sums + (2 * part) * tl.cast(blocks, tl.int64), blocks, LANES)
        divisor = tl.full((), 1.0, tl.float64)
        if MEAN:
            divisor = block_total(block_sums + (2 * part + 1) * tl.cast(blocks, tl.int64), blocks, LANES)
            if SAFE:
                value = tl.where(divisor == 0, 0.0, value)
                divisor = tl.where(divisor == 0, 1.0, divisor)
            value = value / divisor
        tl.store(normalizer + part, divisor)
        if part == 1:
            tl.store(z_term, round_to(value, z_term.dtype.element_ty))
        total += value
    tl.store(loss, round_to(total, loss.dtype.element_ty))


# --------------------------------------------------------------------------------------------------- launchers


def launch(kernel, grid, *arguments, num_warps: int, registers: int | None = None, **constants) -> None:
    """Starts a kernel unless its grid is empty. Options are spelled out because Triton versions differ in their
    defaults: fusing multiply and add is wanted; checks for integer overflow, which come with device asserts, are not.

    `registers`: the assembler aims at a number of registers of its own and, for some variants, spills one or two
    values to meet it. Where occupancy is no concern, a stated limit makes it use what it needs up to that.
    """
    if grid[0]:
        kernel[grid](
            *arguments,
            **constants,
            num_warps=num_warps,
            num_stages=1,
            maxnreg=registers,
            enable_fp_fusion=True,
            sanitize_overflow=False,
        )


def check_range(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """What the device assertion of the finishing kernels says on a GPU; the interpreter drops assertions."""
    if not INTERPRETED.value or target.is_meta:
        return
    bad = ((target != ignore_index) & ((target < 0) | (target >= classes))).nonzero().tolist()
    if bad:
        rule = f"be in [0, {classes}) or ignore_index {ignore_index}"
        reject(op, "target", rule, f"{int(target[tuple(bad[0])])} at position {bad[0]}", IndexError)


def accumulator(logits: Tensor):
    """The type in which a tile of logits is worked on. The terms of rows of a few logits cancel to what rounding to
    float32 would hide."""
    return tl.float64 if logits.dtype == torch.float64 or logits.size(1) <= TINY_ROW else tl.float32


def rows_dense(logits: Tensor) -> Tensor:
    """Rows may lie anywhere; their elements must be neighbours."""
    return logits if logits.stride(1) == 1 or logits.size(1) <= 1 else logits.contiguous()


def as_columns(tensor: Tensor | None) -> Tensor | None:
    """Targets (or their weights) as rows x K."""
    return tensor if tensor is None or tensor.dim() == 2 else tensor.unsqueeze(1)


def strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


class Outputs(NamedTuple):
    """What a forward allocates for its results."""

    loss: Tensor
    z_term: Tensor | None
    statistics: Tensor
    normalizer: Tensor
    block_sums: Tensor  # partial sums of the finishing programs; empty for reduction 'none'


def allocate_outputs(logits: Tensor, plan: Plan, width: int, reduction: int, out_dtype: torch.dtype | None,
                     z_term: bool) -> Outputs:  # fmt: skip
    rows = logits.size(0)
    shape = (rows,) if reduction == REDUCE_NONE else ()
    loss = logits.new_empty(shape, dtype=out_dtype or logits.dtype)
    return Outputs(
        loss=loss,
        z_term=torch.empty_like(loss) if z_term else None,
        statistics=logits.new_empty((rows, width), dtype=torch.float64),
        normalizer=logits.new_ones((2,) if z_term else (), dtype=torch.float64),
        block_sums=logits.new_empty(
            (4 if z_term else 2, 0 if reduction == REDUCE_NONE else plan.finish_blocks), dtype=torch.float64
        ),
    )


def finish_reduction(outputs: Outputs, reduction: int, safe_mean: bool) -> None:
    if reduction == REDUCE_NONE:
        return
    launch(
        reduce_blocks, (1,),
        outputs.block_sums, outputs.loss, outputs.z_term, outputs.normalizer, outputs.block_sums.size(1),
        MEAN=reduction == REDUCE_MEAN, SAFE=safe_mean, LANES=REDUCE_LANES, num_warps=4,
    )  # fmt: skip


def grad_aligned(logits: Tensor, grad_logits: Tensor, plan: Plan) -> bool:
    """Whether rows of tiles that start at 16-byte boundaries of the logits do so in their gradient as well."""
    if plan.tile.rows > 1 and not plan.even:
        return False
    if grad_logits.data_ptr() % 16 // grad_logits.element_size() != plan.lead:
        return False
    return logits.size(0) <= 1 or (logits.stride(0) - grad_logits.stride(0)) % plan.vector == 0


def gradient_registers(logits: Tensor, plan: Plan, aligned: bool, target_count: int) -> int | None:
    """The limit for a backward (see `launch`): none where occupancy decides, on long rows with one target."""
    return None if plan.tile == configs(logits.dtype)[-1] and aligned and target_count == 1 else 255


# ---------------------------------------------------------------------------------------------------- support


def common_reasons(logits: Tensor, target: Tensor, *others: Tensor | None) -> list[str]:
    reasons = []
    if logits.dtype not in FLOATING:
        reasons.append(f"logits are {logits.dtype}; the Triton kernels take float64, float32, bfloat16 and float16")
    if target.dtype not in (torch.int64, torch.int32):
        reasons.append(f"target is {target.dtype}; the Triton kernels take int64 and int32")
    for tensor in (logits, target, *others):
        if tensor is not None and tensor.device != logits.device:
            reasons.append(f"tensors are on {tensor.device} and {logits.device}")
    if logits.is_cuda:
        if not INTERPRETED.value and torch.cuda.get_device_capability(logits.device) < (8, 0):
            reasons.append("the Triton kernels are built for compute capability 8.0 and later")
    elif logits.device.type != "cpu" or not INTERPRETED.value:
        reasons.append(f"logits are on {logits.device}; Triton runs on CUDA, or anywhere under TRITON_INTERPRET=1")
    return reasons


def out_dtype_reasons(out_dtype: torch.dtype | None) -> list[str]:
    if out_dtype is None or out_dtype in FLOATING:
        return []
    return [f"out_dtype is {out_dtype}; the Triton kernels write float64, float32, bfloat16 and float16"]


def in_place_reasons(logits: Tensor) -> list[str]:
    """Distinct addresses: the wider stride must step over everything that the narrower one reaches."""
    spans = sorted((stride, size) for size, stride in zip(logits.shape, logits.stride(), strict=True) if size > 1)
    reach = 1
    for stride, size in spans:
        if stride < reach:
            return [f"logits overlap in memory (strides {logits.stride()}) and cannot be overwritten"]
        reach += stride * (size - 1)
    return []
