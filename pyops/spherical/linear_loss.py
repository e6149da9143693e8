"""``spherical_linear_loss``: a linear layer and a spherical loss whose logits never exist, for any optimizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyops._autograd import outside_graph, reject, transform_level_active
from pyops.spherical import factored_reference as factored
from pyops.spherical import linear_loss_reference as formulas
from pyops.spherical import reference
from pyops.spherical._linear_options import check_linear, loss_options
from pyops.spherical.factored_reference import Options, Partials
from pyops.spherical.linear_loss_reference import Statistics, WeightGradient
from pyops.spherical.reference import accumulation_dtype

_OP = "spherical_linear_loss"
_METHODS = ("auto", "gram", "tiles")


class GramCache:
    """Several micro-batches, one gradient of the weight: inside the block a call of :func:`spherical_linear_loss` with
    ``gram=`` costs ``O(m d^2)``, whatever the number of classes; on leaving, the gradient of all of them is formed once
    and added to ``weight.grad`` (and ``bias.grad``).

    Args:
        weight: ``[D, d]``, a leaf that requires grad. It must not change inside the block.
        bias: ``[D]`` or None.

    A backward inside the block gives the gradient of h and none of the weight. An exception drops the sums.

    Raises:
        RuntimeError: the weight changed inside, a block within a block, or use outside of it.

    Example:
        >>> import torch, pyops
        >>> W = torch.nn.Parameter(torch.randn(1000, 16))
        >>> with pyops.GramCache(W) as gram:
        ...     for h, target in zip(torch.randn(4, 8, 16), torch.randint(1000, (4, 8))):
        ...         pyops.spherical_linear_loss(h, W, target, gram=gram).backward()
        >>> W.grad.shape
        torch.Size([1000, 16])
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is None and name == "bias":
                continue
            if not isinstance(tensor, Tensor):
                reject("GramCache", name, "be a Tensor", type(tensor).__name__, TypeError)
            if not tensor.is_leaf:
                reject("GramCache", name, "be a leaf, which has a .grad", "the output of an operation")
        self.weight, self.bias = weight, bias
        self._statistics: Statistics | None = None
        self._parts: list[WeightGradient] = []
        self._version: tuple[int, ...] = ()

    def _versions(self) -> tuple[int, ...]:
        return tuple(tensor._version for tensor in (self.weight, self.bias) if tensor is not None)

    def _known(self, weight: Tensor, bias: Tensor | None) -> Statistics:
        if self._statistics is None:
            raise RuntimeError("pyops::GramCache: gram must be used inside its `with` block, got a call outside of it")
        if weight is not self.weight or bias is not self.bias:
            reject(_OP, "gram", "be that of weight and bias", "a cache of other tensors")
        self._check_unchanged()
        return self._statistics

    def _check_unchanged(self) -> None:
        if self._versions() != self._version:
            raise RuntimeError("pyops::GramCache: weight must not change inside the block, got a changed one")

    def _add(self, part: WeightGradient | None) -> None:
        if self._statistics is None:  # nobody would form the gradient that this belongs to
            raise RuntimeError("pyops::GramCache: backward must be inside the `with` block, got one after its end")
        self._check_unchanged()
        if part is not None:
            self._parts.append(part)

    @torch.no_grad()
    def __enter__(self) -> GramCache:
        if self._statistics is not None:
            raise RuntimeError("pyops::GramCache: a block must not be nested in itself, got a second one")
        self._version = self._versions()
        with torch.autocast(self.weight.device.type, enabled=False):
            self._statistics = formulas.statistics(self.weight, self.bias)
        return self

    @torch.no_grad()
    def __exit__(self, error, *_) -> None:
        parts, self._parts, self._statistics = self._parts, [], None
        if error is not None or not parts:
            return
        self._check_unchanged()
        with torch.autocast(self.weight.device.type, enabled=False):
            gradients = formulas.weight_gradient(self.weight, self.bias, parts)
        for tensor, gradient in zip((self.weight, self.bias), gradients, strict=True):
            if tensor is not None and tensor.requires_grad:
                tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient


def spherical_linear_loss(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    loss: str = "z",
    a: float | None = None,
    b: float | None = None,
    eps: float | None = None,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    safe_mean: bool = False,
    gram: GramCache | None = None,
    method: str = "auto",
) -> Tensor:
    r"""The spherical loss of the logits ``h @ weight.T + bias``, which are never formed, for any optimizer.

    A spherical loss depends on the D logits of a row through their sum, the sum of their squares and the target logits
    only, so ``wbar = W^T 1`` and ``C = W^T W - wbar wbar^T / D`` stand for all of W in the forward, and
    ``dW = W S + 1 t^T + (rows of the targets)``, ``S = H^T diag(beta) H``, in the backward: ``2 D d^2`` multiply-adds
    where a dense layer has ``3 m D d``. With fewer rows than d / 2, blocks of logits are computed, twice.

    Args:
        h: ``[m, d]``, float32, float64, bfloat16 or float16; differentiable.
        weight: ``[D, d]``, dtype of h; differentiable.
        target: class indices, int64 or int32, ``[m]``, or ``[m, K]`` for K targets per row, whose losses add.
        loss: ``"z"`` (:func:`pyops.z_loss`), ``"taylor_softmax"``, ``"spherical_softmax"`` or ``"mse_onehot"``.
        a, b, eps: options of the loss, as in its function on logits; others than its own are rejected.
        bias: ``[D]``, dtype of h; differentiable.
        class_weight: ``[D]``, floating: multiplies each target's loss by that of its class.
        target_weight: shape of target, floating: multiplies each target's loss; 0 marks padding.
        ignore_index: targets of this value do not count.
        label_smoothing: in [0, 1], for ``"z"`` and ``"mse_onehot"`` (the others would need all logits).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        safe_mean: gives 0 instead of NaN for a mean over no rows.
        gram: a :class:`pyops.GramCache` of weight and bias, inside its block: what only depends on them is shared by
            all calls, and the gradient of the weight is formed once, when the block ends.
        method: ``"gram"``, ``"tiles"`` (blocks of logits, computed twice) or ``"auto"``, the cheaper one.

    Returns:
        The loss, a scalar or ``[m]``; float32 for inputs narrower than that.

    Precision: products with W in float32 (float64 for float64 inputs), everything of size m, d or d x d in float64.
    Deterministic on the CPU. Extra memory: a few d x d and m x d matrices (``"tiles"``: m x 4,096). Derivatives of any
    order: higher ones and ``torch.func`` transforms by composite torch code, which forms the logits.

    Raises:
        RuntimeError: wrong shape, dtype or device.
        IndexError: a target outside [0, D) that is not ``ignore_index``.
        ValueError, TypeError: a bad option.
        NotImplementedError: a second derivative or a transform with ``gram``.

    Source: the loss of arXiv 1604.08859; the Gram matrix as in arXiv 1412.7091, section 3, with an explicit gradient.

    Example:
        >>> import torch, pyops
        >>> h, W = torch.randn(8, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
        >>> loss = pyops.spherical_linear_loss(h, W, torch.arange(8), loss="z", b=2.0)
        >>> loss.backward()
        >>> bool(torch.allclose(loss, pyops.z_loss(h @ W.T, torch.arange(8), b=2.0), atol=1e-5))
        True
    """
    options = loss_options(_OP, loss, a, b, eps, label_smoothing, ignore_index, reduction, safe_mean)
    if method not in _METHODS:
        reject(_OP, "method", f"be one of {', '.join(map(repr, _METHODS))}", repr(method), ValueError)
    tensors = {"h": h, "weight": weight, "target": target, "bias": bias, "class_weight": class_weight,
               "target_weight": target_weight}  # fmt: skip
    check_linear(_OP, tensors, ignore_index)
    if gram is not None and not isinstance(gram, GramCache):
        reject(_OP, "gram", "be a GramCache or None", type(gram).__name__, TypeError)
    if gram is not None and method == "tiles":
        reject(_OP, "method", "not be 'tiles' with gram", repr(method), ValueError)
    by_gram = method == "gram" or gram is not None or (method == "auto" and 2 * h.shape[0] >= h.shape[1])
    call = _Call(target, class_weight, target_weight, options, gram, by_gram)
    return _composite(h, weight, bias, call) if transform_level_active() else _run(h, weight, bias, call)


class _Call(NamedTuple):
    target: Tensor
    class_weight: Tensor | None
    target_weight: Tensor | None
    options: Options
    gram: GramCache | None
    by_gram: bool


