"""``FactoredSphericalLinear``: an output layer that takes its own SGD steps, at a cost without the classes' number."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pyops import _dispatch, _packed_state
from pyops._autograd import below_autograd, outside_graph, reject, transform_level_active
from pyops._checks import FormatError, dtype_name, shape_name
from pyops.spherical import factored_ops as ops
from pyops.spherical import factored_reference as factored
from pyops.spherical import reference
from pyops.spherical._linear_options import TAKES, check_kinds, check_targets, loss_options
from pyops.spherical._options import AT_LEAST_0, POSITIVE, reduction_code, reject_options
from pyops.spherical.factored_reference import MicroBatch, State

_op = torch.ops.pyops.factored_linear.default
_op_gradient = torch.ops.pyops.factored_linear_gradient.default
_op_step = torch.ops.pyops.factored_linear_step_.default

_OP = "FactoredSphericalLinear"
_LOSS_CODES = {name: code for code, name in enumerate(TAKES)}
_STATE = ("V", "U", "U_inv", "omega", "wbar", "C")
_HEADER = "V_header"
#: How far the condition of U may go. The error of a step grows with its square: at 300 five classes were followed to
#: 3e-11 after 500 steps, where dense SGD that starts 1e-15 away ends 1e-14 away.
_WORST_CONDITION = {torch.float64: 100.0, torch.float32: 10.0}
_GOOD_CONDITION = 2.0
#: Most of the time that upkeep may take beside the steps, by the flops of both.
_UPKEEP_SHARE = 0.1
#: A singular value decomposition takes as long as this many d^3 flops of products (8 to 30 ms at d = 256, where a step
#: of 128 rows takes 7).
_SVD_WEIGHT = 50
_COUNTERS = ("steps", "since_upkeep", "stabilizations", "unfactorizations", "singular_steps", "skipped_steps")
_STATE_CHANGED = (
    f"pyops::{_OP}: state changed between forward and backward; two forwards before a backward, or a state loaded "
    "between them, need `with layer.accumulate():`"
)


class FactoredSphericalLinear(nn.Module):
    r"""Linear layer and spherical loss in one, which also takes the layer's SGD step, in ``O(batch d^2)``: the cost of
    a step does not grow with the number of classes ``D``.

    The weight is held as ``W = V U + 1 omega^T`` with ``V`` ``[D, d]``, the only tensor of size D. A loss that depends
    on the logits ``o = W h`` only through their sum, the sum of their squares and the target logits needs just
    ``wbar = W^T 1`` and ``C = W^T W - wbar wbar^T / D``; its gradient step changes U, omega, wbar, C and the rows of V
    of the batch's targets. W after any number of steps is that of dense SGD, to rounding::

        loss = layer(h, target)   # in train(): h [m, d], target [m] or [m, K]
        loss.backward()           # the gradient of h, and W <- (1 - lr weight_decay) W - lr dW, once

    Args:
        in_features, out_features: d and D.
        bias: adds one bias per class: a constant feature of value ``bias_scale``, trained and decayed like the others.
        loss: ``"z"`` (:func:`pyops.z_loss`; not a likelihood), ``"taylor_softmax"``, ``"spherical_softmax"`` or
            ``"mse_onehot"``.
        a, b, eps: options of the loss, as in its function on logits; others than its own are rejected.
        lr, weight_decay: of this layer's SGD, whose update is that of ``torch.optim.SGD`` without momentum.
            ``lr * weight_decay`` must be below 1. See :meth:`set_lr` and :class:`LRHook`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``[D]`` class weights, or None.
        ignore_index: targets of this value do not count.
        label_smoothing: in [0, 1], for ``"z"`` and ``"mse_onehot"``; the softmax alternatives would need all logits.
        safe_mean: gives 0 instead of NaN for a mean over no rows.
        state_dtype: of everything of size d or d x d: float64, or float32 (faster, and about as exact as
            dense float32 SGD).
        stabilize_every: steps after which U is looked after (W stays what it is). The period is lengthened where
            upkeep would take more than a tenth of the time, and cut short where U becomes ill-conditioned.
        device, dtype: of V, float32 or float64. A later ``.half()`` or ``.to(dtype)`` moves the layer, but changes no
            dtype of it.

    Buffers, not parameters, hold the state, so that no optimiser touches it: momentum and Adam have no factored form.
    Gradient clipping does not act on this layer. Differentiable in ``h``: in ``train()`` once, in ``eval()`` to any
    order and under ``torch.func`` transforms, by code that forms the logits. A gradient that is not finite leaves the
    state alone and is counted in :attr:`stats`, as are singular steps, in which one SGD step annihilates a direction of
    W: they are taken densely. In ``eval()`` or without grad mode nothing is updated.

    Precision: sums in ``state_dtype``; the loss has the dtype of h (float32 for narrower ones). Deterministic on the
    CPU. After ``torch.compile`` the loss is still computed outside of the graph.

    Raises:
        RuntimeError: wrong shape, dtype or device of an input; the state changed between forward and backward.
        IndexError: a target outside [0, D) that is not ``ignore_index``.
        ValueError, TypeError: a bad option.
        FormatError: a state_dict of another layer, or one that was changed.
        NotImplementedError: a second derivative or a transform in ``train()``.

    Source: arXiv 1412.7091 (factored update), 1604.08859 (Z-loss).

    Example:
        >>> import torch, pyops
        >>> layer = pyops.nn.FactoredSphericalLinear(16, 1000, lr=0.5)
        >>> h = torch.randn(8, 16, requires_grad=True)
        >>> loss = layer(h, torch.arange(8))
        >>> loss.backward()
        >>> h.grad.shape, layer.stats["steps"], layer.topk(h, 5).indices.shape
        (torch.Size([8, 16]), 1, torch.Size([8, 5]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        loss: str = "z",
        a: float | None = None,
        b: float | None = None,
        eps: float | None = None,
        lr: float = 0.1,
        weight_decay: float = 0.0,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        safe_mean: bool = False,
        bias_scale: float = 1.0,
        state_dtype: torch.dtype = torch.float64,
        stabilize_every: int = 50,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        for name, value, least in (
            ("in_features", in_features, 0),
            ("out_features", out_features, 1),
            ("stabilize_every", stabilize_every, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool):
                reject(_OP, name, "be an int", type(value).__name__, TypeError)
            if value < least:
                reject(_OP, name, f"be at least {least}", value, ValueError)
        if dtype not in _WORST_CONDITION:
            reject(_OP, "dtype", "be float32 or float64", dtype_name(dtype), ValueError)
        if state_dtype not in _WORST_CONDITION:
            reject(_OP, "state_dtype", "be float32 or float64", dtype_name(state_dtype), ValueError)
        self.options = loss_options(_OP, loss, a, b, eps, label_smoothing, ignore_index, reduction, safe_mean)
        reject_options(_OP, ignore_index, weight_decay=(weight_decay, AT_LEAST_0), bias_scale=(bias_scale, POSITIVE))
        self.in_features, self.out_features = in_features, out_features
        self.bias_scale = float(bias_scale) if bias else None
        self.weight_decay, self.stabilize_every = float(weight_decay), stabilize_every
        self.grad_scale = 1.0
        if weight is not None and not isinstance(weight, Tensor):
            reject(_OP, "weight", "be a Tensor or None", type(weight).__name__, TypeError)
        if weight is not None and tuple(weight.shape) != (out_features,):
            reject(_OP, "weight", f"have shape [{out_features}]", shape_name(weight))
        features = in_features + bool(bias)
        like = {"device": device, "dtype": state_dtype}
        self.register_buffer("V", torch.empty(out_features, features, device=device, dtype=dtype))
        self.register_buffer("U", torch.empty(features, features, **like))
        self.register_buffer("U_inv", torch.empty(features, features, **like))
        self.register_buffer("omega", torch.empty(features, **like))
        self.register_buffer("wbar", torch.empty(features, **like))
        self.register_buffer("C", torch.empty(features, features, **like))
        self.register_buffer("weight", None if weight is None else weight.detach().clone().to(**like))
        self.register_buffer("lr", torch.zeros((), device=device, dtype=torch.float64))
        self.register_buffer("counters", torch.zeros(len(_COUNTERS), device=device, dtype=torch.int64))
        self._pending: list[MicroBatch] | None = None
        self._most_rows = 0
        self.set_lr(lr)
        if not self.V.is_meta:
            self.reset_parameters()

    # ---- weights in and out --------------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """W as ``torch.nn.Linear`` initialises its weight and bias; all counters 0."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        initial = torch.empty_like(self.V).uniform_(-bound, bound)
        if self.bias_scale is not None:
            initial[:, -1] /= self.bias_scale
        self._set(initial)

    @torch.no_grad()
    def _set(self, W: Tensor) -> None:
        self.V.copy_(W)
        for tensor in (self.U, self.U_inv):
            tensor.zero_().diagonal().fill_(1)
        self.omega.zero_()
        self.counters.zero_()
        self.restat()

    @torch.no_grad()
    def restat(self) -> None:
        """Measures ``wbar`` and ``C`` anew from the weight; costs ``D d^2``. Training does not need it."""
        factored.restat(self._state())

    def _state(self) -> State:
        return State(*(self._buffers[name] for name in _STATE))

    @torch.no_grad()
    def materialize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W ``[D, in_features]``, with a bias ``[D, in_features + 1]`` whose last column is the bias of the classes."""
        dtype = dtype or self.V.dtype
        W = torch.empty(self.V.shape, dtype=dtype, device=self.V.device)
        for begin, block in self._blocks():
            W[begin : begin + block.shape[0]] = block.to(self.U.dtype) @ self.U + self.omega
        if self.bias_scale is not None:
            W[:, -1] *= self.bias_scale
        return W

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        return zip(range(0, self.out_features, factored.BLOCK_ROWS), factored.blocks(self.V), strict=True)

    def to_linear(self) -> nn.Linear:
        """``torch.nn.Linear`` with the materialised weight."""
        W = self.materialize()
        bias = self.bias_scale is not None
        linear = nn.Linear(self.in_features, self.out_features, bias, device="meta", dtype=W.dtype)
        linear.weight = nn.Parameter(W[:, : self.in_features].contiguous())
        if bias:
            linear.bias = nn.Parameter(W[:, -1].contiguous())
        return linear.train(self.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> FactoredSphericalLinear:
        """A layer with the weight (and bias) of ``linear``, of its device and dtype; options as in the constructor."""
        if not isinstance(linear, nn.Linear):
            reject(_OP, "linear", "be a torch.nn.Linear", type(linear).__name__, TypeError)
        W = linear.weight.detach()
        defaults = {"device": W.device, "dtype": W.dtype}
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **{**defaults, **options})
        if linear.bias is not None:
            W = torch.cat([W, linear.bias.detach().unsqueeze(1) / layer.bias_scale], 1)
        layer._set(W)
        return layer.train(linear.training)

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward(self, h: Tensor, target: Tensor | None = None, target_weight: Tensor | None = None) -> Tensor:
        """The loss; in ``eval()`` without a target the logits.

        Args:
            h: ``[m, in_features]``, floating, any strides; differentiable.
            target: class indices, int64 or int32, ``[m]`` or ``[m, K]``: K targets per row, whose losses add.
            target_weight: shape of ``target``, floating: multiplies each target's loss; 0 marks padding.
        """
        if target is None:
            if self.training:
                reject(_OP, "target", "be given in train() (logits without one: eval(), or logits())", None, ValueError)
            return self.logits(h)
        self._check(h, target, target_weight)
        return (_composite if transform_level_active() else _loss)(self, h, target, target_weight)

    def _check(self, h: Tensor, target: Tensor | None = None, target_weight: Tensor | None = None) -> None:
        tensors = {"h": h, "target": target, "target_weight": target_weight}
        if target is None:
            del tensors["target"]
        check_kinds(_OP, tensors, self.V.device, "the layer")
        for name, tensor in (("h", h), ("target_weight", target_weight)):
            if tensor is not None and not tensor.is_floating_point():
                reject(_OP, name, "be floating", dtype_name(tensor.dtype))
        if h.dim() != 2 or h.shape[1] != self.in_features:
            reject(_OP, "h", f"have shape [rows, {self.in_features}]", shape_name(h))
        if target is not None:
            check_targets(_OP, h, target, target_weight, self.out_features, self.options.ignore_index)

    def _wide(self, h: Tensor) -> Tensor:
        """h in the state's dtype, with the constant feature of the bias."""
        h = h.to(self.U.dtype)
        return h if self.bias_scale is None else torch.nn.functional.pad(h, (0, 1), value=self.bias_scale)

    def logits(self, h: Tensor) -> Tensor:
        """All logits ``[m, D]`` in the dtype of h; differentiable in h. Costs ``m D d``."""
        self._check(h)
        with torch.autocast(h.device.type, enabled=False):
            wide = self._wide(h)
            products = (wide @ self.U.T).to(self.V.dtype) @ self.V.T
            return (products + (wide @ self.omega).to(products.dtype).unsqueeze(1)).to(h.dtype)

    @torch.no_grad()
    def topk(self, h: Tensor, k: int, z_score: bool = False) -> torch.return_types.topk:
        """The k largest logits of each row and their classes, without ever holding all logits.

        Args:
            h: ``[m, in_features]``.
            k: at most D.
            z_score: gives ``(o - mean) / sqrt(variance + eps)`` over the classes instead of o; the order is the same.

        Returns:
            ``(values, indices)``, ``[m, k]`` each, sorted; values in the dtype of h.
        """
        self._check(h)
        if not isinstance(k, int) or not 0 <= k <= self.out_features:
            reject(_OP, "k", f"be an int in [0, {self.out_features}]", k, ValueError)
        wide = self._wide(h)
        projected = (wide @ self.U.T).to(self.V.dtype)
        values = projected.new_empty(h.shape[0], 0)
        indices = torch.empty(h.shape[0], 0, dtype=torch.int64, device=h.device)
        for begin, block in self._blocks():
            here = (projected @ block.T).topk(min(k, block.shape[0]), 1)
            values = torch.cat([values, here.values], 1)
            indices = torch.cat([indices, here.indices + begin], 1)
            best = values.topk(min(k, values.shape[1]), 1)
            values, indices = best.values, indices.gather(1, best.indices)
        result = values.to(wide.dtype) + (wide @ self.omega).unsqueeze(1)
        if z_score:
            mean = (wide @ self.wbar).unsqueeze(1) / self.out_features
            variance = ((wide @ self.C) * wide).sum(1, keepdim=True).clamp(min=0) / self.out_features
            result = (result - mean) / (variance + self.options.eps).sqrt()
        return torch.return_types.topk((result.to(h.dtype), indices))

    # ---- training ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_lr(self, lr: float) -> None:
        """The learning rate of the steps from now on."""
        reject_options(_OP, 0, lr=(lr, AT_LEAST_0))
        if not lr * self.weight_decay < 1:
            reject(_OP, "lr * weight_decay", "be below 1", f"{lr * self.weight_decay:g}", ValueError)
        self.lr.fill_(lr)

    def set_grad_scale(self, scale: float) -> None:
        """Divides the upstream gradient in the layer's own step (not in the gradient of h), for scaled losses."""
        reject_options(_OP, 0, scale=(scale, POSITIVE))
        self.grad_scale = float(scale)

    @property
    def stats(self) -> dict[str, int]:
        """Steps taken, those of them that were singular, gradients that were skipped, and upkeep of U."""
        return dict(zip(_COUNTERS, self.counters.tolist(), strict=True))

    @contextlib.contextmanager
    def accumulate(self, max_rows: int = 1 << 20) -> Iterator[None]:
        """Inside, backward keeps what the step needs; on leaving one step is taken for all micro-batches together:
        that of the sum of their losses, exact. An exception drops them. ``max_rows`` rows are kept at most."""
        if self._pending is not None:
            raise RuntimeError(f"pyops::{_OP}: accumulate() must not be nested, got a second one")
        self._pending, self._most_rows = [], max_rows
        try:
            yield
            batches = self._pending
        finally:
            self._pending = None
        if batches:
            self._step(factored.joined(batches))

    def _add(self, batch: MicroBatch) -> None:
        """A backward's own step: taken now, or with others."""
        if self._pending is None:
            self._step(batch)
            return
        rows = sum(known.h.shape[0] for known in self._pending) + batch.h.shape[0]
        if rows > self._most_rows:
            reject(_OP, "rows", f"be at most max_rows = {self._most_rows} within accumulate()", rows)
        self._pending.append(batch)

    def _count(self, *names: str) -> None:
        for name in names:
            self.counters[_COUNTERS.index(name)] += 1

    @torch.no_grad()
    def _step(self, batch: MicroBatch) -> None:
        lr = float(self.lr)
        keep = 1 - lr * self.weight_decay
        options = lr / (keep * self.grad_scale), keep, self.options.loss == "z"
        outcome, norm, inverse_norm = _op_step(*self._state(), *batch, *options).tolist()
        if outcome == ops.SKIPPED:
            self._count("skipped_steps")
            return
        self._count("steps", "since_upkeep")
        if outcome == ops.SINGULAR:
            with torch.autocast(batch.h.device.type, enabled=False):
                factored.dense_step(self._state(), batch, *options)
            self._count("singular_steps")
            self.counters[_COUNTERS.index("since_upkeep")] = 0
        else:
            self._look_after(batch.h.shape[0], norm, inverse_norm)

    def _look_after(self, rows: int, norm: float, inverse_norm: float) -> None:
        """Upkeep of U when it is due: at once by its condition, by the number of steps where there is some to do.
        The two Frobenius norms bound the condition; for a multiple of an orthogonal matrix it is 1, the multiple
        ``size``."""
        features = max(self.U.shape[0], 1)
        condition, size = norm * inverse_norm / features, norm / math.sqrt(features)
        if not condition > _WORST_CONDITION[self.U.dtype]:
            if int(self.counters[_COUNTERS.index("since_upkeep")]) < self._period(rows):
                return
            if condition <= _GOOD_CONDITION and 0.5 <= size <= 2:
                self.counters[_COUNTERS.index("since_upkeep")] = 0
                return
        self.stabilize()

    def _period(self, rows: int) -> int:
        """Steps between upkeep: ``stabilize_every``, or more where that would take more than its share of the time."""
        classes, features = self.V.shape
        step = 14 * rows * features**2 + 3 * features**3
        upkeep = _SVD_WEIGHT * features**3 + 2 * classes * features**2
        return max(self.stabilize_every, math.ceil(upkeep / (_UPKEEP_SHARE * step)) if step else 1)

    @torch.no_grad()
    def stabilize(self) -> None:
        """Moves what is ill-conditioned of U into V now; W stays."""
        moved = factored.stabilize(self._state())
        self._count("unfactorizations" if 3 * moved > self.U.shape[0] else "stabilizations")
        self.counters[_COUNTERS.index("since_upkeep")] = 0

    # ---- moving and saving ---------------------------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        def keep_dtype(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _saved(self, given: dict) -> dict[str, Tensor | None]:
        return {name: given.get(name) for name in (*_STATE, "weight", "lr", "counters")}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.V.is_meta:
            return
        header = _packed_state.make_header(
            family="spherical", layout="factored", shape=self.V.shape, granularity="tensor",
            tensors=self._saved(self._buffers),
        )  # fmt: skip
        destination[prefix + _HEADER] = header.to(self.V.device)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        name = prefix.removesuffix(".") or _OP
        header = given.get(_HEADER)
        if header is None:
            missing_keys.append(prefix + _HEADER)
        else:
            saved = self._saved(given)
            fields = _packed_state.check_header(header, saved, family="spherical", name=name)
            for field, own in (("layout", "factored"), ("shape", list(self.V.shape))):
                if fields[field] != own:
                    raise FormatError(f"{name}: {field} must be {own} as in the layer, got {fields[field]}")
        rest = {key: value for key, value in state_dict.items() if key != prefix + _HEADER}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        with contextlib.suppress(ValueError):
            unexpected_keys.remove(prefix + _HEADER)

    def __getstate__(self) -> dict:
        if self._pending is not None:
            raise RuntimeError(f"pyops::{_OP}: a layer must not be copied within accumulate()")
        return self.__dict__

    def extra_repr(self) -> str:
        shown = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias_scale is not None}"
        taken = {name: getattr(self.options, name) for name in ("loss", *TAKES[self.options.loss], "reduction")}
        shown += "".join(f", {name}={value!r}" for name, value in taken.items())
        return shown + (f", weight_decay={self.weight_decay:g}" if self.weight_decay else "")


def _composite(layer: FactoredSphericalLinear, h: Tensor, target: Tensor, target_weight: Tensor | None) -> Tensor:
    """The loss of all logits as differentiable torch code, for transforms and higher derivatives of a layer that takes
    no step: inside of them a step would have no meaning."""
    if layer.training:
        raise NotImplementedError(
            f"pyops::{_OP}: a step has no second derivative, and in train() torch.func transforms and forward-mode AD "
            "are not supported; call the layer in eval()"
        )
    wide = reference.accumulation_dtype(h.dtype)
    loss, a, b, eps, smoothing, ignore_index, reduction, safe_mean = layer.options
    weights = (None if t is None else t.to(wide) for t in (target_weight, layer.weight))
    return reference.spherical_loss(
        layer.logits(h.to(wide)), target, *weights, loss=loss, a=a, b=b, eps=eps, label_smoothing=smoothing,
        ignore_index=ignore_index, reduction=reduction, safe_mean=safe_mean,
    )  # fmt: skip


@outside_graph
def _loss(layer: FactoredSphericalLinear, h: Tensor, target: Tensor, target_weight: Tensor | None) -> Tensor:
    anchor = None
    if layer.training and torch.is_grad_enabled() and not h.requires_grad:
        anchor = torch.zeros((), requires_grad=True)  # features that are data: the layer's own step needs a backward
    return _FactoredLoss.apply(h, anchor, layer, target, target_weight)


class _FactoredLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, anchor, layer, target, target_weight):
        state, dtype = layer._state(), layer.U.dtype
        loss, a, b, eps, smoothing, ignore_index, reduction, safe_mean = layer.options
        with below_autograd():
            value, *saved = _op(
                h, target, None if target_weight is None else target_weight.to(dtype),
                layer.weight, state.V, state.U, state.omega, state.wbar, state.C, layer.bias_scale or 0.0,
                _LOSS_CODES[loss], a, b, eps, smoothing, ignore_index, reduction_code(_OP, reduction), safe_mean,
            )  # fmt: skip
        ctx.layer, ctx.updates = layer, layer.training
        ctx.versions, ctx.backend = _versions(state), _dispatch.snapshot()
        ctx.save_for_backward(h, target, target_weight, *saved)
        return value

    @staticmethod
    def backward(ctx, grad_loss):
        layer, state = ctx.layer, ctx.layer._state()
        if ctx.versions != _versions(state):
            raise RuntimeError(_STATE_CHANGED)
        h, target, target_weight, partials, normalizer, H, HC, P = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient itself as differentiable code
            loss = _composite(layer, h, target, target_weight)
            return torch.autograd.grad(loss, h, grad_loss, create_graph=True)[0], None, None, None, None
        with _dispatch.restored(ctx.backend):
            grad, Z, scaled = _op_gradient(
                grad_loss, target, partials, normalizer, HC, state.V, state.U, state.omega, state.wbar
            )
            if ctx.updates:
                layer._add(MicroBatch(target, scaled, H, HC, P, Z))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        return grad[:, : layer.in_features].to(h.dtype), None, None, None, None


def _versions(state: State) -> tuple[int, ...]:
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in state)


class LRHook:
    """Copies the learning rate of an optimizer, and so of its scheduler, to a factored layer before each forward.

    Args:
        optimizer: of the rest of the network.
        layer: a :class:`FactoredSphericalLinear`.
        scale: the layer's learning rate as a multiple of the optimizer's.
        group: which of the optimizer's parameter groups.

    Example:
        >>> import torch, pyops
        >>> trunk, layer = torch.nn.Linear(4, 4), pyops.nn.FactoredSphericalLinear(4, 9)
        >>> optimizer = torch.optim.SGD(trunk.parameters(), lr=0.25)
        >>> hook = pyops.spherical.LRHook(optimizer, layer)
        >>> loss = layer(trunk(torch.randn(2, 4)), torch.tensor([1, 2]))
        >>> layer.lr.item()
        0.25
    """

    def __init__(self, optimizer, layer: FactoredSphericalLinear, scale: float = 1.0, group: int = 0) -> None:
        self._handle = layer.register_forward_pre_hook(
            lambda module, _: module.set_lr(float(optimizer.param_groups[group]["lr"]) * scale)
        )

    def remove(self) -> None:
        """Leaves the layer's learning rate as it is from now on."""
        self._handle.remove()
