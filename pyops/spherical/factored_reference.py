"""The factored output layer as plain torch code: ``W = V U + 1 omega^T``, its statistics, its SGD step, its upkeep.

Symbols as in arXiv 1412.7091 and 1604.08859: D classes, d features, m rows of input H, ``wbar = W^T 1``,
``C = W^T W - wbar wbar^T / D`` (the centred Gram matrix). A spherical loss of the logits ``o = W h`` has

    d loss / d o_k = beta (o_k - mu) + shift + sum_j g_j [k = c_j],    mu = wbar^T h / D

so that with ``S = H^T diag(beta) H`` one SGD step on W is, exactly,

    W <- W (I - lr S) - lr 1 (H^T (beta (H omega - mu) + shift))^T [the V U part of it is in the first term] - lr Y H

with Y the D x m sparse matrix of the ``g``. The first factor goes to U, the second to omega, and the sparse rows are
written as ``(Y H U_new^-1) U_new``: no row of V moves but those of the targets. Everything of size d or d x d is kept
in ``state_dtype`` (float64 unless asked otherwise). Nothing here costs more with more classes, except what says so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyops.spherical import reference

#: Rows of V that are worked on at a time where all are.
BLOCK_ROWS = 16384
#: Below this ratio of the smallest to the largest pivot of I - rate S, or to 1, the step would lose too many digits.
SMALLEST_PIVOT_RATIO = 1e-6


class State(NamedTuple):
    """The tensors of a layer, changed in place."""

    V: Tensor  # D x d
    U: Tensor  # d x d
    U_inv: Tensor  # d x d
    omega: Tensor  # d
    wbar: Tensor  # d
    C: Tensor  # d x d, exactly symmetric


class Options(NamedTuple):
    loss: str
    a: float
    b: float
    eps: float
    label_smoothing: float
    ignore_index: int
    reduction: str
    safe_mean: bool


class Targets(NamedTuple):
    """Which rows of V a batch needs, and with what weight."""

    index: Tensor  # m x K, safe to gather with
    omega: Tensor  # m x K, target weight times class weight; 0 where a target does not count
    row_weight: Tensor  # m, what the mean divides by the sum of


class Partials(NamedTuple):
    """Derivatives of the rows' losses by what they depend on, after the reduction's scaling."""

    beta: Tensor  # m
    shift: Tensor  # m
    target_gradient: Tensor  # m x K


# ---- statistics of a matrix --------------------------------------------------------------------------------------


def blocks(V: Tensor):
    """V in blocks of rows (views)."""
    return (V[begin : begin + BLOCK_ROWS] for begin in range(0, V.shape[0], BLOCK_ROWS))


def column_statistics(V: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(wbar, C) of V itself, summed in float64. Costs D d^2."""
    features = V.shape[1]
    wbar = torch.zeros(features, dtype=torch.float64, device=V.device)
    for block in blocks(V):
        wbar += block.double().sum(0)
    mean = wbar / max(V.shape[0], 1)
    C = torch.zeros(features, features, dtype=torch.float64, device=V.device)
    for block in blocks(V):
        centred = block.double() - mean
        C.addmm_(centred.T, centred)
    return wbar.to(dtype), (0.5 * (C + C.T)).to(dtype)


def restat(state: State) -> None:
    """Measures wbar and C anew from V, U and omega. Costs D d^2."""
    wbar, C = column_statistics(state.V, torch.float64)
    U, omega = state.U.double(), state.omega.double()
    state.wbar.copy_(U.T @ wbar + state.V.shape[0] * omega)
    C = U.T @ C @ U
    state.C.copy_(0.5 * (C + C.T))


# ---- forward -----------------------------------------------------------------------------------------------------


def targets_of(
    target: Tensor, target_weight: Tensor | None, weight: Tensor | None, ignore_index: int, dtype
) -> Targets:
    like = torch.empty((0,), dtype=dtype, device=target.device)
    wide = [None if t is None else t.to(dtype) for t in (target_weight, weight)]
    index, _, omega, row_weight = reference._targets(like, target, *wide, ignore_index)
    return Targets(index, omega, row_weight)


class Forward(NamedTuple):
    loss: Tensor
    normalizer: Tensor  # what the mean divides by
    partials: Partials  # before that division
    h: Tensor  # m x d, 0 in rows that do not count
    HC: Tensor  # m x d
    P: Tensor  # m x d


def forward(state: State, h: Tensor, targets: Targets, options: Options) -> Forward:
    """h in the state's dtype, with the constant of the bias."""
    classes = state.V.shape[0]
    ignored = (targets.omega == 0).all(1, keepdim=True)
    h = torch.where(ignored, torch.zeros_like(h), h)  # rows that do not count may hold anything
    HC, P = h @ state.C, h @ state.U.T
    squares = (HC * h).sum(1, keepdim=True).clamp(min=0)  # NaN stays NaN
    mean = (h @ state.wbar).unsqueeze(1) / classes
    chosen = (gathered(state.V, targets.index, h.dtype) * P.unsqueeze(1)).sum(2)
    chosen = chosen + (h @ state.omega).unsqueeze(1)
    return Forward(*losses_of_rows(targets, options, classes, squares, mean, chosen), h, HC, P)


