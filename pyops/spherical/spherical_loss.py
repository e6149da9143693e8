"""Spherical losses on given logits: ``z_loss`` and its relatives, fused; the op ``pyops::spherical_loss``."""

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
    NOT_NAN,
    POSITIVE,
    SHARE,
    autocast_arguments,
    check_tensors,
    reduction_code,
    register_autocast,
    reject_options,
)

_op = torch.ops.pyops.spherical_loss.default
_op_backward = torch.ops.pyops.spherical_loss_backward.default
_op_backward_in_place = torch.ops.pyops.spherical_loss_backward_.default

_COLUMNS = 5  # row statistics before the target gradients; csrc/spherical/spherical_loss_formula.h
_Z, _TAYLOR_SOFTMAX, _SPHERICAL_SOFTMAX, _MSE_ONEHOT = range(4)
_NAMES = [_checks.spherical_name(loss) for loss in range(4)]


# ---- the op: fake, autograd, autocast, reference backend ---------------------------------------------------


@torch.library.register_fake("pyops::spherical_loss")
def _fake(
    logits, target, target_weight, weight, loss, a, b, eps, label_smoothing, ignore_index, reduction, safe_mean,
    out_dtype,
):  # fmt: skip
    op = _checks.spherical_name(loss)
    _checks.spherical_options(op, a, b, eps)
    targets = _checks.forward(op, logits, target, target_weight, weight, label_smoothing, reduction, out_dtype)
    rows = logits.shape[0]
    return (
        logits.new_empty((rows,) if reduction == 0 else (), dtype=out_dtype or logits.dtype),
        logits.new_empty((rows, _COLUMNS + targets), dtype=torch.float64),
        logits.new_empty((), dtype=torch.float64),
    )


def _check_backward(grad_loss, logits, target, statistics, normalizer, loss):
    name = _checks.spherical_name(loss, "_backward")
    _checks.backward(name, grad_loss, logits, target, statistics, normalizer, _COLUMNS, 1)


@torch.library.register_fake("pyops::spherical_loss_backward")
def _fake_backward(grad_loss, logits, target, statistics, normalizer, loss, eps):
    _check_backward(grad_loss, logits, target, statistics, normalizer, loss)
    return logits.new_empty(logits.shape)


@torch.library.register_fake("pyops::spherical_loss_backward_")
def _fake_backward_in_place(grad_loss, logits, target, statistics, normalizer, loss, eps):
    _check_backward(grad_loss, logits, target, statistics, normalizer, loss)


def _save(ctx, inputs, output):
    logits, target, _, _, loss, _, _, eps = inputs[:8]
    ctx.save_for_backward(logits, target, output[1], output[2])
    ctx.loss, ctx.eps = loss, eps
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx, grad_loss, _grad_statistics, _grad_normalizer):
    grad = _op_backward(grad_loss, *ctx.saved_tensors, ctx.loss, ctx.eps) if ctx.needs_input_grad[0] else None
    return (grad, *[None] * 12)


def _check_constants(*args) -> None:
    check_tensors(_checks.spherical_name(args[4]), *args[:4])


register_derivative("spherical_loss", _backward, _save, _check_constants)
register_no_derivative("spherical_loss_backward")
register_no_derivative("spherical_loss_backward_")
register_autocast("spherical_loss")


def _composite(
    logits, target, target_weight, weight, loss, a, b, eps, label_smoothing, ignore_index, reduction, safe_mean,
    out_dtype,
) -> Tensor:  # fmt: skip
    """The loss as differentiable torch code, computed in the accumulation dtype."""
    wide = reference.accumulation_dtype(logits.dtype)
    value = reference.spherical_loss(
        logits.to(wide),
        target,
        None if target_weight is None else target_weight.to(wide),
        None if weight is None else weight.to(wide),
        loss=reference.SPHERICAL_LOSSES[loss],
        a=a,
        b=b,
        eps=eps,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reference.REDUCTIONS[reduction],
        safe_mean=safe_mean,
    )
    return value.to(out_dtype or logits.dtype)


# ---- eager autograd ----------------------------------------------------------------------------------------


class _SphericalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, args, in_place):  # one tuple: apply() costs per argument
        _, target, target_weight, weight = args[:4]
        with below_autograd():
            loss, statistics, normalizer = _op(*args)
        ctx.save_for_backward(logits, target, target_weight, weight, statistics, normalizer)
        ctx.options = args[4:]
        ctx.in_place = in_place
        ctx.backend = _dispatch.snapshot()
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        logits, target, target_weight, weight, statistics, normalizer = ctx.saved_tensors
        options = ctx.options
        if torch.is_grad_enabled():  # create_graph: the gradient itself as differentiable code, to any order
            loss = _composite(logits, target, target_weight, weight, *options)
            (grad,) = torch.autograd.grad(loss, logits, grad_loss, create_graph=True)
        elif ctx.backend is None:
            grad = _gradient(ctx.in_place, grad_loss, logits, target, statistics, normalizer, options)
        else:
            with _dispatch.restored(ctx.backend):
                grad = _gradient(ctx.in_place, grad_loss, logits, target, statistics, normalizer, options)
        return grad, None, None


