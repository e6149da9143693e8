"""Layers with ternary weights: :class:`BitLinear` trains them, :class:`PackedBitLinear` serves them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyops._autograd import reject
from pyops._checks import FormatError, shape_name
from pyops.ternary import _options, _state, reference
from pyops.ternary._compute_layout import ComputeLayouts, Seen, has_versions
from pyops.ternary._formats import CANONICAL, GROUP, code, packed_shape
from pyops.ternary.bitlinear import bitlinear
from pyops.ternary.linear import linear_packed
from pyops.ternary.lowrank import bitlinear_lowrank, check_rank, low_rank_compensation, pack_weight, weight_options
from pyops.ternary.repack import unpack

_NORM_EPS = 1e-5
_NORMS: dict[str, Callable] = {
    "layernorm": lambda x: functional.layer_norm(x, x.shape[-1:], eps=_NORM_EPS),
    "rmsnorm": lambda x: functional.rms_norm(x, x.shape[-1:], eps=_NORM_EPS),
}


def _checked_norm(op: str, norm: str | nn.Module | None) -> str | nn.Module | None:
    if norm is None or isinstance(norm, nn.Module) or (isinstance(norm, str) and norm in _NORMS):
        return norm
    error = ValueError if isinstance(norm, str) else TypeError
    reject(op, "norm", "be None, 'layernorm', 'rmsnorm' or a Module", repr(norm), error)


def _normed(x: Tensor, norm: str | nn.Module | None) -> Tensor:
    if norm is None:
        return x
    return (_NORMS[norm] if isinstance(norm, str) else norm)(x)


class _KeepsFloat32:
    """Mixin of modules: ``.half()`` and ``.to(dtype)`` leave the tensors named in ``_float32`` in float32."""

    _float32: tuple[str, ...]

    def _apply(self, fn, recurse=True):
        kept = [tensor for name in self._float32 if (tensor := getattr(self, name)) is not None]
        kept += [tensor.grad for tensor in kept if tensor.grad is not None]

        def change(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if changed.dtype != torch.float32 and any(tensor is one for one in kept):
                return tensor.to(changed.device)
            return changed

        return super()._apply(change, recurse)


# ---- training --------------------------------------------------------------------------------------------------


class BitLinear(_KeepsFloat32, nn.Linear):
    r"""``torch.nn.Linear`` through ternary weights and 8-bit activations: :func:`pyops.bitlinear` of ``norm(x)``.

    Args:
        in_features, out_features, bias, device, dtype: as of ``torch.nn.Linear``; the weight is the float master.
        measure: gamma is the ``"absmean"`` or the ``"absmedian"`` of the weight;
        granularity: one for the ``"tensor"`` or for each ``"row"``.
        qmax, eps, eps_mode, act_bits, lambda_: as of :func:`pyops.bitlinear`. ``layer.lambda_`` may be changed while
            training.
        norm: before the rounding of activations: ``"layernorm"`` or ``"rmsnorm"`` (without weights, eps 1e-5), or a
            Module; None for none.
        scale: gamma itself instead of a measure: a float, a float32 tensor ``[]`` or ``[out_features]`` (a buffer), or
            a Parameter (learned). It stays float32 in ``.half()``.

    State: ``weight``, ``bias`` as of ``torch.nn.Linear``; with ``scale`` also that, with a Module as norm its own.
    Differentiable in x, weight, bias and scale; precision, determinism, errors: :func:`pyops.bitlinear`. Where torch
    reads ``.weight`` past ``forward`` (``nn.MultiheadAttention``; ``nn.TransformerEncoderLayer`` in eval mode unless
    :func:`pyops.convert` put the layer there) it computes with the float weight.

    Source: arXiv 2402.17764, 2407.09527.

    Example:
        >>> import torch, pyops
        >>> layer = pyops.nn.BitLinear(8, 4, norm="rmsnorm")
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 4])
        >>> layer.pack()
        PackedBitLinear(in_features=8, out_features=4, bias=True, fmt=t2, granularity=tensor, norm=rmsnorm)
    """

    _float32 = ("scale",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        measure: str = "absmean",
        granularity: str = "tensor",
        qmax: int = 127,
        eps: float = 1e-5,
        eps_mode: str = "clamp",
        act_bits: int | None = 8,
        norm: str | nn.Module | None = None,
        lambda_: float = 1.0,
        scale: float | Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        weight_options("BitLinear", measure, granularity, eps, eps_mode)
        _options.qmax("BitLinear", qmax)
        _options.act_bits("BitLinear", act_bits)
        _options.number("BitLinear", "lambda_", lambda_, 0, 1, "be in [0, 1]")
        _checked_norm("BitLinear", norm)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.measure, self.granularity = measure, granularity
        self.qmax, self.eps, self.eps_mode = qmax, eps, eps_mode
        self.act_bits, self.lambda_ = act_bits, lambda_
        self.norm = norm
        self._register_scale(scale, device)

    def _register_scale(self, scale: float | Tensor | None, device: torch.device | str | None) -> None:
        if isinstance(scale, nn.Parameter):
            self.scale = scale
            return
        if scale is not None and not isinstance(scale, Tensor):
            _options.number("BitLinear", "scale", scale, 2.0**-149, 3.4e38, "be positive")
            shape = (self.out_features,) if self.granularity == "row" else ()
            scale = torch.full(shape, scale, dtype=torch.float32, device=device)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return bitlinear(
            _normed(x, self.norm),
            self.weight,
            self.bias,
            weight_measure=self.measure,
            granularity=self.granularity,
            qmax=self.qmax,
            eps=self.eps,
            eps_mode=self.eps_mode,
            act_bits=self.act_bits,
            lambda_=self.lambda_,
            scale=self.scale,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> BitLinear:
        """A layer on the very parameters of ``linear``; the options are those of the constructor."""
        scale = options.pop("scale", None)
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None,
            device="meta", dtype=linear.weight.dtype, **options,
        )  # fmt: skip
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._register_scale(scale, linear.weight.device)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """``torch.nn.Linear`` on the very parameters of this layer; its norm and scale have no place there."""
        return _linear(self.weight, self.bias, self.training)

    @torch.no_grad()
    def pack(self, fmt: str = "t2", *, lorc_rank: int = 0) -> PackedBitLinear:
        """The layer for inference: the same outputs to the last bit, 2 (``"t2"``) or 1.6 (``"t5"``) bits a weight.

        Args:
            lorc_rank: rank of a correction of what the rounding of the weight has lost
                (:func:`pyops.ternary.low_rank_compensation`); outputs are then nearer to those of the float layer.

        Nothing is shared with this layer but tensors of the norm. ValueError for a weight that is not finite, and for
        ``lambda_`` below 1, whose outputs no packed layer has.
        """
        if self.lambda_ != 1:
            reject("pack", "lambda_", "be 1", f"{self.lambda_:g}", ValueError)
        options = self.measure, self.granularity, self.eps, self.eps_mode
        lowrank = None
        if lorc_rank:
            names = dict(zip(("measure", "granularity", "eps", "eps_mode"), options, strict=True))
            packed, gamma, *lowrank = low_rank_compensation(self.weight, lorc_rank, fmt=fmt, scale=self.scale, **names)
        else:
            packed, gamma = pack_weight(self.weight, fmt, weight_options("pack", *options), self.scale)
        return PackedBitLinear.from_packed(
            packed, gamma, None if self.bias is None else self.bias.detach().clone(), fmt=fmt,
            in_features=self.in_features, out_features=self.out_features, qmax=self.qmax, eps=self.eps,
            act="int8" if self.act_bits else None, norm=copy.deepcopy(self.norm), lowrank=lowrank,
            dtype=self.weight.dtype,
        ).train(self.training)  # fmt: skip

    def extra_repr(self) -> str:
        shown = f"{super().extra_repr()}, measure={self.measure}, granularity={self.granularity}"
        defaults = {"qmax": 127, "eps": 1e-5, "eps_mode": "clamp", "act_bits": 8, "lambda_": 1.0}
        shown += "".join(f", {name}={getattr(self, name)}" for name, usual in defaults.items()
                         if getattr(self, name) != usual)  # fmt: skip
        shown += f", norm={self.norm}" if isinstance(self.norm, str) else ""
        return shown + (", scale given" if self.scale is not None else "")


def _linear(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    linear.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return linear.train(training)


# ---- inference -------------------------------------------------------------------------------------------------

_ZEROS = {"t2": 0b01010101, "t5": 121}  # a byte of weights 0


class PackedBitLinear(_KeepsFloat32, nn.Module):
    r"""A linear layer on packed ternary weights: :func:`pyops.ternary.linear_packed` of ``norm(x)``.

    Made by :meth:`BitLinear.pack`, :meth:`from_packed` or :func:`pyops.pack`; the constructor makes one with zero
    weights, to load a state into.

    Args:
        in_features, out_features, bias, device: as of ``torch.nn.Linear``; ``dtype`` that of the bias, and of x.
        fmt: how the weights are stored, ``"t2"`` (2 bits each) or ``"t5"`` (1.6 bits).
        granularity: one gamma per ``"tensor"``, ``"row"``, or ``"group"`` of 256 in_features of a row.
        qmax, eps, act: as of :func:`pyops.ternary.linear_packed`. norm: as of :class:`BitLinear`.
        lorc_rank, alpha: rank and factor of a low-rank correction, see :func:`pyops.ternary.bitlinear_lowrank`.

    State: buffers ``weight_packed`` (uint8), ``weight_gamma`` (float32, also after ``.half()``), ``bias``,
    ``weight_header`` (what the others are, and their checksums; written anew by ``state_dict()`` if they changed); with
    a correction, parameters ``lowrank_A``, ``lowrank_B``, which start without ``requires_grad``. ``load_state_dict``
    raises FormatError for a state that is damaged or of another layout, and then leaves the layer as it was.

    The layout that the processor's kernels read is built at the first call on a device, kept beside the state (the
    layer then takes twice the memory) and built anew when ``weight_packed`` has changed; a write through ``.data`` goes
    unnoticed. One layer may serve several threads. Differentiable in x, and in lowrank_A and lowrank_B where they ask
    for it. In ``torch.compile`` and ``torch.export`` graphs the stored format itself is read.

    Source: arXiv 2402.17764; 2410.16144 for packed inference.

    Example:
        >>> import torch, pyops
        >>> layer = pyops.nn.BitLinear(8, 4)
        >>> packed, x = layer.pack("t5"), torch.randn(2, 8)
        >>> bool((packed(x) == layer(x)).all())
        True
        >>> {name: tuple(tensor.shape) for name, tensor in packed.state_dict().items() if name != "weight_header"}
        {'weight_packed': (4, 2), 'weight_gamma': (), 'bias': (4,)}
    """

    _float32 = ("weight_gamma",)
    weight_packed: Tensor
    weight_gamma: Tensor
    bias: Tensor | None
    weight_header: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        fmt: str = "t2",
        granularity: str = "tensor",
        qmax: int = 127,
        eps: float = 1e-5,
        act: str | None = "int8",
        norm: str | nn.Module | None = None,
        lorc_rank: int = 0,
        alpha: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        op = "PackedBitLinear"
        code(op, "fmt", fmt, CANONICAL)
        kind = _options.choice(op, "granularity", granularity, ("tensor", "row", "group"))
        if granularity == "group" and in_features % GROUP:
            reject(op, "in_features", "be a multiple of 256 for groups", in_features, ValueError)
        _options.qmax(op, qmax)
        _options.positive_eps(op, eps)
        _options.choice(op, "act", act, ("int8", None))
        _checked_norm(op, norm)
        check_rank(op, lorc_rank, out_features, in_features)
        super().__init__()
        self.in_features, self.out_features, self.fmt = in_features, out_features, fmt
        self.qmax, self.eps, self.act, self.alpha = qmax, eps, act, alpha
        self.norm = norm
        self._dtype = dtype or torch.get_default_dtype()
        self._layouts = ComputeLayouts()
        self._header_of: tuple[Seen, ...] = ()
        where = {"device": device}
        shape = packed_shape(fmt, out_features, in_features)
        self.register_buffer("weight_packed", torch.full(shape, _ZEROS[fmt], dtype=torch.uint8, **where))
        gammas = ((), (out_features,), (out_features, in_features // GROUP))[kind]
        self.register_buffer("weight_gamma", torch.ones(gammas, dtype=torch.float32, **where))
        self.register_buffer("bias", torch.zeros(out_features, dtype=self._dtype, **where) if bias else None)
        self.register_buffer("weight_header", torch.empty(0, dtype=torch.uint8, **where))
        self._register_lowrank(
            torch.zeros(out_features, lorc_rank, dtype=self._dtype, **where),
            torch.zeros(lorc_rank, in_features, dtype=self._dtype, **where),
        )
        self._write_header()

    def _register_lowrank(self, A: Tensor, B: Tensor) -> None:
        for name, factor in (("lowrank_A", A), ("lowrank_B", B)):
            if isinstance(factor, nn.Parameter):
                parameter = factor
            else:
                parameter = nn.Parameter(factor, requires_grad=factor.requires_grad)
            self.register_parameter(name, parameter if A.shape[1] else None)

    @classmethod
    def from_packed(
        cls,
        packed: Tensor,
        gamma: Tensor,
        bias: Tensor | None = None,
        *,
        fmt: str,
        in_features: int,
        out_features: int,
        qmax: int = 127,
        eps: float = 1e-5,
        act: str | None = "int8",
        norm: str | nn.Module | None = None,
        lowrank: tuple[Tensor, Tensor] | None = None,
        alpha: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> PackedBitLinear:
        """A layer on the very tensors given, once they are known to be right; ``lowrank`` is ``(A, B)``, ``dtype``
        that of the bias by default. FormatError for tensors that are not packed ternary weights."""
        kinds = {0: "tensor", 1: "row", 2: "group"}
        granularity = kinds.get(gamma.dim(), gamma.dim())
        rank = 0 if lowrank is None else lowrank[0].shape[-1]
        dtype = dtype or (None if bias is None else bias.dtype)
        layer = cls(
            in_features, out_features, bias is not None, fmt=fmt, granularity=granularity, qmax=qmax, eps=eps, act=act,
            norm=norm, lorc_rank=rank, alpha=alpha, device="meta", dtype=dtype,
        )  # fmt: skip
        given = {"weight_packed": packed, "weight_gamma": gamma, "bias": bias}
        if lowrank is not None and rank:
            given |= dict(zip(("lowrank_A", "lowrank_B"), lowrank, strict=True))
        layer._check_like_own(given, "PackedBitLinear")
        if not packed.is_meta:
            _state.check_codes(packed, fmt, "PackedBitLinear: weight_packed")
            _state.check_gamma(gamma, "PackedBitLinear: weight_gamma")
        for name in _state.KEYS:
            tensor = given[name]
            if tensor is not None and tensor.is_inference():
                with torch.inference_mode(False):  # so that writes to it are counted
                    tensor = tensor.clone()
            setattr(layer, name, None if tensor is None else tensor.detach())
        if lowrank is not None:
            layer._register_lowrank(*lowrank)
        layer._write_header()
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, fmt: str = "t2", lorc_rank: int = 0, **options) -> PackedBitLinear:
        """The packed form of ``BitLinear.from_linear(linear, **options)``."""
        return BitLinear.from_linear(linear, **options).pack(fmt, lorc_rank=lorc_rank)

    # ---- use ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        # A name that nn.Module.__getattr__ looks up takes 0.8 us, of 9 us for a whole call of linear_packed.
        buffers = self._buffers
        try:
            packed, gamma, bias = buffers["weight_packed"], buffers["weight_gamma"], buffers["bias"]
            A = self._parameters["lowrank_A"]
        except KeyError:  # one was replaced by another kind of attribute
            packed, gamma, bias, A = self.weight_packed, self.weight_gamma, self.bias, self.lowrank_A
        weights, fmt = self._layouts.operand(packed, self.fmt, self.out_features, self.in_features)
        options = {
            "fmt": fmt,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "act": self.act,
            "qmax": self.qmax,
            "eps": self.eps,
        }
        x = _normed(x, self.norm)
        if A is None:
            return linear_packed(x, weights, gamma, bias, **options)
        return bitlinear_lowrank(x, weights, gamma, A, self.lowrank_B, bias, alpha=self.alpha, **options)

    @property
    def granularity(self) -> str:
        return _state.granularity(self.weight_gamma)

    @property
    def dtype(self) -> torch.dtype:
        """Of the bias, or that it would have."""
        return self._dtype if self.bias is None else self.bias.dtype

    def unpack(self) -> BitLinear:
        """A :class:`BitLinear` with the same outputs to the last bit: weights ``T gamma``, and gamma as its ``scale``
        (set that to None to measure it anew). ValueError where BitLinear has no place for what this layer does."""
        if self.lowrank_A is not None:
            reject("unpack", "lowrank_A", "not be there (to_linear() adds the correction)", "a correction", ValueError)
        if self.granularity == "group":
            reject("unpack", "weight_gamma", "have one element, or one per row", "one per group", ValueError)
        if bool((self.weight_gamma < self.eps).any()):
            reject("unpack", "weight_gamma", f"be at least eps = {self.eps:g}", "a smaller one", ValueError)
        layer = BitLinear(
            self.in_features, self.out_features, self.bias is not None, granularity=self.granularity, qmax=self.qmax,
            eps=self.eps, act_bits=8 if self.act else None, norm=copy.deepcopy(self.norm),
            scale=self.weight_gamma.clone(), device="meta", dtype=self.dtype,
        )  # fmt: skip
        layer.weight = nn.Parameter(self._dense().to(self.dtype))
        layer.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)

    def to_linear(self) -> nn.Linear:
        """``torch.nn.Linear`` with the dequantized weight, a correction added; its norm has no place there."""
        weight = self._dense()
        if self.lowrank_A is not None:
            weight = weight + self.alpha * (self.lowrank_A.detach().float() @ self.lowrank_B.detach().float())
        bias = None if self.bias is None else self.bias.detach().clone()
        return _linear(weight.to(self.dtype), bias, self.training)

    def _dense(self) -> Tensor:
        ternary = unpack(self.weight_packed, self.fmt, self.in_features)
        return reference.dequantized(ternary, self.weight_gamma, torch.float32)

    def extra_repr(self) -> str:
        shown = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        shown += f", fmt={self.fmt}, granularity={self.granularity}"
        defaults = {"qmax": 127, "eps": 1e-5, "act": "int8", "alpha": 1.0}
        shown += "".join(f", {name}={getattr(self, name)}" for name, usual in defaults.items()
                         if getattr(self, name) != usual)  # fmt: skip
        shown += f", norm={self.norm}" if isinstance(self.norm, str) else ""
        return shown + (f", rank={self.lowrank_A.shape[1]}" if self.lowrank_A is not None else "")

    # ---- moving and copying ------------------------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        self._layouts.clear()
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.weight_gamma.device)).dtype
        return self

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_header_of": ()}

    # ---- state -------------------------------------------------------------------------------------------------

    def _write_header(self) -> None:
        """Makes the header that of the buffers, unless it is known to be."""
        tensors = [getattr(self, name) for name in _state.KEYS]
        present = [tensor for tensor in tensors if tensor is not None]
        if any(tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter) for tensor in present):
            return
        known = self._header_of
        if len(known) == len(present) and all(s.is_still(t) for s, t in zip(known, present, strict=True)):
            return
        header = _state.make_header(*tensors, fmt=self.fmt, shape=(self.out_features, self.in_features))
        self.weight_header = header.to(self.weight_packed.device)
        self._header_of = tuple(map(Seen, present)) if all(map(has_versions, present)) else ()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._write_header()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        name = prefix.removesuffix(".") or type(self).__name__
        packed_keys = (*_state.KEYS[:2], _state.HEADER)
        if any(key in given for key in packed_keys):
            self._check_state(given, name, strict)
            self.weight_header = torch.empty_like(given[_state.HEADER], device=self.weight_header.device)
        else:  # the state of another kind of layer: its bias is not for this one
            state_dict = {key: value for key, value in state_dict.items() if key != prefix + "bias"}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._header_of = ()

    def _check_state(self, given: dict, name: str, strict: bool) -> None:
        """FormatError unless the state is whole and is one of a layer like this."""
        fields = _state.check_state(given, name)
        wanted = {"layout": self.fmt, "granularity": self.granularity, "shape": [self.out_features, self.in_features]}
        for field, own in wanted.items():
            if fields[field] != own:
                raise FormatError(f"{name}: {field} must be {own} as in the layer, got {fields[field]}")
        self._check_like_own({key: given.get(key) for key in self._own_keys()}, name, strict)

    def _own_keys(self) -> tuple[str, ...]:
        return (*_state.KEYS, "lowrank_A", "lowrank_B")

    def _check_like_own(self, given: dict[str, Tensor | None], name: str, strict: bool = True) -> None:
        """Each tensor is there where the layer has one, with the dtype (of packed weights and gamma) and shape."""
        for key, tensor in given.items():
            own = getattr(self, key)
            if (tensor is None) != (own is None):
                if strict:
                    rule = "not be there" if own is None else "be there"
                    raise FormatError(f"{name}: {key} must {rule}, got {'nothing' if tensor is None else 'a tensor'}")
            elif tensor is not None:
                if key in self._own_keys()[:2] and tensor.dtype != own.dtype:
                    raise FormatError(f"{name}: {key} must be {own.dtype}, got {tensor.dtype}")
                if tensor.shape != own.shape:
                    raise FormatError(f"{name}: {key} must have shape {shape_name(own)}, got {shape_name(tensor)}")
