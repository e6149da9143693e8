"""The losses of the spherical family as plain torch code: the slow, obvious formulas.

They accept float64, are differentiable to any order in ``logits`` and compose with every ``torch.func``
transform. They are what the kernels are tested against, what second derivatives and transforms run, and the
backend of last resort.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")
SPHERICAL_LOSSES = ("z", "taylor_softmax", "spherical_softmax", "mse_onehot")  # by the number that the ops take


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics of float64 logits are float64, of all others float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _targets(logits, target, target_weight, weight, ignore_index):
    """(index, target weight, weight with class weight, row weight): index m x K is safe to gather with,
    the weights m x K are 0 where a target does not count; the row weight m is the mean class weight over the
    targets that count, 0 for ignored rows."""
    index = (target if target.dim() == 2 else target.unsqueeze(1)).long()
    counts = index != ignore_index
    own = torch.ones((), dtype=logits.dtype, device=logits.device).expand(index.shape)
    if target_weight is not None:
        own = target_weight if target_weight.dim() == 2 else target_weight.unsqueeze(1)
        counts = counts & (own != 0)
    index = torch.where(counts, index, 0)
    own = torch.where(counts, own, 0)
    classes = torch.ones_like(own) if weight is None else weight[index]
    classes = torch.where(counts, classes, 0)
    row_weight = classes.sum(1) / counts.sum(1).clamp(min=1)
    return index, own, own * classes, row_weight


def _reduce(rows: Tensor, normalizer: Tensor, reduction: str, safe_mean: bool) -> Tensor:
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    if safe_mean:
        return torch.where(normalizer == 0, torch.zeros_like(total), total / normalizer)
    return total / normalizer


def _rows(logits, target, target_weight, weight, ignore_index):
    """Adds the gathered target logits and hides the logits of ignored rows, which may hold anything."""
    index, own, omega, row_weight = _targets(logits, target, target_weight, weight, ignore_index)
    ignored = (own == 0).all(1)
    logits = torch.where(ignored.unsqueeze(1), torch.zeros_like(logits), logits)
    return logits, logits.gather(1, index), own, omega, row_weight, ignored


class RowPartials(NamedTuple):
    """A row's loss and the numbers of csrc/spherical/spherical_loss_formula.h, each m x 1 but the last, m x K."""

    loss: Tensor  # m
    inverse_scale: Tensor
    slope: Tensor
    shift: Tensor
    smooth: Tensor
    target_gradient: Tensor


def row_partials(
    loss: str,
    a: float,
    b: float,
    eps: float,
    label_smoothing: float,
    classes: int,
    mean: Tensor,
    squares: Tensor,
    log_sum: Tensor,
    chosen: Tensor,
    omega: Tensor,
) -> RowPartials:
    """From a row's mean, sum of (o - mean)^2, sum of log n(o) (for a smoothed softmax) and target logits, float64.

    ``d loss / d o_k = slope * ((o_k - center) * inverse_scale) + shift + smooth * smooth_term(o_k)``, plus the target
    gradients at the targets; the centre is the mean for "z" and 0 otherwise."""
    keep = 1 - label_smoothing
    sum_of_squares = torch.where(squares.isposinf(), squares, squares + classes * mean.square())
    scale, smooth = torch.ones_like(mean), torch.zeros_like(mean)
    if loss == "z":
        sigma = (squares / classes + eps).sqrt()
        scale = torch.where((sigma == 0) | (classes == 1), torch.zeros_like(sigma), 1 / sigma)
        z = (chosen - mean) * scale
        u = a * (b - keep * z)
        rho = omega * keep * torch.sigmoid(u)
        terms = omega * torch.logaddexp(u, torch.zeros_like(u)) / a
        slope = (rho * z).sum(1, keepdim=True) * scale / classes
        shift = rho.sum(1, keepdim=True) * scale / classes
        target_gradient = -rho * scale
        if classes == 2:  # z^2 = v / (v + eps): what is left of the gradient is eps / (v + eps), without cancellation
            target_gradient = target_gradient * (eps * scale.square())
            slope, shift = torch.zeros_like(slope), -0.5 * target_gradient.sum(1, keepdim=True)
    elif loss == "mse_onehot":
        constant = keep * keep + (2 * keep + label_smoothing) * label_smoothing / classes
        cross = 2 * (keep * chosen + label_smoothing * mean)
        terms = omega * (sum_of_squares - cross.where(sum_of_squares.isfinite(), 0) + constant)
        slope = 2 * omega.sum(1, keepdim=True)
        shift = -slope * label_smoothing / classes
        target_gradient = -2 * omega * keep
    else:
        taylor = loss == "taylor_softmax"
        total = classes * (1 + mean + 0.5 * mean.square()) + 0.5 * squares if taylor else sum_of_squares + classes * eps
        n = 1 + chosen + 0.5 * chosen.square() if taylor else chosen.square() + eps
        terms = omega * (total.log() - keep * n.log() - label_smoothing / classes * log_sum)
        weights = omega.sum(1, keepdim=True)
        # At the largest logits slope = 1/total is below float32, although slope * o is not.
        huge = (sum_of_squares > 1e30 * classes) & sum_of_squares.isfinite()
        scale = torch.where(huge, torch.exp2(-(0.5 * (sum_of_squares / classes).log2()).floor()), scale)
        slope = weights / total * (1 if taylor else 2) / scale
        shift = weights / total if taylor else torch.zeros_like(total)
        smooth = -weights * label_smoothing / classes
        target_gradient = -omega * keep * (1 + chosen if taylor else 2 * chosen) / n
        if classes == 1:  # the probability is 1 whatever the logit
            slope, shift, smooth = (torch.zeros_like(slope) for _ in range(3))
            target_gradient = torch.zeros_like(target_gradient)
    rows = torch.where(omega == 0, torch.zeros_like(terms), terms).sum(1)
    target_gradient = torch.where(omega == 0, torch.zeros_like(omega), target_gradient)
    return RowPartials(rows, scale, slope, shift, smooth, target_gradient)


