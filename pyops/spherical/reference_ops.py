"""The ops of the family in torch code, with the ops' own arguments and outputs: the backend of last resort.

``statistics`` has the columns of ``csrc/spherical/spherical_loss_formula.h`` and ``cross_entropy_formula.h``, so
that the forward of one backend goes with the backward of another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyops import _dispatch
from pyops.spherical import _checks, reference
from pyops.spherical.reference import REDUCTIONS, accumulation_dtype


def _check_range(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if not target.is_cuda and bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        raise IndexError(
            f"pyops::{op}: target must be in [0, {classes}) or ignore_index {ignore_index}, got "
            f"{int(target[at])} at position {list(at)}"
        )


def _prepare(op, logits, target, target_weight, weight, ignore_index):
    """Logits in the accumulation dtype with ignored rows zeroed, and what the targets contribute, in float64."""
    _check_range(op, target, logits.shape[1], ignore_index)
    double = [None if t is None else t.double() for t in (target_weight, weight)]
    if logits.shape[1] == 0:  # only ignored rows are legal: give them one class to gather from
        logits = logits.new_zeros((logits.shape[0], 1))
        double[1] = None
    index, own, omega, row_weight = reference._targets(logits.double()[:, :1], target, *double, ignore_index)
    ignored = (own == 0).all(1, keepdim=True)
    values = torch.where(ignored, torch.zeros_like(logits), logits).double()
    return values, index, own, omega, row_weight, ignored


def _reduced(rows, reduction, divisor, dtype):
    return (rows if reduction == 0 else rows.sum() / divisor).to(dtype)


def _divisor(total: Tensor, reduction: int, safe_mean: bool) -> Tensor:
    if reduction != 1:
        return torch.ones_like(total)
    return torch.where(total == 0, torch.ones_like(total), total) if safe_mean else total


def spherical_loss(
    logits, target, target_weight, weight, loss, a, b, eps, label_smoothing, ignore_index, reduction, safe_mean,
    out_dtype,
):  # fmt: skip
    name = _checks.spherical_name(loss)
    loss = reference.SPHERICAL_LOSSES[loss]
    _checks.spherical_options(name, a, b, eps)
    _checks.forward(name, logits, target, target_weight, weight, label_smoothing, reduction, out_dtype)
    o, index, _own, omega, row_weight, ignored = _prepare(name, logits, target, target_weight, weight, ignore_index)
    mean = o.mean(1, keepdim=True)
    squares = torch.where(mean.isfinite(), o - mean, o).square().sum(1, keepdim=True)
    log_sum = torch.zeros_like(mean)
    if label_smoothing and loss in ("taylor_softmax", "spherical_softmax"):
        n = 1 + o + 0.5 * o.square() if loss == "taylor_softmax" else o.square() + eps
        log_sum = n.log().sum(1, keepdim=True)
    row = reference.row_partials(
        loss, a, b, eps, label_smoothing, o.shape[1], mean, squares, log_sum, o.gather(1, index), omega
    )
    rows, scale, slope, shift, smooth, target_gradient = row
    wide = accumulation_dtype(logits.dtype)
    center = torch.zeros_like(mean)
    if loss == "z":  # what rounding the mean loses goes into the shift
        center = mean.to(wide).double()
        shift = shift - slope * ((mean - center) * scale)
    statistics = torch.cat([center, scale, slope, shift, smooth, target_gradient], 1)
    statistics = torch.where(ignored, torch.zeros_like(statistics), statistics)
    divisor = _divisor(row_weight.sum(), reduction, safe_mean)
    return _reduced(rows, reduction, divisor, out_dtype or logits.dtype), statistics, divisor


def _add_targets(grad, logits, target, gradients, scale):
    counts = gradients != 0
    index = torch.where(counts, target if target.dim() == 2 else target.unsqueeze(1), 0).long()
    if logits.shape[1]:
        grad.scatter_add_(1, index, torch.where(counts, gradients * scale, torch.zeros_like(gradients)))
    return grad


def spherical_loss_backward(grad_loss, logits, target, statistics, normalizer, loss, eps):
    name = _checks.spherical_name(loss, "_backward")
    loss = reference.SPHERICAL_LOSSES[loss]
    _checks.backward(name, grad_loss, logits, target, statistics, normalizer, 5, 1)
    row = statistics.double()
    center, inverse, slope, shift, smooth = (row[:, i : i + 1] for i in range(5))
    zero = (inverse == 0) & (slope == 0) & (shift == 0) & (smooth == 0)
    scale = (grad_loss.double() / normalizer).expand(logits.shape[0]).unsqueeze(1)
    o = torch.where(zero, torch.zeros_like(logits), logits).double()
    grad = scale * (slope * ((o - center) * inverse) + shift)
    if loss in ("taylor_softmax", "spherical_softmax"):
        term = (1 + o) / (1 + o + 0.5 * o * o) if loss == "taylor_softmax" else 2 * o / (o * o + eps)
        grad = torch.where(smooth == 0, grad, grad + scale * smooth * term)
    grad = torch.where(zero, torch.zeros_like(grad), grad)
    return _add_targets(grad, logits, target, row[:, 5:], scale).to(logits.dtype)


def cross_entropy(
    logits, target, target_weight, weight, label_smoothing, lse_square_scale, ignore_index, reduction, safe_mean,
    out_dtype,
):  # fmt: skip
    name = "cross_entropy"
    _checks.forward(name, logits, target, target_weight, weight, label_smoothing, reduction, out_dtype)
    _checks.lse_square_scale(lse_square_scale)
    o, index, own, omega, row_weight, ignored = _prepare(name, logits, target, target_weight, weight, ignore_index)
    classes = o.shape[1]
    class_weight = torch.ones_like(o[:1]) if weight is None else weight.double().unsqueeze(0)
    maximum = o.max(1, keepdim=True).values
    total = (o - maximum).exp().sum(1, keepdim=True)
    log_sum = total.log()
    lse = maximum + log_sum
    share = (1 - label_smoothing) * omega
    losses = share * ((maximum - o.gather(1, index)) + log_sum)
    rows = torch.where(omega == 0, torch.zeros_like(losses), losses).sum(1)
    if classes == 1:
        share = torch.zeros_like(share)  # the softmax is 1 whatever the logit
    slope = share.sum(1, keepdim=True)
    smooth = torch.zeros_like(slope)
    if label_smoothing and classes > 1:
        smooth = label_smoothing / classes * own.sum(1, keepdim=True)
        rows = rows + (smooth * (class_weight * (lse - o)).sum(1, keepdim=True)).squeeze(1)
        slope = slope + smooth * class_weight.expand_as(o).sum(1, keepdim=True)
    z_rows, z_slope = torch.zeros_like(rows), torch.zeros_like(slope)
    if lse_square_scale:
        z_rows = (lse_square_scale * lse.square()).squeeze(1)
        z_slope = 2 * lse_square_scale * lse / total
    statistics = torch.cat([maximum, slope / total, z_slope, smooth, -share], 1)
    statistics = torch.where(ignored, torch.zeros_like(statistics), statistics)
    hidden = ignored.squeeze(1)
    rows = torch.where(hidden, torch.zeros_like(rows), rows)
    z_rows = torch.where(hidden, torch.zeros_like(z_rows), z_rows)
    totals = torch.stack([row_weight.sum(), (~hidden).sum().double()])
    divisor = _divisor(totals, reduction, safe_mean)
    dtype = out_dtype or logits.dtype
    combined = rows + z_rows * (divisor[0] / divisor[1]) if lse_square_scale else rows
    return (
        _reduced(combined, reduction, divisor[0], dtype),
        _reduced(z_rows, reduction, divisor[1], dtype),
        statistics,
        divisor,
    )


def cross_entropy_backward(grad_loss, logits, target, weight, statistics, normalizer):
    _checks.backward("cross_entropy_backward", grad_loss, logits, target, statistics, normalizer, 4, 2)
    row = statistics.double()
    maximum, slope, z_slope, smooth = (row[:, i : i + 1] for i in range(4))
    zero = (slope == 0) & (z_slope == 0) & (smooth == 0)
    upstream = grad_loss.double().expand(logits.shape[0]).unsqueeze(1)
    scale = upstream / normalizer[0]
    z_part = torch.where(z_slope == 0, torch.zeros_like(z_slope), z_slope / normalizer[1])
    o = torch.where(zero, torch.zeros_like(logits), logits).double()
    grad = (scale * slope + upstream * z_part) * (o - maximum).exp()
    grad = grad - scale * smooth * (1 if weight is None else weight.double())
    grad = torch.where(zero, torch.zeros_like(grad), grad)
    return _add_targets(grad, logits, target, row[:, 4:], scale).to(logits.dtype)


def _in_place(backward):
    def run(grad_loss, logits, *rest):
        logits.copy_(backward(grad_loss, logits, *rest))

    return run


_dispatch.register(
    "spherical",
    "spherical.spherical_loss",
    spherical_loss=spherical_loss,
    spherical_loss_backward=spherical_loss_backward,
    spherical_loss_backward_=_in_place(spherical_loss_backward),
)
_dispatch.register(
    "spherical",
    "spherical.cross_entropy",
    cross_entropy=cross_entropy,
    cross_entropy_backward=cross_entropy_backward,
    cross_entropy_backward_=_in_place(cross_entropy_backward),
)

assert REDUCTIONS == ("none", "mean", "sum")  # the ops' codes are positions in this tuple