def losses_of_rows(
    targets: Targets, options: Options, classes: int, squares: Tensor, mean: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor, Partials]:
    """What ``forward`` returns, from the rows' sums of (o - mean)^2, means (m x 1 each) and target logits (m x K)."""
    rows, width = targets.index.shape
    ignored = (targets.omega == 0).all(1, keepdim=True)
    _, a, b, eps, smoothing, _, reduction, safe_mean = options
    row = reference.row_partials(
        options.loss, a, b, eps, smoothing, classes, mean, squares, torch.zeros_like(mean), chosen, targets.omega
    )
    beta = row.slope * row.inverse_scale
    shift = row.shift if options.loss == "z" else row.shift + beta * mean
    zero = torch.zeros_like(beta)
    partials = Partials(
        torch.where(ignored, zero, beta).squeeze(1),
        torch.where(ignored, zero, shift).squeeze(1),
        row.target_gradient.reshape(rows, width),
    )
    loss = torch.where(ignored.squeeze(1), torch.zeros_like(row.loss), row.loss)
    normalizer = torch.ones((), dtype=mean.dtype, device=mean.device)
    if reduction == "mean":
        normalizer = targets.row_weight.sum()
        if safe_mean:
            normalizer = torch.where(normalizer == 0, torch.ones_like(normalizer), normalizer)
    return (loss if reduction == "none" else loss.sum() / normalizer), normalizer, partials


