"""A low-rank correction of ternary weights, for what rounding has lost or for adapters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pyops._autograd import reject
from pyops._checks import device, dtype_name, shape_name
from pyops.ternary import _checks, _options, reference
from pyops.ternary._formats import CANONICAL, code
from pyops.ternary.linear import linear_packed
from pyops.ternary.quantize_weight import _op as _op_quantize
from pyops.ternary.repack import repack, unpack

_NAME = "bitlinear_lowrank"


def pack_weight(weight: Tensor, fmt: str, options: tuple, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(packed, gamma') of a weight all of whose elements are finite; ``options`` are those of the op."""
    code("pack", "fmt", fmt, CANONICAL)
    packed, gamma = _op_quantize(weight.detach(), None if scale is None else scale.detach(), *options)
    if not gamma.is_meta and not bool(gamma.isfinite().all()):
        wrong = (~weight.detach().isfinite()).nonzero()
        if len(wrong) == 0:
            reject("pack", "scale", "be finite", scale, ValueError)
        row, column = wrong[0].tolist()
        reject("pack", "weight", "be finite", f"{weight[row, column].item():g} at [{row}, {column}]", ValueError)
    return repack(packed, "t2", fmt, *weight.shape), gamma


def weight_options(op: str, measure: str, granularity: str, eps: float, eps_mode: str) -> tuple:
    """The options of the quantizing op behind its tensors."""
    return (
        _options.choice(op, "measure", measure, reference.MEASURES),
        _options.per_row(op, granularity),
        _options.positive_eps(op, eps),
        _options.eps_mode(op, eps_mode),
    )


def factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A = U sqrt(S) and B = sqrt(S) V^T of the leading singular triples of a float64 matrix, from the
    eigenvectors of its smaller Gram matrix."""
    if error.shape[0] > error.shape[1]:
        B, A = factors(error.T, rank)
        return A.T, B.T
    squares, vectors = torch.linalg.eigh(error @ error.T)
    U = vectors[:, squares.shape[0] - rank :].flip(1)
    root = squares[squares.shape[0] - rank :].flip(0).clamp(min=0).sqrt().sqrt()
    # U U^T E is the best approximation; sqrt(S) only shares the scale out among A and B
    inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
    return U * root, inverse[:, None] * (U.T @ error)


@torch.no_grad()
def low_rank_compensation(
    weight: Tensor,
    rank: int,
    *,
    fmt: str = "t2",
    measure: str = "absmean",
    granularity: str = "tensor",
    eps: float = 1e-5,
    eps_mode: str = "clamp",
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Ternary weights and the best correction of a given rank: ``W ~ T gamma + A B``.

    ``E = W - T gamma = U S V^T``; ``A = U_r sqrt(S_r)``, ``B = sqrt(S_r) V_r^T``: no other matrix of that rank is
    nearer to E, in the spectral or the Frobenius norm.

    Args:
        weight: ``[out_features, in_features]``, float32, bfloat16 or float16, finite.
        rank: from 0 to the smaller size of the weight.
        fmt: ``"t2"`` or ``"t5"``; the others as in :func:`pyops.ternary.quantize_weight`.

    Returns:
        ``(packed, gamma, A, B)`` for :func:`bitlinear_lowrank`: as :func:`pyops.ternary.pack` and
        :func:`pyops.ternary.quantize_weight` give them, and ``[out_features, rank]``, ``[rank, in_features]`` in the
        dtype of the weight.

    Not differentiable. Computed in float64; deterministic as far as ``torch.linalg.eigh`` is. Errors: ValueError for
    a weight that is not finite or a bad option, RuntimeError for a tensor that does not fit.

    Source: LoRC of ZeroQuant-V2, arXiv 2303.08302, section 5.

    Example:
        >>> import torch, pyops
        >>> W = torch.randn(16, 32)
        >>> packed, gamma, A, B = pyops.ternary.low_rank_compensation(W, 16)
        >>> T = pyops.ternary.unpack(packed, "t2", 32)
        >>> torch.allclose(T * gamma + A @ B, W, atol=1e-5)
        True
    """
    op = "low_rank_compensation"
    _options.tensor(op, "weight", weight)
    _options.tensor(op, "scale", scale, optional=True)
    if weight.dim() != 2:
        reject(op, "weight", "have shape [out_features, in_features]", shape_name(weight))
    check_rank(op, rank, *weight.shape)
    packed, gamma = pack_weight(weight, fmt, weight_options(op, measure, granularity, eps, eps_mode), scale)
    ternary = unpack(packed, fmt, weight.shape[1])
    A, B = factors(weight.double() - reference.dequantized(ternary, gamma, torch.float64), rank)
    return packed, gamma, A.to(weight.dtype).contiguous(), B.to(weight.dtype).contiguous()


