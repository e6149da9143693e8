"""What the kernels of the ternary family share: launching, decoding, exact pieces of floats, checked weights.

Weights are multiplied from the canonical format t2, in which byte b of a row holds in_features 4b .. 4b + 3, two bits
each. The j-th fields of neighbouring bytes belong to in_features that are four apart, so the sum over in_features is
taken in four slabs: field j of the bytes against every fourth activation, from the j-th on. Activations are laid out
that way once, by the kernel that quantizes them; nothing is interleaved in the loop of a product.

Integers and everything after them are to agree with the other backends to the last bit, so no kernel of this family
may fuse a product with a sum, and quotients are rounded once (`tl.div_rn`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyops.ternary import reference_ops

from .._device import INTERPRETED

SLABS = tl.constexpr(4)
#: Slabs are padded with zeros to a multiple of this, the longest step along one that a product takes.
SLAB_STEP = 128
WANTED_PROGRAMS = 1056  # eight on each of 132 multiprocessors; a constant, so that the GPU decides no result


# ------------------------------------------------------------------------------------------- device functions


@triton.jit
def codes(packed, FIELD: tl.constexpr):
    """The codes 0, 1, 2 in one field of each byte, as int8. Compiled, four bytes at a time: shifted as one word, they
    leak bits into their neighbours only above the two that are kept. (Byte by byte, the loop of a product has up to
    half as many instructions again.)"""
    if INTERPRETED:
        return ((packed >> (2 * FIELD)) & 3).to(tl.int8)
    else:
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 word; shr.u32 word, $1, {2 * FIELD}; and.b32 $0, word, 0x03030303; }}",
            "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def ternary(packed, FIELD: tl.constexpr):
    """-1, 0, 1 in one field of each byte, as int8. Compiled, the 1 is taken off four bytes at a time: bit 7 of each is
    set before, so that no borrow leaves it, and flipped after."""
    if INTERPRETED:
        return codes(packed, FIELD) - 1
    else:
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 word; shr.u32 word, $1, {2 * FIELD}; and.b32 word, word, 0x03030303; "
            "or.b32 word, word, 0x80808080; sub.u32 word, word, 0x01010101; xor.b32 $0, word, 0x80808080; }",
            "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def operand(values, dtype: tl.constexpr):
    """Values that a 16-bit type holds exactly, as an operand of a product; the interpreter multiplies no bfloat16."""
    if INTERPRETED:
        return values.to(tl.float32)
    else:
        return values.to(tl.float32).to(dtype)


@triton.jit
def leading_piece(values):
    """The first eight bits of a float32's significand: what bfloat16 holds exactly. Cut off rather than rounded, so
    that the largest numbers do not become infinite."""
    return (values.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def remainder(values, piece):
    """What a piece leaves of float32 values: nothing of an infinity, and NaN of a NaN, whatever was cut off it."""
    return tl.where(values == piece, 0.0, values - piece)


@triton.jit
def add_product(total, values, exact, PIECES: tl.constexpr):
    """total + values @ exact with float32 sums of exact products; `exact` holds integers of at most eight bits. Values
    of a 16-bit type go in as they are (PIECES 0), float32 in pieces of eight bits: three are all of it, down to
    2^-133, the smallest piece."""
    if PIECES == 0:
        dtype: tl.constexpr = values.dtype
        return tl.dot(operand(values, dtype), operand(exact, dtype), total, input_precision="ieee")
    for _ in tl.static_range(PIECES):
        piece = leading_piece(values)
        total = tl.dot(operand(piece, tl.bfloat16), operand(exact, tl.bfloat16), total, input_precision="ieee")
        values = remainder(values, piece)
    return total


# --------------------------------------------------------------------------------------------------- launchers


def launch(kernel, grid, *arguments, num_warps: int, num_stages: int = 1, registers: int | None = None,
           **constants) -> None:  # fmt: skip
    """Starts a kernel unless its grid is empty. Options are spelled out because Triton versions differ in their
    defaults: fusing multiply and add would change results, checks for integer overflow come with device asserts.
    `registers`: a limit stated where the assembler would aim lower and spill a value or two."""
    if all(grid):
        kernel[grid](
            *arguments,
            **constants,
            num_warps=num_warps,
            num_stages=num_stages,
            maxnreg=registers,
            enable_fp_fusion=False,
            sanitize_overflow=False,
        )


def rows_dense(tensor: Tensor) -> Tensor:
    """Rows may lie anywhere; their elements must be neighbours."""
    return tensor if tensor.stride(1) == 1 or tensor.size(1) <= 1 else tensor.contiguous()


def device_reasons(tensor: Tensor) -> list[str]:
    """Why Triton cannot serve tensors on the device of this one."""
    if tensor.is_cuda:
        if not INTERPRETED.value and torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return ["the Triton kernels are built for compute capability 8.0 and later"]
    elif tensor.device.type != "cpu" or not INTERPRETED.value:
        return [f"the tensors are on {tensor.device}; Triton runs on CUDA, or anywhere under TRITON_INTERPRET=1"]
    return []


# ---------------------------------------------------------------------------------- weights that were checked

# Packed weights that hold no invalid code -> their version and place. Asking the device costs a wait for it, so that
# each tensor is asked once until it changes; what the kernels here pack needs no question.
_checked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _mark(packed: Tensor) -> tuple[int, int, torch.Size]:
    return packed._version, packed.data_ptr(), packed.shape


def remember_valid(packed: Tensor) -> Tensor:
    if not packed.is_inference() and not packed.is_meta:
        _checked[packed] = _mark(packed)
    return packed


def known_valid(packed: Tensor) -> bool:
    return not packed.is_inference() and _checked.get(packed) == _mark(packed)


def reject_invalid(invalid: Tensor, op: str, argument: str, packed: Tensor, form: int, rows: int, columns: int) -> None:
    """The error of the op, if a kernel has set `invalid`. Not while a CUDA graph is recorded, which may not wait."""
    if invalid.is_meta or (invalid.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if invalid.item():
        reference_ops.ternary_of(op, argument, packed, form, rows, columns)
    remember_valid(packed)