def gathered(V: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of V by class, m x K x d."""
    if V.shape[0] == 0:  # only ignored targets are legal
        return torch.zeros(*index.shape, V.shape[1], dtype=dtype, device=V.device)
    return V[index].to(dtype)


# ---- backward ----------------------------------------------------------------------------------------------------


class MicroBatch(NamedTuple):
    """What a backward leaves for the step on W, from a state that has not changed since."""

    target: Tensor  # m or m x K; not looked at where its gradient is 0
    partials: Tensor  # m x (2 + K), float64: the columns of Partials
    h: Tensor  # m x d
    HC: Tensor  # m x d, h C
    P: Tensor  # m x d, h U^T
    Z: Tensor  # m x d, what the target logits add to the gradient of h

    def read(self) -> tuple[Tensor, Partials]:
        """Indices that are safe to gather with, m x K, and the partials in the state's dtype."""
        partials = self.partials.to(self.h.dtype)
        g = partials[:, 2:]
        target = self.target.reshape(g.shape).long()
        return torch.where(g == 0, 0, target), Partials(partials[:, 0], partials[:, 1], g)


def target_part(state: State, index: Tensor, partials: Partials) -> Tensor:
    """Z, m x d: sum_j g_j (row c_j of W)."""
    g = partials.target_gradient
    Z = (g.unsqueeze(2) * gathered(state.V, index, g.dtype)).sum(1) @ state.U
    return Z.addcmul_(g.sum(1, keepdim=True), state.omega)


def input_gradient(state: State, HC: Tensor, partials: Partials, Z: Tensor) -> Tensor:
    """d loss / d h, m x d: ``beta (h C) + shift wbar + Z``."""
    beta, shift, _ = partials
    return beta.unsqueeze(1) * HC + shift.unsqueeze(1) * state.wbar + Z


def joined(batches: list[MicroBatch]) -> MicroBatch:
    """All rows in one batch; rows with fewer targets than others get targets that add nothing."""
    width = max(batch.partials.shape[1] for batch in batches)

    def padded(tensors: list[Tensor], columns: int) -> Tensor:
        return torch.cat([torch.nn.functional.pad(t, (0, columns - t.shape[1])) for t in tensors])

    target = padded(
        [batch.target.reshape(len(batch.h), batch.partials.shape[1] - 2).long() for batch in batches], width - 2
    )
    partials = padded([batch.partials for batch in batches], width)
    return MicroBatch(target, partials, *(torch.cat(rows) for rows in zip(*(b[2:] for b in batches), strict=True)))


class _Changes(NamedTuple):
    """What one step changes, all from the state before it."""

    S: Tensor  # d x d, H^T diag(beta) H
    A: Tensor  # d x d: C loses rate (A + A^T)
    omega: Tensor
    wbar: Tensor
    common: Tensor  # what every row of a dense W loses beside W S
    present: Tensor  # classes with a gradient
    sums: Tensor  # of g h, one row for each of them

    def finite(self) -> bool:
        return bool(sum(tensor.sum() for tensor in self if tensor.is_floating_point()).isfinite())


def _changes(state: State, batch: MicroBatch, rate: float) -> _Changes:
    _, _, _, omega, wbar, C = state
    classes, features = state.V.shape
    h, Z = batch.h, batch.Z
    index, (beta, shift, g) = batch.read()
    y = g.sum(1)
    Bh = beta.unsqueeze(1) * h
    S = h.T @ Bh
    mean = (h @ wbar) / classes
    Z = Z.sub(y.unsqueeze(1) * (wbar / classes))  # centred
    counts = g != 0
    present, place = torch.unique(index[counts], return_inverse=True)
    rows = (g.unsqueeze(2) * h.unsqueeze(1))[counts]  # one per target that counts
    sums = torch.zeros(present.shape[0], features, dtype=h.dtype, device=h.device).index_add_(0, place, rows)
    T = Bh @ C + Z
    # M H, with M = (P G)^T (P G) in classes, from products as long as the batch: no m x m matrix.
    MH = T @ S + Bh @ (Z.T @ h) - (y / classes).unsqueeze(1) * (y @ h)
    row = torch.arange(h.shape[0], device=h.device).unsqueeze(1).expand_as(index)[counts]
    MH.index_add_(0, row, g[counts].unsqueeze(1) * sums[place])
    T.sub_(MH, alpha=0.5 * rate)
    return _Changes(
        S=S,
        A=T.T @ h,
        omega=h.T @ (beta * (h @ omega - mean) + shift),
        wbar=h.T @ (classes * shift + y),
        common=h.T @ (shift - beta * mean),
        present=present,
        sums=sums,
    )


def step(state: State, batch: MicroBatch, rate: float, keep: float, shift_invariant: bool) -> str:
    """W <- keep (W - rate dW), in place. Returns "factored", or with nothing changed "singular" (U would be, see
    ``dense_step``) or "skipped" (something is not finite)."""
    V, U, U_inv, omega, wbar, C = state
    changes = _changes(state, batch, rate)
    S = changes.S
    factor = -rate * S
    factor.diagonal().add_(1)
    factors, pivots, _ = torch.linalg.lu_factor_ex(factor)
    diagonal = factors.diagonal().abs()
    if not (changes.finite() and bool(diagonal.isfinite().all())):
        return "skipped"
    if U.shape[0] > 0 and not bool(diagonal.min() > SMALLEST_PIVOT_RATIO * diagonal.max().clamp(min=1)):
        return "singular"
    # From here on the state changes.
    if not shift_invariant:  # else the gradients of a row sum to 0, and rounding must not move wbar
        wbar.sub_(changes.wbar, alpha=rate)
    C.sub_(changes.A + changes.A.T, alpha=rate)
    omega.sub_(changes.omega, alpha=rate)
    # Both as what is added to them: a product or a solution would round all of them anew at each step (float32 state,
    # 2,000 steps: an error of W of 3e-5, and 9e-5 in U U_inv).
    U.sub_(U @ S, alpha=rate)
    U_inv.add_(S @ torch.linalg.lu_solve(factors, pivots, U_inv), alpha=rate)
    _subtract_rows(V, changes.present, rate * (changes.sums @ U_inv))
    if keep != 1:
        for tensor, power in ((U, keep), (U_inv, 1 / keep), (omega, keep), (wbar, keep), (C, keep * keep)):
            tensor.mul_(power)
    return "factored"


def dense_step(state: State, batch: MicroBatch, rate: float, keep: float, shift_invariant: bool) -> None:
    """The same step where U would become singular: on all of W, 4 D d^2 flops."""
    V, U, _, _, wbar, C = state
    changes = _changes(state, batch, rate)
    factor = -rate * changes.S
    factor.diagonal().add_(1)
    if not shift_invariant:
        wbar.sub_(changes.wbar, alpha=rate)
    C.sub_(changes.A + changes.A.T, alpha=rate)
    unfactorize(state)
    for block in blocks(V):
        block.copy_(keep * (block.to(U.dtype) @ factor - rate * changes.common))
    _subtract_rows(V, changes.present, keep * rate * changes.sums)
    wbar.mul_(keep)
    C.mul_(keep * keep)


def _subtract_rows(V: Tensor, present: Tensor, rows: Tensor) -> None:
    V.index_put_((present,), (V[present].to(rows.dtype) - rows).to(V.dtype))


# ---- upkeep: W stays, its factors become well conditioned ----------------------------------------------------------


def unfactorize(state: State) -> None:
    """V <- W, U = I, omega = 0. One read and write of V, 2 D d^2 flops."""
    for block in blocks(state.V):
        block.copy_(block.to(state.U.dtype) @ state.U + state.omega)
    for tensor in (state.U, state.U_inv):
        tensor.zero_().diagonal().fill_(1)
    state.omega.zero_()


def stabilize(state: State) -> int:
    """Singular values of U outside [1/2, 2] become 1, their part moving into V. Returns how many: 4 D d flops each."""
    U = state.U.double()
    left, values, right = torch.linalg.svd(U)
    outside = (values < 0.5) | (values > 2)
    moved = int(outside.sum())
    if 3 * moved > U.shape[0]:
        unfactorize(state)
        return moved
    if moved:
        basis = left[:, outside]
        grown = (basis * (values[outside] - 1)).to(state.U.dtype)
        back = basis.T.to(state.U.dtype)
        for block in blocks(state.V):
            block.copy_(torch.addmm(block.to(state.U.dtype), block.to(state.U.dtype) @ grown, back))
    values = torch.where(outside, torch.ones_like(values), values)
    state.U.copy_((left * values) @ right)
    state.U_inv.copy_((right.T / values) @ left.T)
    return moved
