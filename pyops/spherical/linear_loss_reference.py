"""Linear layer and spherical loss without the logits, as plain torch code, in two ways.

``gram``: the logits ``o = W h`` enter the loss through ``wbar = W^T 1``, ``C = W^T W - wbar wbar^T / D`` and the target
logits only, and ``dW = W S + 1 t^T + (sparse rows)`` with ``S = H^T diag(beta) H``, ``t = H^T (shift - beta mu)``:
``2 D d^2`` multiply-adds whatever the number of rows. ``tiles``: logits of a block of classes at a time, thrown away
and computed again: ``4 m D d``. A bias is a last column of W beside a constant feature 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyops.spherical import factored_reference as factored
from pyops.spherical.factored_reference import Options, Partials, Targets
from pyops.spherical.reference import accumulation_dtype

#: Classes per block; a block of float32 logits of 512 rows takes 8 MiB.
BLOCK_CLASSES = 4096


class Statistics(NamedTuple):
    """wbar and C of a weight (with its bias), float64."""

    wbar: Tensor
    C: Tensor


class WeightGradient(NamedTuple):
    """dW in the form in which batches can be added up: ``W S + 1 t^T``, and rows to add to those of some classes."""

    S: Tensor  # d x d
    t: Tensor  # d
    classes: Tensor  # n
    rows: Tensor  # n x d


def blocks(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """(first class, rows of [W, bias] in the accumulation dtype)."""
    wide = accumulation_dtype(weight.dtype)
    for begin in range(0, weight.shape[0], BLOCK_CLASSES):
        block = weight[begin : begin + BLOCK_CLASSES].to(wide)
        if bias is not None:
            block = torch.cat([block, bias[begin : begin + BLOCK_CLASSES].to(wide).unsqueeze(1)], 1)
        yield begin, block


def with_constant(h: Tensor, bias: Tensor | None) -> Tensor:
    h = h.double()
    return h if bias is None else torch.nn.functional.pad(h, (0, 1), value=1.0)


#: Rows whose products are summed in the weight's dtype; what lies beyond is summed in float64. A library's own sum may
#: be one chain: 3,000 rows of float32 were 1.3e-5 off on one processor, 1e-6 on another.
_SUMMED_ROWS = 256
#: Of products held at a time, so that they stay in the cache.
_SUMMED_NUMBERS = 1 << 20


def statistics(weight: Tensor, bias: Tensor | None) -> Statistics:
    """One pass for the sums and one for the products of what is left when the mean is gone: no cancellation."""
    features = weight.shape[1] + (bias is not None)
    wbar = torch.zeros(features, dtype=torch.float64, device=weight.device)
    for _, block in blocks(weight, bias):
        wbar += block.sum(0, dtype=torch.float64)
    mean = wbar / max(weight.shape[0], 1)
    C = torch.zeros(features, features, dtype=torch.float64, device=weight.device)
    for _, block in blocks(weight, bias):
        centred = block - mean.to(block.dtype)
        for part in centred.split(_SUMMED_ROWS * max(1, _SUMMED_NUMBERS // max(features, 1) ** 2)):
            whole = part.shape[0] // _SUMMED_ROWS * _SUMMED_ROWS
            stretches = part[:whole].unflatten(0, (-1, _SUMMED_ROWS))
            C += torch.bmm(stretches.mT, stretches).sum(0, dtype=torch.float64)
            C += part[whole:].T @ part[whole:]
    # What rounding the mean left in each column: the mean square of the sums that are not quite 0.
    rest = mean - mean.to(accumulation_dtype(weight.dtype)).double()
    return Statistics(wbar, 0.5 * (C + C.T) - weight.shape[0] * torch.outer(rest, rest))


def chosen_logits(h: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """Logits of the targets, m x K, float64."""
    rows = factored.gathered(weight, index, torch.float64)
    logits = torch.einsum("mkd,md->mk", rows, h[:, : weight.shape[1]])
    return logits if bias is None or not weight.shape[0] else logits + bias[index].double()


# ---- by the Gram matrix --------------------------------------------------------------------------------------------


def gram_forward(
    h: Tensor, weight: Tensor, bias: Tensor | None, known: Statistics, targets: Targets, options: Options
) -> tuple[Tensor, Tensor, Partials]:
    classes = weight.shape[0]
    squares = ((h @ known.C) * h).sum(1, keepdim=True).clamp(min=0)
    mean = (h @ known.wbar).unsqueeze(1) / classes
    chosen = chosen_logits(h, weight, bias, targets.index)
    return factored.losses_of_rows(targets, options, classes, squares, mean, chosen)


def gram_backward(
    h: Tensor, weight: Tensor, bias: Tensor | None, known: Statistics, index: Tensor, partials: Partials, wants: bool
) -> tuple[Tensor, WeightGradient | None]:
    """(dH with the column of the constant, what dW is made of if that is wanted)."""
    beta, shift, g = partials
    features = weight.shape[1]
    Bh = beta.unsqueeze(1) * h
    dh = Bh @ known.C + shift.unsqueeze(1) * known.wbar
    dh[:, :features] += torch.einsum("mk,mkd->md", g, factored.gathered(weight, index, torch.float64))
    if not wants:
        return dh, None
    mean = (h @ known.wbar) / weight.shape[0]
    counts = g != 0
    present, place = torch.unique(index[counts], return_inverse=True)
    rows = (g.unsqueeze(2) * h.unsqueeze(1))[counts]
    sums = torch.zeros(present.shape[0], h.shape[1], dtype=h.dtype, device=h.device).index_add_(0, place, rows)
    return dh, WeightGradient(h.T @ Bh, h.T @ (shift - beta * mean), present, sums)


def weight_gradient(weight: Tensor, bias: Tensor | None, parts: list[WeightGradient]) -> tuple[Tensor, Tensor | None]:
    """(dW, dbias) from the sum of some batches: one read of W, one write of dW."""
    S, t = sum(part.S for part in parts), sum(part.t for part in parts)
    classes, order = torch.cat([part.classes for part in parts]).sort(stable=True)
    rows = torch.cat([part.rows for part in parts])[order]
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    db = None if bias is None else torch.empty_like(bias)
    for begin, block in blocks(weight, bias):
        end = begin + block.shape[0]
        first, last = (int(torch.searchsorted(classes, bound)) for bound in (begin, end))
        gradient = torch.addmm(t.to(block.dtype), block, S.to(block.dtype))
        gradient.index_add_(0, classes[first:last] - begin, rows[first:last].to(block.dtype))
        dw[begin:end] = gradient[:, : weight.shape[1]]
        if db is not None:
            db[begin:end] = gradient[:, -1]
    return dw, db


# ---- by blocks of logits -------------------------------------------------------------------------------------------


class TileGradients:
    """dH (with the column of the constant), dW and dbias, from the gradients of one block of logits after another."""

    def __init__(self, h: Tensor, weight: Tensor, bias: Tensor | None, wants_weight: bool) -> None:
        self._h = h
        self.dh = torch.zeros_like(h)
        self.dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if wants_weight else None
        self.db = torch.empty_like(bias) if wants_weight and bias is not None else None

    def add(self, begin: int, block: Tensor, gradient: Tensor, index: Tensor, g: Tensor) -> None:
        """``gradient`` is m x classes of the block, without what the targets add: ``g`` at ``index``, m x K."""
        end = begin + block.shape[0]
        inside = (index >= begin) & (index < end) & (g != 0)
        gradient.scatter_add_(1, torch.where(inside, index - begin, 0), torch.where(inside, g, torch.zeros_like(g)))
        gradient = gradient.to(block.dtype)
        self.dh += gradient @ block
        if self.dw is None:
            return
        rows = gradient.T @ self._h.to(block.dtype)
        self.dw[begin:end] = rows[:, : self.dw.shape[1]]
        if self.db is not None:
            self.db[begin:end] = rows[:, -1]


def tiles_forward(
    h: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets, options: Options
) -> tuple[Tensor, Tensor, Partials, Tensor]:
    """As ``gram_forward``, and the rows' means, m x 1."""
    mean, squares = torch.zeros_like(h[:, :1]), torch.zeros_like(h[:, :1])
    for begin, block in blocks(weight, bias):
        logits = h.to(block.dtype) @ block.T
        here = logits.mean(1, keepdim=True, dtype=torch.float64)
        inside = (logits - here.to(logits.dtype)).square().sum(1, keepdim=True, dtype=torch.float64)
        total = begin + block.shape[0]
        delta = here - mean
        mean = mean + delta * (block.shape[0] / total)
        squares = squares + inside + delta.square() * (begin * block.shape[0] / total)
    chosen = chosen_logits(h, weight, bias, targets.index)
    return *factored.losses_of_rows(targets, options, weight.shape[0], squares, mean, chosen), mean


def tiles_backward(
    h: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, mean: Tensor, partials: Partials, wants: bool
) -> TileGradients:
    beta, shift, g = (part.unsqueeze(1) if part.dim() == 1 else part for part in partials)
    gradients = TileGradients(h, weight, bias, wants)
    for begin, block in blocks(weight, bias):
        logits = (h.to(block.dtype) @ block.T).double()
        gradients.add(begin, block, (logits - mean).mul_(beta).add_(shift), index, g)
    return gradients


# ---- higher derivatives --------------------------------------------------------------------------------------------


def differentiable_gradients(
    composite: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: tuple[Tensor | None, ...],
    wanted: Sequence[bool],
    grads: Tensor | tuple[Tensor, ...],
) -> list[Tensor | None]:
    """Gradients of ``composite(*tensors)`` by those of them that are wanted, with a graph of their own."""
    chosen = [i for i, tensor in enumerate(tensors) if tensor is not None and wanted[i]]
    found = torch.autograd.grad(composite(*tensors), [tensors[i] for i in chosen], grads, create_graph=True)
    gradients: list[Tensor | None] = [None] * len(tensors)
    for i, gradient in zip(chosen, found, strict=True):
        gradients[i] = gradient
    return gradients
