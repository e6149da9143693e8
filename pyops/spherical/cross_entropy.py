"""Softmax cross-entropy with the log-sum-exp-squared regulariser, fused; the op ``pyops::cross_entropy``."""

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
from pyops.spherical import _checks, reference
from pyops.spherical._options import (
    AT_LEAST_0,
    SHARE,
    autocast_arguments,
    check_tensors,
    reduction_code,
    register_autocast,
    reject_options,
)

_op = torch.ops.pyops.cross_entropy.default
_op_backward = torch.ops.pyops.cross_entropy_backward.default
_op_backward_in_place = torch.ops.pyops.cross_entropy_backward_.default

_COLUMNS = 4  # row statistics before the target gradients; csrc/spherical/cross_entropy_formula.h
_NAME = "cross_entropy"


# ---- the op: fake, autograd, autocast ----------------------------------------------------------------------


@torch.library.register_fake("pyops::cross_entropy")
def _fake(
    logits, target, target_weight, weight, label_smoothing, lse_square_scale, ignore_index, reduction, safe_mean,
    out_dtype,
):  # fmt: skip
    targets = _checks.forward(_NAME, logits, target, target_weight, weight, label_smoothing, reduction, out_dtype)
    _checks.lse_square_scale(lse_square_scale)
    rows = logits.shape[0]
    shape = (rows,) if reduction == 0 else ()
    return (
        logits.new_empty(shape, dtype=out_dtype or logits.dtype),
        logits.new_empty(shape, dtype=out_dtype or logits.dtype),
        logits.new_empty((rows, _COLUMNS + targets), dtype=torch.float64),
        logits.new_empty((2,), dtype=torch.float64),
    )


def _check_backward(grad_loss, logits, target, weight, statistics, normalizer):
    name = "cross_entropy_backward"
    _checks.backward(name, grad_loss, logits, target, statistics, normalizer, _COLUMNS, 2)
    if weight is not None:
        _checks.class_weight(name, weight, logits)


@torch.library.register_fake("pyops::cross_entropy_backward")
def _fake_backward(grad_loss, logits, target, weight, statistics, normalizer):
    _check_backward(grad_loss, logits, target, weight, statistics, normalizer)
    return logits.new_empty(logits.shape)


@torch.library.register_fake("pyops::cross_entropy_backward_")
def _fake_backward_in_place(grad_loss, logits, target, weight, statistics, normalizer):
    _check_backward(grad_loss, logits, target, weight, statistics, normalizer)