def spherical_loss(
    logits: Tensor,
    target: Tensor,
    target_weight: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    loss: str,
    a: float = 1.0,
    b: float = 4.0,
    eps: float = 1e-12,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    safe_mean: bool = False,
) -> Tensor:
    """``sum_j t_j w_{c_j} f(s, q, o_{c_j})`` per row, reduced; arXiv 1604.08859 and 1511.05042."""
    if logits.shape[1] == 0:  # only ignored rows are legal here
        rows = logits.sum(1)
        return _reduce(rows, torch.zeros_like(rows.sum()), reduction, safe_mean)
    classes = logits.shape[1]
    logits, chosen, _, omega, row_weight, ignored = _rows(logits, target, target_weight, weight, ignore_index)
    keep = 1 - label_smoothing
    if loss == "z":
        mean = logits.mean(1, keepdim=True)
        variance = (logits - mean).square().mean(1, keepdim=True) + eps
        flat = variance == 0  # equal logits and eps = 0: z is 0 and so is its gradient
        sigma = torch.where(flat, torch.ones_like(variance), variance).sqrt()
        z = torch.where(flat, torch.zeros_like(chosen), (chosen - mean) / sigma)
        margin = a * (b - keep * z)
        terms = torch.logaddexp(margin, torch.zeros_like(margin)) / a
    elif loss == "mse_onehot":
        squares = logits.square().sum(1, keepdim=True)
        mean = logits.mean(1, keepdim=True)
        constant = keep * keep + (2 * keep + label_smoothing) * label_smoothing / classes
        terms = squares - 2 * (keep * chosen + label_smoothing * mean) + constant
        terms = torch.where(squares.isposinf(), squares, terms)
    else:
        if loss == "taylor_softmax":
            unnormalised = 1 + logits + 0.5 * logits.square()
            chosen = 1 + chosen + 0.5 * chosen.square()
        else:
            unnormalised = logits.square() + eps
            chosen = chosen.square() + eps
        log_total = unnormalised.sum(1, keepdim=True).log()
        terms = log_total - keep * chosen.log()
        if label_smoothing:
            terms = terms - label_smoothing * unnormalised.log().mean(1, keepdim=True)
    rows = torch.where(omega == 0, torch.zeros_like(terms), omega * terms).sum(1)
    rows = torch.where(ignored, torch.zeros_like(rows), rows)
    return _reduce(rows, row_weight.sum(), reduction, safe_mean)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    target_weight: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    safe_mean: bool = False,
) -> tuple[Tensor, Tensor]:
    """(loss with the regulariser included, the regulariser alone)."""
    if logits.shape[1] == 0:
        rows = logits.sum(1)
        empty = _reduce(rows, torch.zeros_like(rows.sum()), reduction, safe_mean)
        return empty, empty
    classes = logits.shape[1]
    logits, chosen, own, omega, row_weight, ignored = _rows(logits, target, target_weight, weight, ignore_index)
    log_probability = torch.log_softmax(logits, 1)
    chosen = log_probability.gather(1, _targets(logits, target, target_weight, weight, ignore_index)[0])
    rows = -torch.where(omega == 0, torch.zeros_like(chosen), (1 - label_smoothing) * omega * chosen).sum(1)
    if label_smoothing:
        smooth = -(log_probability if weight is None else weight * log_probability).sum(1)
        rows = rows + label_smoothing / classes * own.sum(1) * smooth
    rows = torch.where(ignored, torch.zeros_like(rows), rows)
    counted = (~ignored).sum().to(rows.dtype)
    if lse_square_scale == 0:
        z_rows = torch.zeros_like(rows)
    else:
        z_rows = lse_square_scale * torch.logsumexp(logits, 1).square()
        z_rows = torch.where(ignored, torch.zeros_like(z_rows), z_rows)
    z_term = _reduce(z_rows, counted, reduction, safe_mean)
    return _reduce(rows, row_weight.sum(), reduction, safe_mean) + z_term, z_term