def check_rank(op: str, rank: object, out_features: int, in_features: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        reject(op, "rank", "be a whole number", type(rank).__name__, TypeError)
    if not 0 <= rank <= min(out_features, in_features):
        reject(op, "rank", f"be in [0, {min(out_features, in_features)}]", rank, ValueError)


def _check_factor(name: str, factor: Tensor, shape: tuple[int, int], x: Tensor) -> None:
    _options.tensor(_NAME, name, factor)
    device(_NAME, name, factor, x, "x")
    if tuple(factor.shape) != shape:
        reject(_NAME, name, f"have shape {list(shape)}", shape_name(factor))
    if factor.dtype != x.dtype and _options.autocast_dtype(x) is None:
        reject(_NAME, name, f"be {dtype_name(x.dtype)} like x", dtype_name(factor.dtype))


def bitlinear_lowrank(
    x: Tensor,
    packed: Tensor,
    gamma: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    fmt: str = "t2",
    in_features: int,
    out_features: int | None = None,
    act: str | None = "int8",
    qmax: int = 127,
    eps: float = 1e-5,
    alpha: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""``y = x_q @ (T gamma)^T + bias + alpha (x B^T) A^T``: packed ternary weights and a correction of low rank.

    The correction of :func:`low_rank_compensation`, or an adapter trained on frozen ternary weights; it sees x before
    rounding.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16; differentiable.
        A: ``[out_features, rank]`` and B: ``[rank, in_features]``, dtype of x; differentiable.
        alpha: factor of the correction.
        packed, gamma, bias, fmt, in_features, out_features, act, qmax, eps, out_dtype: as in
            :func:`pyops.ternary.linear_packed`; differentiable in bias.

    Returns:
        ``[..., out_features]`` in the dtype of x, or ``out_dtype``.

    Precision: the ternary part as in ``linear_packed``; ``x B^T`` and its product with A are torch matrix products in
    the dtype of x; the sum of both parts is rounded once, from float32. Deterministic as torch's products are. Under
    autocast as ``linear_packed``. First derivatives. Errors: RuntimeError for tensors that do not fit, FormatError for
    bytes that stand for no weight, ValueError for options.

    Source: arXiv 2303.08302, section 5; adapters as in 2106.09685.

    Example:
        >>> import torch, pyops
        >>> W, x = torch.randn(16, 32), torch.randn(4, 32)
        >>> packed, gamma, A, B = pyops.ternary.low_rank_compensation(W, 8)
        >>> A.requires_grad_(), B.requires_grad_()  # doctest: +ELLIPSIS
        (tensor(...
        >>> y = pyops.ternary.bitlinear_lowrank(x, packed, gamma, A, B, in_features=32)
        >>> y.square().mean().backward()
        >>> A.grad.shape, B.grad.shape
        (torch.Size([16, 8]), torch.Size([8, 32]))
    """
    if out_dtype is not None and out_dtype not in _checks.FLOATING:
        reject(_NAME, "out_dtype", "be float32, bfloat16 or float16", dtype_name(out_dtype))
    wide = linear_packed(
        x, packed, gamma, bias, fmt=fmt, in_features=in_features, out_features=out_features, act=act, qmax=qmax,
        eps=eps, out_dtype=torch.float32,
    )  # fmt: skip
    _options.tensor(_NAME, "A", A)
    rank = A.shape[1] if A.dim() == 2 else 0
    _check_factor("A", A, (wide.shape[-1], rank), x)
    _check_factor("B", B, (rank, in_features), x)
    correction = functional.linear(functional.linear(x, B), A)
    return (wide + alpha * correction.float()).to(out_dtype or correction.dtype)