def _save(ctx, inputs, output):
    logits, target, _, weight = inputs[:4]
    ctx.save_for_backward(logits, target, weight, output[2], output[3])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss, *_grad_others):
    grad = _op_backward(grad_loss, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
    return (grad, *[None] * 9)


def _check_constants(*args) -> None:
    check_tensors(_NAME, *args[:4])


register_derivative("cross_entropy", _backward, _save, _check_constants)
register_no_derivative("cross_entropy_backward")
register_no_derivative("cross_entropy_backward_")
register_autocast("cross_entropy")


def _composite(
    logits, target, target_weight, weight, label_smoothing, lse_square_scale, ignore_index, reduction, safe_mean,
    out_dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, regulariser) as differentiable torch code, computed in the accumulation dtype."""
    wide = reference.accumulation_dtype(logits.dtype)
    loss, z_term = reference.cross_entropy(
        logits.to(wide),
        target,
        None if target_weight is None else target_weight.to(wide),
        None if weight is None else weight.to(wide),
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        ignore_index=ignore_index,
        reduction=reference.REDUCTIONS[reduction],
        safe_mean=safe_mean,
    )
    return loss.to(out_dtype or logits.dtype), z_term.detach().to(out_dtype or logits.dtype)


# ---- eager autograd ----------------------------------------------------------------------------------------


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, args, in_place):  # one tuple: apply() costs per argument
        _, target, target_weight, weight = args[:4]
        with below_autograd():
            loss, z_term, statistics, normalizer = _op(*args)
        ctx.save_for_backward(logits, target, target_weight, weight, statistics, normalizer)
        ctx.options = args[4:]
        ctx.in_place = in_place
        ctx.backend = _dispatch.snapshot()
        ctx.mark_non_differentiable(z_term)
        return loss, z_term

    @staticmethod
    def backward(ctx, grad_loss, _grad_z_term):
        logits, target, target_weight, weight, statistics, normalizer = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient itself as differentiable code, to any order
            loss, _ = _composite(logits, target, target_weight, weight, *ctx.options)
            (grad,) = torch.autograd.grad(loss, logits, grad_loss, create_graph=True)
        elif ctx.backend is None:
            grad = _gradient(ctx.in_place, grad_loss, logits, target, weight, statistics, normalizer)
        else:
            with _dispatch.restored(ctx.backend):
                grad = _gradient(ctx.in_place, grad_loss, logits, target, weight, statistics, normalizer)
        return grad, None, None


def _gradient(in_place, grad_loss, logits, target, weight, statistics, normalizer):
    with below_autograd():
        if in_place:
            _op_backward_in_place(grad_loss, logits, target, weight, statistics, normalizer)
            return logits
        return _op_backward(grad_loss, logits, target, weight, statistics, normalizer)


def _call(in_place, args) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        refuse_transforms_under_compile(_NAME)
        return _op(*args)[:2]
    if transform_level_active():
        _checks.forward(_NAME, *args[:5], args[7], args[9])
        return _composite(*args)
    if args[0].requires_grad and torch.is_grad_enabled():
        if in_place and args[0].is_leaf:
            reject(_NAME, "logits", "not be a leaf with inplace_backward=True", "a leaf that requires grad")
        return _CrossEntropy.apply(args[0], args, in_place)
    with below_autograd():
        return _op(*args)[:2]


def _arguments(
    logits, target, weight, target_weight, ignore_index, label_smoothing, lse_square_scale, reduction, safe_mean,
    out_dtype,
) -> tuple:  # fmt: skip
    """The op's arguments from those of the public function; rejects bad options."""
    check_tensors(_NAME, logits, target, target_weight, weight)
    try:
        valid = lse_square_scale >= 0 and 0 <= label_smoothing <= 1
    except TypeError:
        valid = False
    if not valid or not isinstance(ignore_index, int):
        reject_options(
            _NAME,
            ignore_index,
            lse_square_scale=(lse_square_scale, AT_LEAST_0),
            label_smoothing=(label_smoothing, SHARE),
        )
    if torch._C._is_any_autocast_enabled():
        logits, target_weight, weight, out_dtype = autocast_arguments(logits, target_weight, weight, out_dtype)
    return (
        logits, target, target_weight, weight, label_smoothing, lse_square_scale, ignore_index,
        reduction_code(_NAME, reduction), safe_mean, out_dtype,
    )  # fmt: skip


# ---- public function ---------------------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    lse_square_scale: float = 0.0,
    return_z_loss: bool = False,
    weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    inplace_backward: bool = False,
    safe_mean: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax cross-entropy, with the log-sum-exp-squared regulariser that language-model training calls
    "z-loss" (for the loss of that name in the spherical family see :func:`pyops.z_loss`).

    For a row of logits ``o`` with target ``c``, ``lse = log sum_k exp(o_k)`` and smoothing ``s``::

        loss = (1 - s) * w_c * (lse - o_c) + s / D * sum_k w_k * (lse - o_k) + lse_square_scale * lse**2

    Without the last term this is ``torch.nn.functional.cross_entropy`` on class indices, in value and
    semantics. The regulariser is not class-weighted; its mean divides by the number of rows that count.

    Args:
        logits: ``[rows, D]``, float32, float64, bfloat16 or float16, any strides; differentiable. ``-inf``
            masks a class.
        target: class indices, int64 or int32, ``[rows]``, or ``[rows, K]`` for K targets per row, whose losses
            add. Not differentiable, like all other arguments.
        lse_square_scale: coefficient of the regulariser (>= 0).
        return_z_loss: also returns the regulariser's value, detached.
        weight, target_weight, ignore_index, reduction, inplace_backward, safe_mean, out_dtype: see
            :func:`pyops.z_loss`.
        label_smoothing: in [0, 1]; as in torch, spread over all classes times their weights.

    Returns:
        The loss, regulariser included, a scalar or ``[rows]``; with ``return_z_loss`` the pair
        ``(loss, regulariser)``.

    Precision: exponentials in float32, sums in float32 per 4096 elements and float64 above (float64 logits: float64
    throughout). Deterministic; on the CPU independent of the number of threads and of the other rows.
    Derivatives of any order: the first by a fused kernel, higher ones and ``torch.func`` transforms by
    composite torch code. Errors: see :func:`pyops.z_loss`.

    Source: the regulariser as in arXiv 2309.14322, section 2 (coefficient 1e-4 there).

    Example:
        >>> import torch, pyops
        >>> logits, target = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([1])
        >>> loss, z = pyops.cross_entropy(logits, target, lse_square_scale=1e-4, return_z_loss=True)
        >>> round(loss.item() - z.item(), 4), round(z.item(), 6)
        (0.4644, 0.000607)
    """
    args = _arguments(
        logits, target, weight, target_weight, ignore_index, label_smoothing, lse_square_scale, reduction, safe_mean,
        out_dtype,
    )  # fmt: skip
    result = _call(inplace_backward, args)
    return (result[0], result[1]) if return_z_loss else result[0]
