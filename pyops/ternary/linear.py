"""A linear layer on packed ternary weights; the op ``pyops::ternary_linear``."""

from __future__ import annotations

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
from pyops._checks import FormatError
from pyops.ternary import _checks, _options, reference
from pyops.ternary._formats import CANONICAL, code

_op = torch.ops.pyops.ternary_linear.default
_op_backward_input = torch.ops.pyops.ternary_linear_backward_input.default
_op_repack = torch.ops.pyops.ternary_repack.default
_NAME = "ternary_linear"


# ---- the op: fake, autograd ------------------------------------------------------------------------------------


@torch.library.register_fake("pyops::ternary_linear")
def _fake(x, packed, gamma, bias, format, out_features, in_features, act_bits, qmax, eps, out_dtype):
    _checks.linear(x, packed, gamma, bias, format, out_features, in_features, act_bits, qmax, eps, out_dtype)
    return x.new_empty((x.shape[0], out_features), dtype=out_dtype or x.dtype)


@torch.library.register_fake("pyops::ternary_linear_backward_input")
def _fake_backward_input(grad, packed, gamma, format, in_features):
    _checks.linear_backward_input(grad, packed, gamma, format, in_features)
    return grad.new_empty((grad.shape[0], in_features))


def _save(ctx, inputs, output):
    x, packed, gamma, _, form, _, in_features = inputs[:7]
    ctx.save_for_backward(packed, gamma)
    ctx.arguments = form, in_features, x.dtype


def refuse_second_derivative(name: str) -> None:
    """To be called in a backward: its result would silently miss what the rounding of the other operand adds."""
    if torch.is_grad_enabled():
        raise NotImplementedError(f"pyops::{name}: no second derivative goes through the quantizers")


def _gradients(needed, grad, packed, gamma, form, in_features, dtype) -> tuple[Tensor | None, Tensor | None]:
    """(of x, of bias): straight through the quantizer; in the wider of the dtypes of x and y."""
    grad = grad.to(torch.promote_types(grad.dtype, dtype))
    grad_x = _op_backward_input(grad, packed, gamma, form, in_features).to(dtype) if needed[0] else None
    return grad_x, grad.sum(0).to(dtype) if needed[1] else None


def _backward(ctx, grad):
    refuse_second_derivative(_NAME)
    needed = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    grad_x, grad_bias = _gradients(needed, grad, *ctx.saved_tensors, *ctx.arguments)
    return (grad_x, None, None, grad_bias, *[None] * 7)


def _check_constants(x, packed, gamma, *_) -> None:
    if gamma.requires_grad and torch.is_grad_enabled():
        reject(_NAME, "gamma", "not require grad (it has no derivative here)", "requires_grad=True")


register_derivative(_NAME, _backward, _save, _check_constants)
register_no_derivative("ternary_linear_backward_input")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, args):  # one tuple: apply() costs per argument
        with below_autograd():
            y = _op(*args)
        ctx.save_for_backward(args[1], args[2])
        ctx.arguments = args[4], args[6], x.dtype
        ctx.backend = _dispatch.snapshot()
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative(_NAME)
        saved = ctx.saved_tensors  # activation checkpointing computes them here, and needs autograd for it
        with _dispatch.restored(ctx.backend), below_autograd():
            return (*_gradients(ctx.needs_input_grad, grad, *saved, *ctx.arguments), None)


def _composite(
    x, packed, gamma, bias, form, out_features, in_features, act_bits, qmax, eps, out_dtype,
) -> Tensor:  # fmt: skip
    """Differentiable torch code for transforms; straight through in x."""
    _checks.linear(x, packed, gamma, bias, form, out_features, in_features, act_bits, qmax, eps, out_dtype)
    ternary = packed if form == 0 else _op_repack(packed, form, 0, out_features, in_features)
    y = reference.linear(x, ternary, gamma, bias, qmax=qmax if act_bits else None, eps=eps)
    return y.to(out_dtype or x.dtype)


