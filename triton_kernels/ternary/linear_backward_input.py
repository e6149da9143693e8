"""dx = (g gamma) T, the gradient of a ternary product with respect to its input (straight through the rounding).

One program per tile of dx, which it alone writes; the sum over out_features is taken in float32, in order. A byte of
weights serves four in_features, each with a sum of its own, put side by side when the tile is stored. Products are
exact: gamma multiplies the sum if there is one, else the gradient, which then goes in as pieces of eight bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyops.ternary import _checks
from pyops.ternary._formats import GROUP

from .._device import on_device_of, round_to
from . import _common
from ._common import add_product, ternary
from .repack import as_t2

GROUP_BYTES = tl.constexpr(GROUP // 4)
TOKENS, ROWS, BYTES, NUM_WARPS, NUM_STAGES = 64, 32, 32, 4, 3


@triton.jit(do_not_specialize=["tokens", "token_blocks"])
def multiply_transposed(
    grad, packed, gamma, dx, tokens, out_features, in_features, row_bytes, grad_stride, gamma_stride, token_blocks,
    SCALED: tl.constexpr, GROUPED: tl.constexpr, PIECES: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """A tile of dx. SCALED: gamma has an entry per row and multiplies the gradient."""
    program = tl.program_id(0).to(tl.int64)
    m = program % token_blocks * TOKENS + tl.arange(0, TOKENS)
    first_byte = (program // token_blocks * BYTES).to(tl.int32)
    byte = first_byte + tl.arange(0, BYTES)
    gradients = grad + (tl.minimum(m, tokens - 1) * grad_stride)[:, None]
    total0 = tl.zeros((TOKENS, BYTES), tl.float32)
    total1, total2, total3 = total0, total0, total0
    for first in range(0, out_features, ROWS):
        n = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        there = n < out_features
        g = tl.load(gradients + n[None, :], mask=there[None, :], other=0)
        if SCALED:
            place = n * gamma_stride
            if GROUPED:
                place += first_byte // GROUP_BYTES
            g = g.to(tl.float32) * tl.load(gamma + place, mask=there, other=0)[None, :]
        mask = there[:, None] & (byte < row_bytes)[None, :]
        tile = tl.load(packed + (n * row_bytes)[:, None] + byte[None, :], mask=mask, other=0)
        total0 = add_product(total0, g, ternary(tile, 0), PIECES)
        total1 = add_product(total1, g, ternary(tile, 1), PIECES)
        total2 = add_product(total2, g, ternary(tile, 2), PIECES)
        total3 = add_product(total3, g, ternary(tile, 3), PIECES)
    total = tl.join(tl.join(total0, total2), tl.join(total1, total3)).reshape(TOKENS, 4 * BYTES)
    if not SCALED:
        total *= tl.load(gamma)
    k = first_byte * 4 + tl.arange(0, 4 * BYTES)
    mask = (m < tokens)[:, None] & (k < in_features)[None, :]
    tl.store(dx + (m * in_features)[:, None] + k[None, :], round_to(total, dx.dtype.element_ty), mask=mask)


def ternary_linear_backward_input(grad: Tensor, packed: Tensor, gamma: Tensor, form: int, in_features: int) -> Tensor:
    """dx of the op pyops::ternary_linear_backward_input."""
    op = "ternary_linear_backward_input"
    _checks.linear_backward_input(grad, packed, gamma, form, in_features)
    tokens, out_features = grad.shape
    weights = as_t2(op, packed, form, out_features, in_features)
    dx = grad.new_empty((tokens, in_features))
    if dx.numel() == 0 or out_features == 0:
        return dx.zero_()
    grad, gamma = _common.rows_dense(grad), gamma.contiguous()
    pieces = 3 if grad.dtype == torch.float32 else 2 if gamma.dim() else 0
    token_blocks = triton.cdiv(tokens, TOKENS)
    with on_device_of(grad):
        _common.launch(
            multiply_transposed, (triton.cdiv(weights.size(1), BYTES) * token_blocks,),
            grad, weights, gamma, dx, tokens, out_features, in_features, weights.size(1), grad.stride(0),
            gamma.size(1) if gamma.dim() == 2 else gamma.dim(), token_blocks,
            SCALED=gamma.dim() > 0, GROUPED=gamma.dim() == 2, PIECES=pieces,
            TOKENS=TOKENS, ROWS=ROWS, BYTES=BYTES, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    return dx