def _composite(h: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
    """The loss of all logits as differentiable torch code, for transforms and derivatives of any order."""
    if call.gram is not None:
        raise NotImplementedError(
            f"pyops::{_OP}: gram takes part in no second derivative or transform: it forms the weight's gradient once, "
            "when its block ends; call without it"
        )
    loss, a, b, eps, smoothing, ignore_index, reduction, safe_mean = call.options
    wide = accumulation_dtype(h.dtype)
    h, weight, bias, target_weight, class_weight = (
        None if t is None else t.to(wide) for t in (h, weight, bias, call.target_weight, call.class_weight)
    )
    return reference.spherical_loss(
        nn.functional.linear(h, weight, bias), call.target, target_weight, class_weight, loss=loss, a=a, b=b, eps=eps,
        label_smoothing=smoothing, ignore_index=ignore_index, reduction=reduction, safe_mean=safe_mean,
    )  # fmt: skip


@outside_graph
def _run(h: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
    return _SphericalLinearLoss.apply(h, weight, bias, call)


class _SphericalLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, call):
        with torch.autocast(h.device.type, enabled=False):
            targets = factored.targets_of(
                call.target, call.target_weight, call.class_weight, call.options.ignore_index, torch.float64
            )
            counts = (targets.omega != 0).any(1, keepdim=True)
            wide = formulas.with_constant(torch.where(counts, h, torch.zeros_like(h)), bias)
            if call.by_gram:
                known = formulas.statistics(weight, bias) if call.gram is None else call.gram._known(weight, bias)
                loss, normalizer, partials = formulas.gram_forward(wide, weight, bias, known, targets, call.options)
            else:
                loss, normalizer, partials, mean = formulas.tiles_forward(wide, weight, bias, targets, call.options)
                known = (mean,)
        ctx.call = call
        ctx.save_for_backward(h, weight, bias, normalizer, counts, targets.index, *partials, *known)
        return loss.to(accumulation_dtype(h.dtype))

    @staticmethod
    def backward(ctx, grad_loss):
        h, weight, bias, normalizer, counts, index, beta, shift, g, *known = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient itself as differentiable code, to any order
            return *formulas.differentiable_gradients(
                lambda *tensors: _composite(*tensors, ctx.call), (h, weight, bias), ctx.needs_input_grad, grad_loss
            ), None
        wants_h, wants_weight, wants_bias, _ = ctx.needs_input_grad
        wants = wants_weight or wants_bias
        gram = ctx.call.gram
        with torch.autocast(h.device.type, enabled=False):
            wide = formulas.with_constant(torch.where(counts, h, torch.zeros_like(h)), bias)
            scale = (grad_loss.double() / normalizer).expand(h.shape[0]).unsqueeze(1)
            scale = torch.where(counts, scale, torch.zeros_like(scale))  # a mean over no rows
            partials = Partials(beta * scale.squeeze(1), shift * scale.squeeze(1), g * scale)
            dw = db = None
            if ctx.call.by_gram:
                dh, part = formulas.gram_backward(wide, weight, bias, Statistics(*known), index, partials, wants)
                if gram is not None:
                    gram._add(part)
                elif part is not None:
                    dw, db = formulas.weight_gradient(weight, bias, [part])
            else:
                tiles = formulas.tiles_backward(wide, weight, bias, index, known[0], partials, wants)
                dh, dw, db = tiles.dh, tiles.dw, tiles.db
        dh = dh[:, : h.shape[1]].to(h.dtype) if wants_h else None
        return dh, dw if wants_weight else None, db if wants_bias else None, None


class SphericalLinearLoss(nn.Module):
    """A weight (and bias) with :func:`pyops.spherical_linear_loss`: ``forward(h, target)`` is the loss; ``logits(h)``.

    Args:
        in_features, out_features, bias, device, dtype: as ``torch.nn.Linear``, whose initial weights it has.
        options: keyword arguments of :func:`pyops.spherical_linear_loss`.

    Example:
        >>> import torch, pyops
        >>> layer = pyops.nn.SphericalLinearLoss(16, 1000, loss="taylor_softmax")
        >>> loss = layer(torch.randn(8, 16), torch.arange(8))
        >>> loss.backward()
        >>> layer.weight.grad.shape
        torch.Size([1000, 16])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options,
    ) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight, self.bias = linear.weight, linear.bias
        self.options = options

    def forward(self, h: Tensor, target: Tensor, target_weight: Tensor | None = None, **more) -> Tensor:
        options = {**self.options, **more}
        return spherical_linear_loss(h, self.weight, target, bias=self.bias, target_weight=target_weight, **options)

    def logits(self, h: Tensor) -> Tensor:
        """``[m, D]``, for evaluation."""
        return nn.functional.linear(h, self.weight, self.bias)

    def extra_repr(self) -> str:
        shown = f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, bias={self.bias is not None}"
        return shown + "".join(f", {name}={value!r}" for name, value in self.options.items())
