"""``linear_cross_entropy``: a linear layer and softmax cross-entropy on blocks of logits, with their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from pyops._autograd import outside_graph, reject, transform_level_active
from pyops.spherical import linear_cross_entropy_reference as formulas
from pyops.spherical import reference
from pyops.spherical._linear_options import check_linear
from pyops.spherical._options import AT_LEAST_0, SHARE, reject_options
from pyops.spherical.linear_cross_entropy_reference import Call, Saved
from pyops.spherical.linear_loss_reference import differentiable_gradients
from pyops.spherical.reference import REDUCTIONS, accumulation_dtype

_OP = "linear_cross_entropy"


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    reduction: str = "mean",
    safe_mean: bool = False,
    return_z_loss: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    r""":func:`pyops.cross_entropy` of the logits ``h @ weight.T + bias``, of which a block of classes exists at a time.

    Per row ``lse - o_c + lse_square_scale * lse^2`` with ``lse = log sum_k exp(o_k)``. The backward computes each block
    again: ``4 m D d`` multiply-adds where a dense layer takes ``3 m D d``, and ``m x 4,096`` logits in memory, not
    ``m D``. A spherical loss needs neither: :func:`pyops.spherical_linear_loss`.

    Args:
        h: ``[m, d]``, float32, float64, bfloat16 or float16; differentiable.
        weight: ``[D, d]``, dtype of h; differentiable.
        target: class indices, int64 or int32, ``[m]``, or ``[m, K]`` for K targets per row, whose losses add.
        bias: ``[D]``, dtype of h; differentiable.
        class_weight: ``[D]``, floating: multiplies each target's loss by that of its class.
        target_weight: shape of target, floating: multiplies each target's loss; 0 marks padding.
        ignore_index: targets of this value do not count.
        label_smoothing: in [0, 1], as in ``torch.nn.functional.cross_entropy``.
        lse_square_scale: of the regulariser that language-model training calls z-loss (>= 0).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. As in :func:`pyops.cross_entropy` the regulariser's mean is over
            the rows that count, whatever their class weights.
        safe_mean: gives 0 instead of NaN for a mean over no rows.
        return_z_loss: also returns the regulariser alone, detached.
        return_lse: also returns ``lse``, ``[m]``, differentiable; 0 in rows that do not count.

    Returns:
        The loss (float32 for narrower inputs), or a tuple ``(loss[, z_term][, lse])``.

    Precision: logits in float32 (float64 for float64 inputs), everything of size m in float64. Deterministic on the
    CPU. Derivatives of any order: higher ones and ``torch.func`` transforms by composite torch code, which forms all
    logits.

    Raises:
        RuntimeError: wrong shape, dtype or device.
        IndexError: a target outside [0, D) that is not ``ignore_index``.
        ValueError, TypeError: a bad option.

    Example:
        >>> import torch, pyops
        >>> h, W = torch.randn(8, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
        >>> loss, lse = pyops.linear_cross_entropy(h, W, torch.arange(8), lse_square_scale=1e-4, return_lse=True)
        >>> loss.backward()
        >>> bool(torch.allclose(lse, torch.logsumexp(h @ W.T, 1), atol=1e-5))
        True
    """
    reject_options(
        _OP, ignore_index, label_smoothing=(label_smoothing, SHARE), lse_square_scale=(lse_square_scale, AT_LEAST_0)
    )
    if reduction not in REDUCTIONS:
        reject(_OP, "reduction", "be one of 'none', 'mean', 'sum'", repr(reduction), ValueError)
    tensors = {"h": h, "weight": weight, "target": target, "bias": bias, "class_weight": class_weight,
               "target_weight": target_weight}  # fmt: skip
    check_linear(_OP, tensors, ignore_index)
    call = Call(
        target, class_weight, target_weight, label_smoothing, lse_square_scale, ignore_index, reduction, safe_mean
    )
    loss, z_term, lse = (_composite if transform_level_active() else _run)(h, weight, bias, call)
    more = [z_term] if return_z_loss else []
    more += [lse] if return_lse else []
    return (loss, *more) if more else loss


def _composite(h: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, regulariser, lse) of all logits as differentiable torch code."""
    wide = accumulation_dtype(h.dtype)
    h, weight, bias, target_weight, class_weight = (
        None if t is None else t.to(wide) for t in (h, weight, bias, call.target_weight, call.class_weight)
    )
    counts = (formulas.target_weights(call, wide) != 0).any(1, keepdim=True)
    logits = torch.nn.functional.linear(torch.where(counts, h, torch.zeros_like(h)), weight, bias)
    loss, z_term = reference.cross_entropy(
        logits, call.target, target_weight, class_weight, label_smoothing=call.label_smoothing,
        lse_square_scale=call.lse_square_scale, ignore_index=call.ignore_index, reduction=call.reduction,
        safe_mean=call.safe_mean,
    )  # fmt: skip
    lse = torch.logsumexp(logits, 1)
    return loss, z_term.detach(), torch.where(counts.squeeze(1), lse, torch.zeros_like(lse))


@outside_graph
def _run(h: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return _LinearCrossEntropy.apply(h, weight, bias, call)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, call):
        with torch.autocast(h.device.type, enabled=False):
            loss, z_term, lse, saved = formulas.forward(h, weight, bias, call)
        ctx.call = call
        ctx.save_for_backward(h, weight, bias, *saved)
        dtype = accumulation_dtype(h.dtype)
        z_term, lse = z_term.to(dtype, copy=True), lse.squeeze(1).to(dtype, copy=True)
        ctx.mark_non_differentiable(z_term)
        return loss.to(dtype), z_term, lse

    @staticmethod
    def backward(ctx, grad_loss, _, grad_lse):
        h, weight, bias, *saved = ctx.saved_tensors
        wants_h, wants_weight, wants_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph: the gradient itself as differentiable code, to any order
            return *differentiable_gradients(
                lambda *tensors: _composite(*tensors, ctx.call)[::2], (h, weight, bias), ctx.needs_input_grad,
                (grad_loss, grad_lse),
            ), None  # fmt: skip
        with torch.autocast(h.device.type, enabled=False):
            tiles = formulas.backward(
                grad_loss, grad_lse, h, weight, bias, Saved(*saved), ctx.call, wants_weight or wants_bias
            )
        dh = tiles.dh[:, : h.shape[1]].to(h.dtype) if wants_h else None
        return dh, tiles.dw if wants_weight else None, tiles.db if wants_bias else None, None
