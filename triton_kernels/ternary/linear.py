"""y = x_q (T gamma)^T + bias on packed weights, and its gradient with respect to x.

    total[m, n] = sum_k q[m, k] T[n, k];   y = float32(total) * (step[m] * gamma[n]) + bias[n], then the cast

q and step come from `quantize_activation`. Weights are read as t2 and decoded in registers (`_common`). Three ways:
  - up to four tokens: words of 16 weights against words of 4 activations, no matrix instruction, rows cut into parts;
  - more: int8 matrix products, the weights being the left operand (its tile is in registers already), again with rows
    cut into parts where tiles alone would leave the GPU idle;
  - activations that are not quantized: products of floats that hold -1, 0, 1 exactly, summed in float32.
Of the first two, codes T + 1 are multiplied and sum_k q taken off at the end. Parts are int32 sums, added up by one
more kernel: exact in any order. With a gamma per 256 in_features a step along the row is one group, whose integer is
scaled and added in float32 in the order of the row. Nothing in the order of float sums depends on the tokens.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyops.ternary import _checks
from pyops.ternary._formats import GROUP

from .._device import INTERPRETED, on_device_of, round_to
from . import _common, _configs
from ._common import SLABS, WANTED_PROGRAMS, add_product, codes, ternary
from ._configs import Config
from .linear_backward_input import ternary_linear_backward_input
from .quantize_activation import Quantized, quantize, slab_columns
from .repack import as_t2

__all__ = ["multiply", "reasons_against", "ternary_linear", "ternary_linear_backward_input"]

GROUP_BYTES = tl.constexpr(GROUP // 4)
FEW_TOKENS = 4
FEW_ROWS, FEW_WORDS = 32, 64  # a tile of the product of few tokens: 16 words (256 weights) for each of 128 threads
# One tile whatever the number of tokens: another could add in another order.
FLOAT_CONFIG = Config(rows=128, tokens=64, bytes=32, num_warps=4, num_stages=3)
FLOAT32_CONFIG = Config(rows=64, tokens=64, bytes=32, num_warps=4, num_stages=2)
FINISH_COLUMNS = 1024


# ------------------------------------------------------------------------------------------- device functions


@triton.jit
def tile_start(token_blocks, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """(rows, tokens) of the program's tile, tokens changing first: neighbours share the weights."""
    program = tl.program_id(0).to(tl.int64)
    n = program // token_blocks * ROWS + tl.arange(0, ROWS)
    m = program % token_blocks * TOKENS + tl.arange(0, TOKENS)
    return n, m


@triton.jit
def load_weights(pointers, first, byte, row_bytes, EVEN: tl.constexpr):
    """A step along the rows of packed weights; 0 beyond their end, where activations are 0 as well."""
    if EVEN:
        return tl.load(pointers + first)
    else:
        return tl.load(pointers + first, mask=(byte < row_bytes - first)[None, :], other=0)


@triton.jit
def load_per_token(pointer, m, tokens):
    return tl.load(pointer + m, mask=m < tokens, other=0)


@triton.jit
def load_bias(bias, n, out_features):
    return tl.load(bias + n, mask=n < out_features, other=0).to(tl.float32)


@triton.jit
def dot4(a, b, total):
    """total + the sum of the products of the four signed bytes of two words."""
    if INTERPRETED:
        for BYTE in tl.static_range(4):
            total += ((a << (24 - 8 * BYTE)) >> 24) * ((b << (24 - 8 * BYTE)) >> 24)
        return total
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )


# --------------------------------------------------------------------------------------------------- int8 kernels


