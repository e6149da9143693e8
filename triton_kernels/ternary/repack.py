"""From one packed format to another, and the search for codes that stand for no weight.

One program per (block row, run of bytes) of the result; for each place in a byte it finds the weight (n, k) that lies
there, and that weight's byte and place in the source. Formats and the order of their blocks are those of
csrc/ternary/ternary_format.h: a format is block rows of `block_rows` rows, each a run of blocks of `block_bytes`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyops.ternary import _checks
from pyops.ternary._formats import FORMATS, packed_dtype, packed_shape

from .._device import on_device_of
from . import _common

INT8 = tl.constexpr(FORMATS.index("int8"))
T2 = tl.constexpr(FORMATS.index("t2"))
T5 = tl.constexpr(FORMATS.index("t5"))
T2X16 = tl.constexpr(FORMATS.index("t2x16"))
T5X16 = tl.constexpr(FORMATS.index("t5x16"))
T2MMA = tl.constexpr(FORMATS.index("t2mma"))

BYTES = 1024


# ----------------------------------------------------------------------------------- where a weight lies


@triton.constexpr_function
def digits(FORM):
    """Weights in a byte."""
    if FORM == INT8:
        return 1
    return 5 if FORM in (T5, T5X16) else 4


@triton.constexpr_function
def power(FORM, DIGIT):
    """What a digit is multiplied by."""
    return 3**DIGIT if FORM in (T5, T5X16) else 4**DIGIT


@triton.constexpr_function
def block_rows(FORM):
    return 16 if FORM in (T2X16, T5X16, T2MMA) else 1


@triton.jit
def row_bytes(FORM: tl.constexpr, in_features):
    """Bytes of a block row."""
    if FORM == INT8:
        return in_features
    elif FORM == T2:
        return tl.cdiv(in_features, 4)
    elif FORM == T5:
        return tl.cdiv(in_features, 5)
    elif FORM == T2X16:
        return tl.cdiv(in_features, 16) * 64
    elif FORM == T5X16:
        return tl.cdiv(in_features, 20) * 64
    else:
        return tl.cdiv(in_features, 128) * 512


@triton.jit
def weight_at(FORM: tl.constexpr, byte, DIGIT: tl.constexpr):
    """(row in its block row, k) of a digit of a byte of a block row."""
    if FORM == INT8:
        return byte * 0, byte
    elif FORM == T2:
        return byte * 0, byte * 4 + DIGIT
    elif FORM == T5:
        return byte * 0, byte * 5 + DIGIT
    elif FORM == T2X16:
        return (byte >> 2) & 15, (byte >> 6) * 16 + DIGIT * 4 + (byte & 3)
    elif FORM == T5X16:
        return (byte >> 2) & 15, (byte >> 6) * 20 + DIGIT * 4 + (byte & 3)
    else:
        lane = (byte >> 4) & 31
        k = (byte >> 9) * 128 + ((byte >> 2) & 3) * 32 + DIGIT // 2 * 16 + (lane & 3) * 4 + (byte & 3)
        return (lane >> 2) + DIGIT % 2 * 8, k


@triton.jit
def place_of(FORM: tl.constexpr, row, k):
    """(byte in its block row, digit) of weight k of a row of a block row."""
    if FORM == INT8:
        return k, k * 0
    elif FORM == T2:
        return k >> 2, k & 3
    elif FORM == T5:
        return k // 5, k % 5
    elif FORM == T2X16:
        return (k >> 4) * 64 + row * 4 + (k & 3), (k >> 2) & 3
    elif FORM == T5X16:
        return k // 20 * 64 + row * 4 + (k & 3), k % 20 // 4
    else:
        lane = (row & 7) * 4 + ((k >> 2) & 3)
        return (k >> 7) * 512 + lane * 16 + ((k >> 5) & 3) * 4 + (k & 3), (row >> 3) + ((k >> 4) & 1) * 2


@triton.jit
def decoded(FORM: tl.constexpr, value, digit):
    """The code at a digit of a byte: 0, 1 or 2, or something else where the byte stands for no weight."""
    if FORM == INT8:
        return value + 1
    elif power(FORM, 1) == 3:
        higher = tl.where(digit == 0, value, tl.where(digit == 1, value // 3, value // 9))
        higher = tl.where(digit == 3, value // 27, tl.where(digit == 4, value // 81, higher))
        return tl.where(value < 243, higher % 3, 3)
    else:
        return (value >> (digit * 2)) & 3


# ---------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["out_features", "in_features"])
def convert(
    source, result, invalid, out_features, in_features, chunks,
    FROM: tl.constexpr, TO: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """BYTES bytes of a block row of the result. Padding gets code 1; a weight without a code sets `invalid`."""
    program = tl.program_id(0).to(tl.int64)
    block_row = program // chunks
    byte = (program % chunks).to(tl.int32) * BYTES + tl.arange(0, BYTES)
    result_bytes = row_bytes(TO, in_features)
    source_bytes = row_bytes(FROM, in_features).to(tl.int64)
    there = byte < result_bytes
    packed = tl.zeros((BYTES,), tl.int32)
    bad = tl.zeros((BYTES,), tl.int1)
    for DIGIT in tl.static_range(digits(TO)):
        row, k = weight_at(TO, byte, DIGIT)
        n = block_row * block_rows(TO) + row
        inside = there & (n < out_features) & (k < in_features)
        source_byte, digit = place_of(FROM, (n % block_rows(FROM)).to(tl.int32), k)
        place = n // block_rows(FROM) * source_bytes + source_byte
        code = decoded(FROM, tl.load(source + place, mask=inside, other=0).to(tl.int32), digit)
        bad |= (code < 0) | (code > 2)
        packed += tl.where(inside, code, 1) * power(TO, DIGIT)
    if TO == INT8:
        packed -= 1
    tl.store(result + block_row * result_bytes + byte, packed.to(result.dtype.element_ty), mask=there)
    if tl.max(bad.to(tl.int32), 0) > 0:
        tl.store(invalid, 1)


@triton.jit
def find_invalid(packed, invalid, row_bytes, last_fields, chunks, BYTES: tl.constexpr):
    """Sets `invalid` if a code 3 stands among the weights of a t2 row; the last byte has `last_fields` of them."""
    program = tl.program_id(0).to(tl.int64)
    byte = (program % chunks).to(tl.int32) * BYTES + tl.arange(0, BYTES)
    there = byte < row_bytes
    value = tl.load(packed + program // chunks * row_bytes + byte, mask=there, other=0).to(tl.int32)
    fields = tl.where(byte == row_bytes - 1, last_fields, 4)
    threes = value & (value >> 1) & 0x55 & ((1 << (2 * fields)) - 1)
    if tl.max(threes, 0) > 0:
        tl.store(invalid, 1)


# --------------------------------------------------------------------------------------------------- launchers


def reasons_against(op: str, source: Tensor, *_) -> list[str]:
    """Why the launcher of this file cannot serve these arguments; empty when it can."""
    return _common.device_reasons(source)


def _invalid(packed: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int32, device=packed.device)


def converted(op: str, argument: str, source: Tensor, from_format: int, to_format: int, out_features: int,
              in_features: int) -> Tensor:  # fmt: skip
    """The weights in another format; the op's ValueError for one without a code."""
    to_name = FORMATS[to_format]
    shape = packed_shape(to_name, out_features, in_features)
    result = source.new_empty(shape, dtype=packed_dtype(to_name))
    invalid = _invalid(source)
    length = result[:1].numel()
    chunks = triton.cdiv(length, BYTES)
    with on_device_of(source):
        _common.launch(
            convert, (shape[0] * chunks,),
            source.contiguous(), result, invalid, out_features, in_features, chunks,
            FROM=from_format, TO=to_format, BYTES=BYTES, num_warps=4, registers=255,
        )  # fmt: skip
    if not _common.known_valid(source):
        _common.reject_invalid(invalid, op, argument, source, from_format, out_features, in_features)
    return _common.remember_valid(result)


def as_t2(op: str, packed: Tensor, form: int, out_features: int, in_features: int) -> Tensor:
    """What a product reads, with every code checked. Other formats are converted by every call: for a product on
    Triton, weights are best kept in t2."""
    if form != T2.value:
        return converted(op, "packed", packed, form, T2.value, out_features, in_features)
    dense = packed.contiguous()
    if not _common.known_valid(packed) and packed.numel():
        invalid = _invalid(packed)
        length = packed.size(1)
        chunks = triton.cdiv(length, BYTES)
        with on_device_of(packed):
            _common.launch(
                find_invalid, (out_features * chunks,),
                dense, invalid, length, (in_features - 1) % 4 + 1, chunks, BYTES=BYTES, num_warps=4,
            )  # fmt: skip
        _common.reject_invalid(invalid, op, "packed", packed, form, out_features, in_features)
    return dense


def ternary_repack(source: Tensor, from_format: int, to_format: int, out_features: int, in_features: int) -> Tensor:
    """The result of the op pyops::ternary_repack."""
    _checks.repack(source, from_format, to_format, out_features, in_features)
    return converted("ternary_repack", "source", source, from_format, to_format, out_features, in_features)
