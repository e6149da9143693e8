"""Ternary quantization of weights; the op ``pyops::ternary_quantize_weight``, and the memory of its last results."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from pyops import _dispatch
from pyops._autograd import register_no_derivative, transform_level_active
from pyops.ternary import _checks, _options, reference
from pyops.ternary._formats import FORMATS, packed_shape

_op = torch.ops.pyops.ternary_quantize_weight.default
_NAME = "ternary_quantize_weight"
T2 = FORMATS.index("t2")


@torch.library.register_fake("pyops::ternary_quantize_weight")
def _fake(weight, scale, measure, per_row, eps, add_eps):
    _checks.quantize_weight(weight, scale, measure, per_row, eps)
    packed = weight.new_empty(packed_shape("t2", *weight.shape), dtype=torch.uint8)
    return packed, weight.new_empty(weight.shape[:1] if per_row else (), dtype=torch.float32)


register_no_derivative(_NAME)


def quantize_weight(
    w: Tensor,
    measure: str = "absmean",
    granularity: str = "tensor",
    eps: float = 1e-5,
    eps_mode: str = "clamp",
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Rounds weights to {-1, 0, 1} times a scale::

        gamma  = mean |W|  or  the lower median of |W|   (the element of rank floor((n - 1) / 2))
        gamma' = max(gamma, eps)  or  gamma + eps
        T      = clip(round(W * (1 / gamma')), -1, 1)     ties to even: 0.5 rounds to 0

    Args:
        w: ``[out_features, in_features]``, float32, bfloat16 or float16, any strides. Not differentiable here; see
            :func:`pyops.bitlinear` for training.
        measure: ``"absmean"`` or ``"absmedian"``.
        granularity: one gamma per ``"tensor"`` or per ``"row"``.
        eps: at least 0.
        eps_mode: ``"clamp"`` or ``"add"``.
        scale: gamma, float32, ``[]`` or ``[out_features]``, in place of the measured one (for a shard of a larger
            weight).

    Returns:
        ``(T, gamma')``: int8 ``[out_features, in_features]`` and float32 ``[]`` or ``[out_features]``. A tensor (row)
        with a weight that is NaN or infinite has gamma' = NaN.

    Precision: float32 with IEEE rounding whatever the dtype of ``w``; the mean is summed in float64, the median is
    exact. Deterministic and independent of the number of threads. Errors: RuntimeError for a tensor that does not
    fit, ValueError for an unknown option.

    Source: arXiv 2402.17764, equations 1-3 (eps added there); the median of 2407.09527.

    Example:
        >>> import torch, pyops
        >>> T, gamma = pyops.ternary.quantize_weight(torch.tensor([[0.9, -0.2], [-1.1, 0.4]]))
        >>> T.tolist(), round(gamma.item(), 4)
        ([[1, 0], [-1, 1]], 0.65)
    """
    from pyops.ternary.repack import unpack

    _options.tensor(_NAME, "weight", w)
    _options.tensor(_NAME, "scale", scale, optional=True)
    code = _options.choice(_NAME, "measure", measure, reference.MEASURES)
    _options.number(_NAME, "eps", eps, 0, 3.4e38, "be at least 0")
    per_row, add_eps = _options.per_row(_NAME, granularity), _options.eps_mode(_NAME, eps_mode)
    if transform_level_active():
        return reference.quantize_weight(w, scale, measure=measure, per_row=per_row, eps=eps, add_eps=add_eps)
    packed, gamma = _op(w.detach(), None if scale is None else scale.detach(), code, per_row, eps, add_eps)
    return unpack(packed, "t2", w.shape[1]), gamma


# ---- the last result for each weight ---------------------------------------------------------------------------

_SAMPLES = 64


class _Known(NamedTuple):
    weight: weakref.ref
    key: tuple
    places: Tensor | None  # a few elements of the weight itself, and what they were
    values: Tensor | None
    backend: dict | None
    result: tuple[Tensor, Tensor]


_memory: dict[int, _Known] = {}  # by id of the weight


def _places(weight: Tensor) -> Tensor | None:
    """A few weights, on the CPU: a write through ``.data`` leaves no other trace. (On a GPU the comparison would wait
    for the device; there such writes must be followed by :func:`forget`.)"""
    if weight.device.type != "cpu" or weight.numel() == 0:
        return None
    flat = weight.detach().view(-1) if weight.is_contiguous() else weight.detach()[0]
    return flat[:: max(1, flat.numel() // _SAMPLES)]


def quantized(weight: Tensor, scale: Tensor | None, options: tuple) -> tuple[Tensor, Tensor]:
    """(packed, gamma') of a weight, from memory while neither it nor its options have changed: gradient
    accumulation, checkpointing and evaluation quantize once."""
    if torch.compiler.is_compiling() or scale is not None or weight.is_inference():
        return _op(weight.detach(), None if scale is None else scale.detach(), *options)
    key = (weight._version, weight.data_ptr(), weight.shape, weight.stride(), options)
    known = _memory.get(id(weight))
    if (
        known is not None
        and known.weight() is weight
        and known.key == key
        and known.backend == _dispatch.snapshot()
        and (known.places is None or torch.equal(known.places, known.values))
    ):
        return known.result
    with torch.inference_mode(False):  # what is remembered may be saved for a backward later
        result = _op(weight.detach(), None, *options)
        places = _places(weight)
        values = None if places is None else places.clone()
    number = id(weight)
    gone = weakref.ref(weight, lambda _: _memory.pop(number, None))
    _memory[number] = _Known(gone, key, places, values, _dispatch.snapshot(), result)
    return result


def forget(weight: Tensor | None = None) -> None:
    """Drops what is remembered of one weight, or of all: needed only after a write that torch does not count, such as
    through ``.data``, to a weight on a GPU.

    Example:
        >>> import torch, pyops
        >>> weight = torch.randn(4, 8)
        >>> y = pyops.bitlinear(torch.ones(1, 8), weight)
        >>> weight.data.mul_(2)  # doctest: +ELLIPSIS
        tensor(...
        >>> pyops.ternary.forget(weight)
    """
    if weight is None:
        _memory.clear()
    else:
        _memory.pop(id(weight), None)
