"""A linear layer that trains through ternary weights and 8-bit activations; the op ``pyops::bitlinear``."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyops import _dispatch
from pyops._autograd import (
    below_autograd,
    refuse_transforms_under_compile,
    register_derivative,
    register_no_derivative,
    reject,
    transform_level_active,
)
from pyops.ternary import _checks, _options, reference
from pyops.ternary.linear import _op_backward_input, _op_repack, refuse_second_derivative
from pyops.ternary.quantize_activation import quantize_act
from pyops.ternary.quantize_weight import T2, quantized

_op = torch.ops.pyops.bitlinear.default
_op_backward_weight = torch.ops.pyops.bitlinear_backward_weight.default
_NAME = "bitlinear"


# ---- the op: fake, autograd ------------------------------------------------------------------------------------


@torch.library.register_fake("pyops::bitlinear")
def _fake(x, weight, packed, gamma, bias, act_bits, qmax, eps):
    _checks.bitlinear(x, weight, packed, gamma, bias, act_bits, qmax, eps)
    tokens = x.shape[0]
    return (
        x.new_empty((tokens, weight.shape[0])),
        x.new_empty(x.shape if act_bits else (0, 0), dtype=torch.int8),
        x.new_empty((tokens,) if act_bits else (0,), dtype=torch.float32),
    )


@torch.library.register_fake("pyops::bitlinear_backward_weight")
def _fake_backward_weight(grad, quantized, step, dtype):
    _checks.backward_weight(grad, quantized, step, dtype)
    return grad.new_empty((grad.shape[1], quantized.shape[1]), dtype=dtype)


def _gradients(needed, grad, packed, gamma, quantized, step, x, weight_dtype, in_features) -> tuple:
    """(of x, weight, gamma, bias); ``x`` is given where activations are not quantized, (quantized, step) otherwise."""
    wants_x, wants_weight, wants_gamma, wants_bias = needed
    grad_x = _op_backward_input(grad, packed, gamma, T2, in_features) if wants_x else None
    grad_weight = grad_gamma = None
    if wants_weight or wants_gamma:
        dtype = torch.float32 if wants_gamma else weight_dtype
        if x is not None:
            grad_weight = (grad.to(dtype).T @ x.to(dtype)).to(dtype)
        else:
            grad_weight = _op_backward_weight(grad, quantized, step, dtype)
        if wants_gamma:  # W_q = T gamma
            ternary = _op_repack(packed, T2, 0, grad.shape[1], in_features)
            rows = (grad_weight * ternary).sum(1, dtype=torch.float64)
            grad_gamma = (rows.sum() if gamma.dim() == 0 else rows).float()
            grad_weight = grad_weight.to(weight_dtype) if wants_weight else None
    return grad_x, grad_weight, grad_gamma, grad.sum(0) if wants_bias else None


def _save(ctx, inputs, output):
    x, weight, packed, gamma = inputs[:4]
    act_bits = inputs[5]
    ctx.save_for_backward(packed, gamma, output[1], output[2], None if act_bits else x)
    ctx.arguments = weight.dtype, weight.shape[1]
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx, grad, _grad_quantized, _grad_step):
    refuse_second_derivative(_NAME)
    needed = ctx.needs_input_grad
    needed = needed[0], needed[1], needed[3], needed[4]
    grad_x, grad_weight, grad_gamma, grad_bias = _gradients(needed, grad, *ctx.saved_tensors, *ctx.arguments)
    return grad_x, grad_weight, None, grad_gamma, grad_bias, None, None, None


register_derivative(_NAME, _backward, _save)
register_no_derivative("bitlinear_backward_weight")


class _BitLinear(torch.autograd.Function):
    """Saves one byte per activation and a quarter of a byte per weight."""

    @staticmethod
    def forward(ctx, x, weight, gamma, bias, constants):  # one tuple: apply() costs per argument
        packed, options = constants
        with below_autograd():
            y, quantized, step = _op(x, weight, packed, gamma, bias, *options)
        ctx.save_for_backward(packed, gamma, quantized, step, None if options[0] else x)
        ctx.arguments = weight.dtype, weight.shape[1]
        ctx.backend = _dispatch.snapshot()
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative(_NAME)
        saved = ctx.saved_tensors  # activation checkpointing computes them here, and needs autograd for it
        with _dispatch.restored(ctx.backend), below_autograd():
            gradients = _gradients(ctx.needs_input_grad[:4], grad, *saved, *ctx.arguments)
        return (*gradients, None)


class _FirstDerivative(torch.autograd.Function):
    """Its argument, whose second derivative raises."""

    @staticmethod
    def forward(ctx, y):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative(_NAME)
        return grad


def _mixed(x, weight, bias, packed, gamma, options, lambda_) -> Tensor:
    """lambda < 1: both operands are mixtures of themselves and their quantized form, so the product is one of
    floats, in float32; the quantized forms come from the kernels."""
    act_bits, qmax, eps = options
    ternary = _op_repack(packed, T2, 0, *weight.shape)
    x_mix, w_mix = x.float(), weight.float()
    w_mix = w_mix + lambda_ * (reference.dequantized(ternary, gamma.detach(), torch.float32) - w_mix).detach()
    if gamma.requires_grad:
        w_mix = w_mix + lambda_ * reference.dequantized(ternary, gamma - gamma.detach(), torch.float32)
    if act_bits:
        q, step = quantize_act(x.detach(), qmax, eps)
        x_mix = x_mix + lambda_ * (q * step - x_mix).detach()
    with torch.autocast(x.device.type, enabled=False):
        y = torch.nn.functional.linear(x_mix, w_mix, None if bias is None else bias.float()).to(x.dtype)
    return y if torch.compiler.is_compiling() or not y.requires_grad else _FirstDerivative.apply(y)


def _run(x, weight, bias, packed, gamma, options, compiling) -> Tensor:
    if compiling:
        return _op(x, weight, packed, gamma, bias, *options)[0]
    wanted = x.requires_grad or weight.requires_grad or gamma.requires_grad
    if torch.is_grad_enabled() and (wanted or (bias is not None and bias.requires_grad)):
        return _BitLinear.apply(x, weight, gamma, bias, (packed, options))
    with below_autograd():
        return _op(x, weight, packed, gamma, bias, *options)[0]


def _checked_options(weight_measure, granularity, qmax, eps, eps_mode, act_bits, lambda_) -> tuple[tuple, tuple]:
    """(of the weight, of the product), or the error that an option deserves."""
    _options.number(_NAME, "lambda_", lambda_, 0, 1, "be in [0, 1]")
    eps = _options.positive_eps(_NAME, eps)
    weight_options = (
        _options.measure(_NAME, weight_measure), _options.per_row(_NAME, granularity), eps,
        _options.eps_mode(_NAME, eps_mode),
    )  # fmt: skip
    return weight_options, (_options.act_bits(_NAME, act_bits), _options.qmax(_NAME, qmax), eps)


_known_options = functools.lru_cache(maxsize=64, typed=True)(_checked_options)


def _arguments(
    x, weight, bias, weight_measure, granularity, qmax, eps, eps_mode, act_bits, lambda_, scale, compiling=False,
) -> tuple:  # fmt: skip
    """(x, bias, weight options, product options) after the checks that Python makes."""
    _options.tensor(_NAME, "x", x)
    _options.tensor(_NAME, "weight", weight)
    if bias is not None:
        _options.tensor(_NAME, "bias", bias, optional=True)
    if scale is not None:
        _options.tensor(_NAME, "scale", scale, optional=True)
    if weight.dtype not in _checks.FLOATING:
        _checks.floating(_NAME, "weight", weight)
    if weight.dim() != 2:
        reject(_NAME, "weight", "have shape [out_features, in_features]", str(list(weight.shape)))
    if x.dim() == 0:
        reject(_NAME, "x", "have at least one dimension", "[]")
    options = weight_measure, granularity, qmax, eps, eps_mode, act_bits, lambda_
    if compiling:
        checked = _checked_options(*options)
    else:
        try:
            checked = _known_options(*options)
        except TypeError:  # also what has no hash
            checked = _checked_options(*options)
    dtype = _options.autocast_dtype(x)
    if dtype is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    elif x.dtype != weight.dtype:
        reject(_NAME, "x", f"be {_checks.dtype_name(weight.dtype)} like weight", _checks.dtype_name(x.dtype))
    return x, bias, *checked


# ---- public function -------------------------------------------------------------------------------------------


def bitlinear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_measure: str = "absmean",
    granularity: str = "tensor",
    qmax: int = 127,
    eps: float = 1e-5,
    eps_mode: str = "clamp",
    act_bits: int | None = 8,
    lambda_: float = 1.0,
    scale: Tensor | None = None,
) -> Tensor:
    r"""``y = x_q @ W_q^T + bias`` with ternary ``W_q`` and 8-bit ``x_q``, trained straight through both roundings.

    ``T, gamma = quantize_weight(weight)``, ``q, step = quantize_act(x)``; ``acc = q @ T^T`` exact in int32;
    ``y = float32(acc) * (step * gamma) + bias``, then the cast. Gradients treat the scales as constants and clip
    nothing: ``dx = gamma (g @ T)``, ``dW = g^T @ (q step)``, ``db = sum g``, and for a given ``scale``
    ``dgamma = sum dW * T``.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16, any strides; differentiable.
        weight: ``[out_features, in_features]``, dtype of x; differentiable. Keep it in float32 or bfloat16 as the
            master weight: an optimizer's steps are smaller than a ternary step.
        bias: ``[out_features]``, dtype of x; differentiable.
        weight_measure: ``"absmean"`` or ``"absmedian"``.
        granularity: one gamma per ``"tensor"`` or per ``"row"`` of the weight.
        qmax: 127 or 128; eps, eps_mode: see :func:`pyops.ternary.quantize_weight`.
        act_bits: 8, or None to leave x as it is (float32 sums).
        lambda_: in [0, 1]; less than 1 mixes: ``x + lambda_ (x_q - x)`` and likewise the weight (a warm-up; a
            float product, so slower than 1).
        scale: gamma, float32 ``[]`` or ``[out_features]``, instead of the measured one; differentiable.

    Returns:
        ``[..., out_features]`` in the dtype of x. A token with a NaN or an infinity gives a row of NaN; a weight that
        is not finite gives NaN wherever its gamma counts.

    Saved for backward: one byte per activation, a quarter of a byte per weight, one float per token. The quantized
    weight is remembered until the weight changes (its version counter; on the CPU also a sample of its values).
    Precision: integers exact, forward bit-identical on every backend; gradients summed in float32. Deterministic, on
    the CPU independent of the number of threads. Under autocast x and bias take the autocast dtype, the weight is
    quantized from its own. First derivatives only (NotImplementedError for a second); ``torch.func`` transforms by
    composite torch code. Errors: RuntimeError for tensors that do not fit, ValueError or TypeError for options.

    Source: arXiv 2402.17764 (mean), 2407.09527 (median, qmax 128, warm-up).

    Example:
        >>> import torch, pyops
        >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.9, -0.2], [-1.1, 0.4]], requires_grad=True)
        >>> y = pyops.bitlinear(x, weight)
        >>> y.sum().backward()
        >>> [round(v, 4) for v in y[0].tolist()], [round(v, 3) for v in weight.grad[0].tolist()]
        ([0.6551, 0.6449], [1.008, 2.0])
    """
    compiling = torch.compiler.is_compiling()
    args = _arguments(
        x, weight, bias, weight_measure, granularity, qmax, eps, eps_mode, act_bits, lambda_, scale, compiling
    )
    x, bias, weight_options, options = args
    if compiling:
        refuse_transforms_under_compile(_NAME)
    elif transform_level_active():
        _checks.quantize_weight(weight, scale, *weight_options[:3])
        _checks.operands(x, weight, bias)
        return reference.bitlinear(
            x, weight.to(x.dtype), bias, scale=scale, measure=weight_measure, per_row=weight_options[1], qmax=qmax,
            eps=eps, add_eps=weight_options[3], act_bits=act_bits, lambda_=lambda_,
        )  # fmt: skip
    packed, gamma = quantized(weight, scale, weight_options)
    if scale is not None and scale.requires_grad and torch.is_grad_enabled():
        live = reference.effective_scale(scale, eps, weight_options[3])
        gamma = torch.where(gamma.isnan(), gamma, live)
    if lambda_ != 1:
        return _mixed(x, weight, bias, packed, gamma, options, lambda_)
    if x.dim() == 2:
        return _run(x, weight, bias, packed, gamma, options, compiling)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return _run(flat, weight, bias, packed, gamma, options, compiling).reshape(*x.shape[:-1], weight.shape[0])
