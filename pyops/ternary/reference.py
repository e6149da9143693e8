"""The formulas of the family as plain, differentiable torch code: slow, obvious, and the definition in tests.

Quantizers compute in float32 whatever the dtype, as the kernels do; everything after them computes in the dtype of
the arguments, so that float64 arguments give the exact value for the same quantized numbers. Gradients go straight
through both quantizers, the scales being constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

MEASURES = ("absmean", "absmedian")
EPS_MODES = ("clamp", "add")
GROUP = 256


def weight_measure(weight: Tensor, measure: str, per_row: bool) -> Tensor:
    """Mean of |W| (taken in float64), or its lower median: the element of rank floor((n - 1) / 2). float32, [] or
    [out_features]; 0 for no elements, NaN if there is a weight that is not finite."""
    magnitude = weight.detach().float().abs()
    flat = magnitude if per_row else magnitude.reshape(1, -1)
    if flat.shape[1] == 0:
        gamma = flat.new_zeros(flat.shape[0])
    elif measure == "absmean":
        gamma = flat.double().mean(1).float()
    else:
        gamma = flat.median(1).values if flat.shape[0] else flat.new_zeros(0)
    gamma = torch.where(flat.isfinite().all(1), gamma, torch.full_like(gamma, float("nan")))
    return gamma if per_row else gamma.reshape(())


def effective_scale(gamma: Tensor, eps: float, add_eps: bool) -> Tensor:
    """gamma' = max(gamma, eps), or gamma + eps; NaN stays NaN."""
    eps = torch.tensor(eps, dtype=torch.float32, device=gamma.device)
    return gamma + eps if add_eps else torch.where(gamma < eps, eps, gamma)


def quantize_weight(
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    measure: str = "absmean",
    per_row: bool = False,
    eps: float = 1e-5,
    add_eps: bool = False,
) -> tuple[Tensor, Tensor]:
    """(T int8, gamma' float32): T = clip(round(W * (1 / gamma')), -1, 1), ties to even. A row (or tensor) with a
    weight that is not finite has T = 0 there and gamma' = NaN."""
    values = weight.detach().float()
    found = weight_measure(weight, measure, per_row)
    if scale is not None:
        found = torch.where(found.isnan(), found, scale.detach())
    gamma = effective_scale(found, eps, add_eps)
    inverse = (1.0 / gamma)[:, None] if per_row else 1.0 / gamma
    scaled = values * inverse
    ternary = torch.where(scaled.abs() > 0.5, values.sign(), torch.zeros_like(values))
    return torch.where(values.isfinite(), ternary, torch.zeros_like(values)).to(torch.int8), gamma


def quantize_activation(x: Tensor, qmax: int = 127, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(q int8, step float32 [..., 1]) per token: s = qmax / max(absmax, eps), q = clip(round(x s), -128, 127),
    step = max(absmax, eps) / qmax. A token that is not finite has q = 0 and step = NaN."""
    values = x.detach().float()
    if values.shape[-1] == 0:
        largest = values.new_zeros((*values.shape[:-1], 1))
    else:
        largest = values.abs().amax(-1, keepdim=True)
    finite = values.isfinite().all(-1, keepdim=True)
    largest = torch.where(finite, largest, torch.ones_like(largest)).clamp(min=eps)
    # A quotient of two tensors: torch takes qmax / largest as largest.reciprocal() * qmax, rounded twice. Finite, so
    # that 0 stays 0 whatever eps.
    s = (torch.full_like(largest, qmax) / largest).clamp(max=torch.finfo(torch.float32).max)
    scaled = torch.where(finite, values, torch.zeros_like(values)) * s
    quantized = scaled.round().clamp(-128, 127).to(torch.int8)
    step = torch.where(finite, largest / qmax, torch.full_like(largest, float("nan")))
    return quantized, step


def dequantized(ternary: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """T * gamma' in a dtype, for each granularity."""
    wide = ternary.to(dtype)
    if gamma.dim() == 2:
        return (wide.unflatten(1, (gamma.shape[1], GROUP)) * gamma.to(dtype)[..., None]).flatten(1)
    return wide * (gamma[:, None] if gamma.dim() == 1 else gamma).to(dtype)


def linear(x: Tensor, ternary: Tensor, gamma: Tensor, bias: Tensor | None, *, qmax: int | None, eps: float) -> Tensor:
    """x_q @ (T gamma')^T + bias with x_q = q step (x itself where ``qmax`` is None); straight through in x."""
    wide = x.double()
    if qmax is not None:
        quantized, step = quantize_activation(x, qmax, eps)
        wide = wide + (quantized.double() * step.double() - wide).detach()
    result = wide @ dequantized(ternary, gamma, torch.float64).T
    return result if bias is None else result + bias.double()


def bitlinear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    measure: str = "absmean",
    per_row: bool = False,
    qmax: int = 127,
    eps: float = 1e-5,
    add_eps: bool = False,
    act_bits: int | None = 8,
    lambda_: float = 1.0,
) -> Tensor:
    """x_mix @ W_mix^T + bias, x_mix = x + lambda (x_q - x), W_mix = W + lambda (W_q - W); the quantized parts are
    constants to autograd, the scale excepted."""
    ternary, gamma = quantize_weight(weight, scale, measure=measure, per_row=per_row, eps=eps, add_eps=add_eps)
    w_q = dequantized(ternary, gamma, weight.dtype)
    w_mix = weight + lambda_ * (w_q - weight).detach()
    if scale is not None:
        live = effective_scale(scale, eps, add_eps)
        w_mix = w_mix + lambda_ * dequantized(ternary, live - live.detach(), weight.dtype)
    x_mix = x
    if act_bits is not None:
        quantized, step = quantize_activation(x, qmax, eps)
        x_q = quantized.to(x.dtype) * step.to(x.dtype)
        x_mix = x + lambda_ * (x_q - x).detach()
    return torch.nn.functional.linear(x_mix, w_mix, bias)
