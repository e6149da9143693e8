"""The training op and the gradient of its weight.

    dW[n, k] = sum_m (g[m, n] step[m]) q[m, k]

The forward is the product of `linear`, which here also hands back what the backward needs: q and step. The backward
goes over tokens in order, one program per tile of dW; q fits into bfloat16, the scaled gradient goes in as pieces of
eight bits, so every product is exact and the sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyops.ternary import _checks

from .._device import on_device_of, round_to
from . import _common
from ._common import add_product
from .linear import multiply
from .repack import T2, as_t2

ROWS, COLUMNS, TOKENS, NUM_WARPS, NUM_STAGES = 128, 128, 32, 8, 3


@triton.jit(do_not_specialize=["tokens", "column_blocks"])
def weight_gradient(
    grad, quantized, step, result, tokens, out_features, in_features, grad_stride, column_blocks,
    PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A tile of dW."""
    program = tl.program_id(0).to(tl.int64)
    n = program // column_blocks * ROWS + tl.arange(0, ROWS)
    k = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, tokens, TOKENS):
        m = tl.cast(first, tl.int64) + tl.arange(0, TOKENS)
        there = (m < tokens)[:, None]
        mask = there & (n < out_features)[None, :]
        g = tl.load(grad + (m * grad_stride)[:, None] + n[None, :], mask=mask, other=0)
        g = g.to(tl.float32) * tl.load(step + m, mask=m < tokens, other=0)[:, None]
        mask = there & (k < in_features)[None, :]
        q = tl.load(quantized + (m * in_features)[:, None] + k[None, :], mask=mask, other=0)
        total = add_product(total, tl.trans(g), q, PIECES)
    mask = (n < out_features)[:, None] & (k < in_features)[None, :]
    tl.store(result + (n * in_features)[:, None] + k[None, :], round_to(total, result.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------- launchers


def reasons_against(op: str, tokens: Tensor, *_) -> list[str]:
    """Why a launcher of this file cannot serve these arguments; empty when it can."""
    return _common.device_reasons(tokens)


def bitlinear(
    x: Tensor, weight: Tensor, packed: Tensor, gamma: Tensor, bias: Tensor | None, act_bits: int, qmax: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, quantized, step) of the op pyops::bitlinear."""
    _checks.bitlinear(x, weight, packed, gamma, bias, act_bits, qmax, eps)
    weights = as_t2("bitlinear", packed, T2.value, *weight.shape)
    y, q = multiply(x, weights, gamma, bias, act_bits, qmax, eps, x.dtype, keep=True)
    if q is None:
        return y, x.new_empty((0, 0), dtype=torch.int8), x.new_empty(0, dtype=torch.float32)
    return y, q.values, q.step


def bitlinear_backward_weight(grad: Tensor, quantized: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """dW of the op pyops::bitlinear_backward_weight."""
    _checks.backward_weight(grad, quantized, step, dtype)
    (tokens, out_features), in_features = grad.shape, quantized.size(1)
    result = grad.new_empty((out_features, in_features), dtype=dtype)
    if result.numel() == 0:
        return result
    grad = _common.rows_dense(grad)
    column_blocks = triton.cdiv(in_features, COLUMNS)
    # Two pieces are more than a 16-bit result shows of a 16-bit gradient.
    pieces = 3 if torch.float32 in (grad.dtype, dtype) else 2
    with on_device_of(grad):
        _common.launch(
            weight_gradient, (triton.cdiv(out_features, ROWS) * column_blocks,),
            grad, quantized.contiguous(), step.contiguous(), result, tokens, out_features, in_features, grad.stride(0),
            column_blocks,
            PIECES=pieces, ROWS=ROWS, COLUMNS=COLUMNS, TOKENS=TOKENS, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    return result