def _gradient(in_place, grad_loss, logits, target, statistics, normalizer, options):
    with below_autograd():
        if in_place:
            _op_backward_in_place(grad_loss, logits, target, statistics, normalizer, options[0], options[3])
            return logits
        return _op_backward(grad_loss, logits, target, statistics, normalizer, options[0], options[3])


def _call(
    loss, logits, target, a, b, eps, weight, target_weight, ignore_index, label_smoothing, reduction,
    inplace_backward, safe_mean, out_dtype,
) -> Tensor:  # fmt: skip
    args = _arguments(
        loss, logits, target, a, b, eps, weight, target_weight, ignore_index, label_smoothing, reduction, safe_mean,
        out_dtype,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        refuse_transforms_under_compile(_NAMES[loss])
        return _op(*args)[0]
    if transform_level_active():
        _fake_checks(args)
        return _composite(*args)
    if args[0].requires_grad and torch.is_grad_enabled():
        if inplace_backward and args[0].is_leaf:
            reject(
                _NAMES[loss],
                "logits",
                "not be a leaf with inplace_backward=True",
                "a leaf that requires grad",
            )
        return _SphericalLoss.apply(args[0], args, inplace_backward)
    with below_autograd():
        return _op(*args)[0]


def _fake_checks(args) -> None:
    (
        logits,
        target,
        target_weight,
        weight,
        loss,
        _a,
        _b,
        _eps,
        smoothing,
        _ignore,
        reduction,
        _safe,
        out_dtype,
    ) = args
    _checks.forward(_NAMES[loss], logits, target, target_weight, weight, smoothing, reduction, out_dtype)


def _arguments(
    loss, logits, target, a, b, eps, weight, target_weight, ignore_index, label_smoothing, reduction, safe_mean,
    out_dtype,
) -> tuple:  # fmt: skip
    """The op's arguments from those of a public function; rejects bad options."""
    name = _NAMES[loss]
    check_tensors(name, logits, target, target_weight, weight)
    try:
        valid = a > 0 and b <= b and eps >= 0 and 0 <= label_smoothing <= 1
    except TypeError:
        valid = False
    if not valid or not isinstance(ignore_index, int):
        reject_options(
            name,
            ignore_index,
            a=(a, POSITIVE),
            b=(b, NOT_NAN),
            eps=(eps, AT_LEAST_0),
            label_smoothing=(label_smoothing, SHARE),
        )
    if torch._C._is_any_autocast_enabled():
        logits, target_weight, weight, out_dtype = autocast_arguments(logits, target_weight, weight, out_dtype)
    code = reduction_code(name, reduction)
    return (
        logits, target, target_weight, weight, loss, a, b, eps, label_smoothing, ignore_index, code, safe_mean,
        out_dtype,
    )  # fmt: skip


# ---- public functions --------------------------------------------------------------------------------------


def z_loss(
    logits: Tensor,
    target: Tensor,
    *,
    a: float = 1.0,
    b: float = 4.0,
    eps: float = 1e-12,
    weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    inplace_backward: bool = False,
    safe_mean: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""The Z-loss of de Brebisson and Vincent; *not* the log-sum-exp-squared regulariser that language-model
    training calls "z-loss" (that one is ``cross_entropy(..., lse_square_scale=)``).

    For a row of logits ``o`` with mean ``mu``, population variance ``v`` and target ``c``::

        z_c  = (o_c - mu) / sqrt(v + eps)
        loss = softplus(a * (b - (1 - label_smoothing) * z_c)) / a

    The loss does not change when the logits are shifted or scaled. ``a`` and ``b`` have no universally right
    value and must be tuned for the metric at hand: a grid of a in {0.1, 0.3, 1, 3} and b in {0, 4, 10, 30} is a
    start. ``z_c`` is at most ``sqrt(D - 1)``, so sensible ``b`` grows with the number of classes.

    Args:
        logits: ``[rows, D]``, float32, float64, bfloat16 or float16, any strides; differentiable.
        target: class indices, int64 or int32, ``[rows]``, or ``[rows, K]`` for K targets per row, whose losses
            add; duplicates count each time. Not differentiable, like all other arguments.
        a, b: slope (> 0) and margin of the softplus, no unit.
        eps: added to the variance (>= 0). With 0 a row of equal logits has loss softplus(a b)/a, gradient 0.
        weight: ``[D]``, logits' dtype: class weights; each target's loss is multiplied by that of its class.
        target_weight: shape of ``target``, logits' dtype: multiplies each target's loss; 0 marks padding.
        ignore_index: targets of this value do not count; a row without targets has loss and gradient 0,
            whatever its logits hold.
        label_smoothing: in [0, 1]. Smoothing only rescales ``z_c``, since the mean of ``z`` is 0.
        reduction: ``"none"`` (``[rows]``), ``"mean"`` or ``"sum"``. The mean divides by the number of rows that
            count, with ``weight`` by the sum over them of the mean class weight of their targets; it is NaN
            when no row counts, as in torch.
        inplace_backward: permits the backward to overwrite ``logits`` with their gradient (saves an
            allocation of their size); they must not be a leaf. Ignored under ``torch.compile``.
        safe_mean: gives 0 instead of NaN for a mean over no rows.
        out_dtype: dtype of the loss; logits' dtype by default (float32 under autocast).

    Returns:
        The loss, a scalar or ``[rows]``.

    Precision: sums in float32 for 16 terms of a vector lane and float64 above (float64 logits: float64
    throughout), merged by Chan's formula, so an offset of the logits costs no accuracy. Deterministic; on the
    CPU independent of the number of threads and of the other rows. Derivatives of any order: the first by a
    fused kernel, higher ones and ``torch.func`` transforms by composite torch code.

    Raises:
        RuntimeError: wrong shape, dtype, device or layout, or a weight that requires grad.
        IndexError: a target outside [0, D) that is not ``ignore_index`` (on CUDA: a device assert).
        ValueError, TypeError: a bad option.

    Source: arXiv 1604.08859, eq. 4.

    Example:
        >>> import torch, pyops
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]], requires_grad=True)
        >>> loss = pyops.z_loss(logits, torch.tensor([0, 2]), a=1.0, b=4.0)
        >>> loss.backward()
        >>> round(loss.item(), 4), bool(logits.grad.sum(1).abs().max() < 1e-6)
        (2.6947, True)
    """
    return _call(
        _Z, logits, target, a, b, eps, weight, target_weight, ignore_index, label_smoothing, reduction,
        inplace_backward, safe_mean, out_dtype,
    )  # fmt: skip


def taylor_softmax_loss(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    inplace_backward: bool = False,
    safe_mean: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Negative log-likelihood of the Taylor softmax, ``p_k = n(o_k) / sum_j n(o_j)``, ``n(o) = 1 + o + o**2/2``.

    ``n`` is at least 1/2, so no epsilon is needed. With ``label_smoothing`` s the loss of a row is
    ``-(1 - s) log p_c - s/D sum_k log p_k``.

    Arguments, shapes, dtypes, reductions, precision, determinism and errors: see :func:`pyops.z_loss`.
    Differentiable in ``logits``.

    Source: arXiv 1511.05042, section 2.

    Example:
        >>> import torch, pyops
        >>> round(pyops.taylor_softmax_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).item(), 4)
        0.3365
    """
    return _call(
        _TAYLOR_SOFTMAX, logits, target, 1.0, 0.0, 0.0, weight, target_weight, ignore_index, label_smoothing,
        reduction, inplace_backward, safe_mean, out_dtype,
    )  # fmt: skip