def _call(args) -> Tensor:
    x, bias = args[0], args[3]
    _check_constants(*args)
    if torch.compiler.is_compiling():
        refuse_transforms_under_compile(_NAME)
        return _op(*args)
    if transform_level_active():
        return _composite(*args)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, bias, args)
    if torch.is_inference_mode_enabled():  # which is below autograd already
        return _op(*args)
    with below_autograd():
        return _op(*args)


def _arguments(x, packed, gamma, bias, fmt, in_features, out_features, act, qmax, eps, out_dtype) -> tuple:
    """The op's arguments but for the shape of x; rejects bad options."""
    for name, value in (("x", x), ("packed", packed), ("gamma", gamma)):
        _options.tensor(_NAME, name, value)
    _options.tensor(_NAME, "bias", bias, optional=True)
    form = code(_NAME, "fmt", fmt)
    act_bits = (8, 0)[_options.choice(_NAME, "act", act, ("int8", None))]
    _options.qmax(_NAME, qmax)
    _options.positive_eps(_NAME, eps)
    if out_features is None:
        if fmt not in (*CANONICAL, "int8"):
            reject(_NAME, "out_features", f"be given for the layout {fmt}", None, TypeError)
        out_features = packed.shape[0] if packed.dim() else 0
    dtype = _options.autocast_dtype(x)
    if dtype is not None and x.is_floating_point():
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if x.dim() == 0:
        reject(_NAME, "x", "have at least one dimension", "[]")
    return x, packed, gamma, bias, form, out_features, in_features, act_bits, qmax, eps, out_dtype


# ---- public function -------------------------------------------------------------------------------------------


def linear_packed(
    x: Tensor,
    packed: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    *,
    fmt: str = "t2",
    in_features: int,
    out_features: int | None = None,
    act: str | None = "int8",
    qmax: int = 127,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""``y = x_q @ (T gamma)^T + bias`` on packed ternary weights T, ``x_q`` being x rounded to 8 bits per token.

    With ``act="int8"``: ``q, step`` as in :func:`pyops.ternary.quantize_act`, ``acc = q @ T^T`` exact in int32,
    ``y = float32(acc) * (step * gamma) + bias``, then the cast: **bit-identical** for every processor, number of
    threads, batch size, format and device (256-group gamma excepted). With ``act=None``: x is not rounded, the sums
    are float32.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16, any strides; differentiable (straight through).
        packed: uint8, weights in the format ``fmt``; see :func:`pyops.ternary.pack`. Canonical formats are checked
            as they are read; the layouts for a processor (``t2x16``, ``t5x16``, ``t2mma``) were checked when packed.
        gamma: float32, multiplies: ``[]``, ``[out_features]``, or ``[out_features, in_features / 256]``.
        bias: ``[out_features]`` in the dtype of x; differentiable. Added after the scaling.
        out_features: needed where ``fmt`` pads rows.
        act: ``"int8"`` or None.
        qmax, eps: of the rounding of x.
        out_dtype: float32, bfloat16 or float16; that of x by default.

    Returns:
        ``[..., out_features]``. A token with a NaN or an infinity gives a row of NaN; others do not notice.

    Under autocast x and bias are cast to the autocast dtype. Derivatives of the first order; ``torch.func``
    transforms by composite torch code. Errors: RuntimeError for tensors that do not fit, FormatError for bytes that
    stand for no weight, ValueError for an unknown option.

    Source: arXiv 2402.17764; 2410.16144 for packed inference.

    Example:
        >>> import torch, pyops
        >>> packed = pyops.ternary.pack(torch.tensor([[1, 0, -1], [0, 1, 1]], dtype=torch.int8))
        >>> x = torch.tensor([[1.0, 2.0, -0.5]])
        >>> y = pyops.ternary.linear_packed(x, packed, torch.tensor(0.5), in_features=3)
        >>> [round(v, 3) for v in y[0].tolist()]
        [0.756, 0.748]
    """
    args = _arguments(x, packed, gamma, bias, fmt, in_features, out_features, act, qmax, eps, out_dtype)
    x = args[0]
    try:
        if x.dim() == 2:
            return _call(args)
        flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        return _call((flat, *args[1:])).reshape(*x.shape[:-1], args[5])
    except ValueError as error:
        if str(error).startswith("pyops::"):
            raise FormatError(str(error)) from None
        raise