@triton.jit(do_not_specialize=["tokens", "token_blocks", "part_steps"])
def multiply_quantized(
    packed, slabs, gamma, step, sums, bias, y, tokens, out_features, row_bytes, slab_columns, token_blocks,
    part_steps, gamma_stride,
    GROUPED: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """A tile of y, or with SPLIT a tile of one part's int32 sums in y [parts, tokens, out_features]."""
    n, m = tile_start(token_blocks, ROWS, TOKENS)
    byte = tl.arange(0, BYTES)
    # Rows and tokens beyond the end repeat the last one and are not stored.
    weights = packed + (tl.minimum(n, out_features - 1) * row_bytes)[:, None] + byte[None, :]
    tokens_at = slabs + (tl.minimum(m, tokens - 1) * (SLABS * slab_columns))[None, :] + byte[:, None]
    part = tl.program_id(1)
    begin = part * part_steps * BYTES
    total = tl.zeros((ROWS, TOKENS), tl.int32)
    result = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(begin, tl.minimum(begin + part_steps * BYTES, row_bytes), BYTES):
        tile = load_weights(weights, first, byte, row_bytes, EVEN)
        if GROUPED:
            total = tl.zeros((ROWS, TOKENS), tl.int32)
        for FIELD in tl.static_range(SLABS):
            q = tl.load(tokens_at + (FIELD * slab_columns + first))
            w = ternary(tile, FIELD) if GROUPED else codes(tile, FIELD)
            total = tl.dot(w, q, total, out_dtype=tl.int32)
        if GROUPED:
            place = gamma + n * gamma_stride + first // GROUP_BYTES
            result += total.to(tl.float32) * tl.load(place, mask=n < out_features, other=0)[:, None]
    mask = (n < out_features)[:, None] & (m < tokens)[None, :]
    offset = m[None, :] * out_features + n[:, None]
    if SPLIT:
        tl.store(y + part.to(tl.int64) * tokens * out_features + offset, total, mask=mask)
    else:
        scale = load_per_token(step, m, tokens)[None, :]
        if GROUPED:
            result = scale * result
        else:
            row_gamma = tl.load(gamma + n * gamma_stride, mask=n < out_features, other=0)
            total -= load_per_token(sums, m, tokens)[None, :]
            result = total.to(tl.float32) * (scale * row_gamma[:, None])
        if bias is not None:
            result += load_bias(bias, n, out_features)[:, None]
        tl.store(y + offset, round_to(result, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "part_steps"])
def multiply_few(
    packed, slabs, parts, tokens, out_features, row_words, slab_words, part_steps,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """int32 sums of one part of ROWS rows for all tokens; weights and slabs as words of four bytes."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, TOKENS).to(tl.int64)
    word = tl.arange(0, WORDS)
    weights = packed + (tl.minimum(n, out_features - 1) * row_words)[None, :, None] + word[None, None, :]
    tokens_at = slabs + (tl.minimum(m, tokens - 1) * (SLABS * slab_words))[:, None, None] + word[None, None, :]
    part = tl.program_id(1)
    begin = part * part_steps * WORDS
    total = tl.zeros((TOKENS, ROWS, WORDS), tl.int32)
    for first in range(begin, tl.minimum(begin + part_steps * WORDS, row_words), WORDS):
        there = (word < row_words - first)[None, None, :]
        tile = tl.load(weights + first, mask=there, other=0)
        for FIELD in tl.static_range(SLABS):
            q = tl.load(tokens_at + (FIELD * slab_words + first), mask=there, other=0)
            total = dot4((tile >> (2 * FIELD)) & 0x03030303, q, total)
    offset = (part.to(tl.int64) * tokens + m)[:, None] * out_features + n[None, :]
    mask = (m < tokens)[:, None] & (n < out_features)[None, :]
    tl.store(parts + offset, tl.sum(total, 2), mask=mask)


@triton.jit(do_not_specialize=["tokens", "column_blocks", "part_count"])
def finish_parts(
    parts, gamma, step, sums, bias, y, tokens, out_features, column_blocks, part_count, gamma_stride,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of COLUMNS out_features of one token and scales them."""
    program = tl.program_id(0).to(tl.int64)
    m = program // column_blocks
    n = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = n < out_features
    total = tl.zeros((COLUMNS,), tl.int32)
    for part in range(part_count):
        total += tl.load(parts + (tl.cast(part, tl.int64) * tokens + m) * out_features + n, mask=inside, other=0)
    total -= tl.load(sums + m)
    result = total.to(tl.float32) * (tl.load(step + m) * tl.load(gamma + n * gamma_stride, mask=inside, other=0))
    if bias is not None:
        result += load_bias(bias, n, out_features)
    tl.store(y + m * out_features + n, round_to(result, y.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------------------------------------- float kernel


@triton.jit(do_not_specialize=["tokens", "token_blocks"])
def multiply_floats(
    packed, slabs, gamma, bias, y, tokens, out_features, row_bytes, slab_columns, token_blocks, gamma_stride,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, PIECES: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """A tile of y from activations in slabs of their own dtype. Grouped, each step is scaled: half a group."""
    n, m = tile_start(token_blocks, ROWS, TOKENS)
    byte = tl.arange(0, BYTES)
    weights = packed + (tl.minimum(n, out_features - 1) * row_bytes)[:, None] + byte[None, :]
    tokens_at = slabs + (tl.minimum(m, tokens - 1) * (SLABS * slab_columns))[:, None] + byte[None, :]
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    result = tl.zeros((TOKENS, ROWS), tl.float32)
    for first in range(0, row_bytes, BYTES):
        tile = load_weights(weights, first, byte, row_bytes, EVEN)
        if GROUPED:
            total = tl.zeros((TOKENS, ROWS), tl.float32)
        for FIELD in tl.static_range(SLABS):
            x = tl.load(tokens_at + (FIELD * slab_columns + first))
            total = add_product(total, x, tl.trans(ternary(tile, FIELD)), PIECES)
        if GROUPED:
            place = gamma + n * gamma_stride + first // GROUP_BYTES
            result += total * tl.load(place, mask=n < out_features, other=0)[None, :]
    if not GROUPED:
        result = total * tl.load(gamma + n * gamma_stride, mask=n < out_features, other=0)[None, :]
    if bias is not None:
        result += load_bias(bias, n, out_features)[None, :]
    mask = (m < tokens)[:, None] & (n < out_features)[None, :]
    tl.store(y + m[:, None] * out_features + n[None, :], round_to(result, y.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------- launchers


def reasons_against(op: str, tokens: Tensor, *_) -> list[str]:
    """Why a launcher of this file cannot serve these arguments; empty when it can."""
    return _common.device_reasons(tokens)


def _parts(blocks: int, steps: int, wanted: int, most: int) -> int:
    """Steps of one part of a row, so that about `wanted` programs run and there are at most `most` parts."""
    parts = max(1, min(triton.cdiv(wanted, blocks), steps, most))
    return triton.cdiv(steps, parts)


def _finish(parts: Tensor, q: Quantized, gamma: Tensor, bias: Tensor | None, y: Tensor) -> None:
    tokens, out_features = y.shape
    column_blocks = triton.cdiv(out_features, FINISH_COLUMNS)
    _common.launch(
        finish_parts, (tokens * column_blocks,),
        parts, gamma, q.step, q.sums, bias, y, tokens, out_features, column_blocks, parts.size(0), gamma.dim(),
        COLUMNS=FINISH_COLUMNS, num_warps=4, registers=64,
    )  # fmt: skip


def _multiply_few(packed: Tensor, q: Quantized, gamma: Tensor, bias: Tensor | None, y: Tensor) -> None:
    tokens, out_features = y.shape
    words, slabs = packed.view(torch.int32), q.slabs.view(torch.int32)
    row_blocks, steps = triton.cdiv(out_features, FEW_ROWS), triton.cdiv(words.size(1), FEW_WORDS)
    part_steps = _parts(row_blocks, steps, WANTED_PROGRAMS // 2, steps)
    parts = y.new_empty((triton.cdiv(steps, part_steps), tokens, out_features), dtype=torch.int32)
    _common.launch(
        multiply_few, (row_blocks, parts.size(0)),
        words, slabs, parts, tokens, out_features, words.size(1), slabs.size(2), part_steps,
        TOKENS=triton.next_power_of_2(tokens), ROWS=FEW_ROWS, WORDS=FEW_WORDS, num_warps=4,
    )  # fmt: skip
    _finish(parts, q, gamma, bias, y)


def _multiply_tiles(packed: Tensor, q: Quantized, gamma: Tensor, bias: Tensor | None, y: Tensor, tile: Config) -> None:
    tokens, out_features = y.shape
    row_bytes, grouped = packed.size(1), gamma.dim() == 2
    token_blocks = triton.cdiv(tokens, tile.tokens)
    blocks, steps = triton.cdiv(out_features, tile.rows) * token_blocks, triton.cdiv(row_bytes, tile.bytes)
    # A part should be worth writing its sums: at least four steps.
    part_steps = steps if grouped else _parts(blocks, steps, WANTED_PROGRAMS // 4, max(steps // 4, 1))
    count = triton.cdiv(steps, max(part_steps, 1)) or 1
    parts = y.new_empty((count, tokens, out_features), dtype=torch.int32) if count > 1 else None
    _common.launch(
        multiply_quantized, (blocks, count),
        packed, q.slabs, gamma, q.step, q.sums, bias, y if parts is None else parts, tokens, out_features, row_bytes,
        q.slabs.size(2), token_blocks, part_steps, gamma.size(1) if grouped else gamma.dim(),
        GROUPED=grouped, SPLIT=parts is not None, EVEN=row_bytes % tile.bytes == 0,
        ROWS=tile.rows, TOKENS=tile.tokens, BYTES=tile.bytes, num_warps=tile.num_warps, num_stages=tile.num_stages,
        registers=255,
    )  # fmt: skip
    if parts is not None:
        _finish(parts, q, gamma, bias, y)


def _in_slabs(x: Tensor) -> Tensor:
    """Activations as they are, [tokens, 4, slab_columns] with zeros at the end."""
    slabs = x.new_zeros((x.size(0), slab_columns(x.size(1)), SLABS.value))
    slabs.flatten(1)[:, : x.size(1)] = x
    return slabs.transpose(1, 2).contiguous()


def _multiply_floats(x: Tensor, packed: Tensor, gamma: Tensor, bias: Tensor | None, y: Tensor) -> None:
    tokens, out_features = y.shape
    row_bytes, grouped = packed.size(1), gamma.dim() == 2
    wide = x.dtype == torch.float32
    tile = FLOAT32_CONFIG if wide else FLOAT_CONFIG
    slabs = _in_slabs(x)
    token_blocks = triton.cdiv(tokens, tile.tokens)
    _common.launch(
        multiply_floats, (triton.cdiv(out_features, tile.rows) * token_blocks,),
        packed, slabs, gamma, bias, y, tokens, out_features, row_bytes, slabs.size(2), token_blocks,
        gamma.size(1) if grouped else gamma.dim(),
        GROUPED=grouped, EVEN=row_bytes % tile.bytes == 0, PIECES=3 if wide else 0,
        ROWS=tile.rows, TOKENS=tile.tokens, BYTES=tile.bytes, num_warps=tile.num_warps, num_stages=tile.num_stages,
        registers=255,
    )  # fmt: skip


def multiply(
    x: Tensor, packed: Tensor, gamma: Tensor, bias: Tensor | None, act_bits: int, qmax: int, eps: float,
    out_dtype: torch.dtype, keep: bool,
) -> tuple[Tensor, Quantized | None]:  # fmt: skip
    """(y, the tokens in 8 bits), from t2; `keep` asks for them as they lie in x too. None if they were not rounded."""
    y = x.new_empty((x.size(0), packed.size(0)), dtype=out_dtype)
    gamma, bias = gamma.contiguous(), None if bias is None else bias.contiguous()
    with on_device_of(x):
        if act_bits == 0:
            if y.numel():
                _multiply_floats(x, packed, gamma, bias, y)
            return y, None
        q = quantize(x, qmax, eps, natural=keep, slabs=True)
        if y.numel():
            in_words = packed.size(1) % 4 == 0 and packed.data_ptr() % 4 == 0 and packed.storage_offset() % 4 == 0
            if x.size(0) <= FEW_TOKENS and gamma.dim() < 2 and in_words and packed.size(1):
                _multiply_few(packed, q, gamma, bias, y)
            else:
                run = functools.partial(_multiply_tiles, packed, q, gamma, bias, y)
                grouped = gamma.dim() == 2
                run(_configs.GROUPED if grouped else _configs.choose(x.device, *y.shape, x.size(1), run))
    return y, q


def ternary_linear(
    x: Tensor, packed: Tensor, gamma: Tensor, bias: Tensor | None, form: int, out_features: int, in_features: int,
    act_bits: int, qmax: int, eps: float, out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """y of the op pyops::ternary_linear."""
    _checks.linear(x, packed, gamma, bias, form, out_features, in_features, act_bits, qmax, eps, out_dtype)
    weights = as_t2("ternary_linear", packed, form, out_features, in_features)
    return multiply(x, weights, gamma, bias, act_bits, qmax, eps, out_dtype or x.dtype, keep=False)[0]
