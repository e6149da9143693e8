"""The losses of the spherical family as plain torch code: the slow, obvious formulas.

They accept float64, are differentiable to any order in ``logits`` and compose with every ``torch.func``
transform. They are what the kernels are tested against, what second derivatives and transforms run, and the
backend of last resort.
"""

from __future__ import annotations

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
