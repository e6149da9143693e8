"""Linear layer and softmax cross-entropy on blocks of logits, as plain torch code; see linear_loss_reference.py.

Per row, with targets c_j of weight omega_j (target weight times class weight), class weights w and smoothing s:

    loss = sum_j (1 - s) omega_j (lse - o_cj) + s / D own sum_k w_k (lse - o_k) + lse_square_scale lse^2
    d loss / d o_k = softmax(o)_k slope - s / D own w_k - sum_j (1 - s) omega_j [k = c_j]

where ``own`` sums the target weights of the row, and ``slope`` makes the sum over k what it is for the regulariser.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyops.spherical import factored_reference as factored
from pyops.spherical import linear_loss_reference as linear
from pyops.spherical.linear_loss_reference import TileGradients


class Call(NamedTuple):
    target: Tensor
    class_weight: Tensor | None
    target_weight: Tensor | None
    label_smoothing: float
    lse_square_scale: float
    ignore_index: int
    reduction: str
    safe_mean: bool


class Saved(NamedTuple):
    """What the backward needs beside the inputs; m rows, float64."""

    index: Tensor  # m x K
    omega: Tensor  # m x K
    smooth: Tensor  # m x 1, s / D own
    counts: Tensor  # m x 1, bool
    lse: Tensor  # m x 1
    divisor: Tensor  # of the loss
    z_divisor: Tensor  # of the regulariser


def target_weights(call: Call, dtype: torch.dtype) -> Tensor:
    """Without class weights, m x K; 0 where a target does not count."""
    return factored.targets_of(call.target, call.target_weight, None, call.ignore_index, dtype).omega


def forward(h: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """(loss, regulariser, lse m x 1, what the backward needs), float64."""
    index, omega, row_weight = factored.targets_of(
        call.target, call.target_weight, call.class_weight, call.ignore_index, torch.float64
    )
    own = target_weights(call, torch.float64)
    counts = (own != 0).any(1, keepdim=True)
    wide = linear.with_constant(torch.where(counts, h, torch.zeros_like(h)), bias)
    smooth = call.label_smoothing / max(weight.shape[0], 1) * own.sum(1, keepdim=True)
    lse, weighted = _log_sums(wide, weight, bias, call.class_weight if call.label_smoothing else None)
    terms = (1 - call.label_smoothing) * omega * (lse - linear.chosen_logits(wide, weight, bias, index))
    rows = torch.where(omega == 0, torch.zeros_like(terms), terms).sum(1, keepdim=True)
    if call.label_smoothing:
        rows = rows + smooth * (_total_weight(call, weight.shape[0]) * lse - weighted)
    z_rows = call.lse_square_scale * lse.square() if call.lse_square_scale else torch.zeros_like(lse)
    rows, z_rows, lse = (torch.where(counts, t, torch.zeros_like(t)) for t in (rows, z_rows, lse))
    divisor, z_divisor = (_divisor(t.sum(), call) for t in (row_weight, counts.double()))
    saved = Saved(index, omega, smooth, counts, lse, divisor, z_divisor)
    if call.reduction == "none":
        return (rows + z_rows).squeeze(1), z_rows.squeeze(1), lse, saved
    z_term = z_rows.sum() / z_divisor
    return rows.sum() / divisor + z_term, z_term, lse, saved


def backward(
    grad_loss: Tensor,
    grad_lse: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    saved: Saved,
    call: Call,
    wants_weight: bool,
) -> TileGradients:
    index, omega, smooth, counts, lse, *divisors = saved
    wide = linear.with_constant(torch.where(counts, h, torch.zeros_like(h)), bias)
    scale, z_scale = ((grad_loss.double() / d).expand(h.shape[0]).unsqueeze(1) for d in divisors)
    g = -(1 - call.label_smoothing) * omega * scale
    smooth = smooth * scale
    slope = smooth * _total_weight(call, weight.shape[0]) - g.sum(1, keepdim=True)
    slope = slope + 2 * call.lse_square_scale * lse * z_scale + grad_lse.double().unsqueeze(1)
    zero = torch.zeros_like(slope)
    g, smooth, slope = (torch.where(counts, t, zero) for t in (g, smooth, slope))
    gradients = TileGradients(wide, weight, bias, wants_weight)
    for begin, block in linear.blocks(weight, bias):
        gradient = ((wide.to(block.dtype) @ block.T).double() - lse).exp_().mul_(slope)
        if call.label_smoothing:
            end = begin + block.shape[0]
            gradient -= smooth * (1 if call.class_weight is None else call.class_weight[begin:end].double())
        gradients.add(begin, block, torch.where(counts, gradient, zero), index, g)
    return gradients


def _log_sums(wide: Tensor, weight: Tensor, bias: Tensor | None, class_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(log sum exp, sum of the class-weighted logits), m x 1 each."""
    largest = torch.full_like(wide[:, :1], -torch.inf)
    total, weighted = torch.zeros_like(largest), torch.zeros_like(largest)
    for begin, block in linear.blocks(weight, bias):
        logits = wide.to(block.dtype) @ block.T
        new = torch.maximum(largest, logits.amax(1, keepdim=True).double())
        shift = torch.where(new.isinf(), torch.zeros_like(new), new)
        here = (logits - shift.to(logits.dtype)).exp().sum(1, keepdim=True, dtype=torch.float64)
        total = total * (largest - shift).exp() + here
        largest = new
        own = logits if class_weight is None else logits * class_weight[begin : begin + block.shape[0]]
        weighted += own.sum(1, keepdim=True, dtype=torch.float64)
    shift = torch.where(largest.isinf(), torch.zeros_like(largest), largest)
    return total.log() + shift, weighted


def _total_weight(call: Call, classes: int) -> Tensor | int:
    return classes if call.class_weight is None else call.class_weight.double().sum()


def _divisor(total: Tensor, call: Call) -> Tensor:
    if call.reduction != "mean":
        return torch.ones_like(total)
    return torch.where(total == 0, torch.ones_like(total), total) if call.safe_mean else total