def spherical_softmax_loss(
    logits: Tensor,
    target: Tensor,
    *,
    eps: float = 0.1,
    weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    inplace_backward: bool = False,
    safe_mean: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Negative log-likelihood of the spherical softmax, ``p_k = (o_k**2 + eps) / sum_j (o_j**2 + eps)``.

    With ``label_smoothing`` s the loss of a row is ``-(1 - s) log p_c - s/D sum_k log p_k``.

    Args:
        eps: added to each square (>= 0); with 0 a target logit of 0 has infinite loss.

    Other arguments, shapes, dtypes, reductions, precision, determinism and errors: see :func:`pyops.z_loss`.
    Differentiable in ``logits``.

    Source: arXiv 1511.05042, section 2.

    Example:
        >>> import torch, pyops
        >>> loss = pyops.spherical_softmax_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), eps=1.0)
        >>> round(loss.item(), 4)
        0.1823
    """
    return _call(
        _SPHERICAL_SOFTMAX, logits, target, 1.0, 0.0, eps, weight, target_weight, ignore_index, label_smoothing,
        reduction, inplace_backward, safe_mean, out_dtype,
    )  # fmt: skip


def mse_onehot_loss(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    inplace_backward: bool = False,
    safe_mean: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Squared error against a one-hot target, ``sum_k (o_k - t_k)**2``, without forming the target.

    ``t_k = (1 - label_smoothing) [k = c] + label_smoothing / D``; summed, not averaged, over classes.

    Arguments, shapes, dtypes, reductions, precision, determinism and errors: see :func:`pyops.z_loss`.
    Differentiable in ``logits``.

    Source: arXiv 1412.7091, section 2.

    Example:
        >>> import torch, pyops
        >>> pyops.mse_onehot_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([0])).item()
        4.0
    """
    return _call(
        _MSE_ONEHOT, logits, target, 1.0, 0.0, 0.0, weight, target_weight, ignore_index, label_smoothing,
        reduction, inplace_backward, safe_mean, out_dtype,
    )  # fmt: skip
