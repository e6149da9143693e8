"""``pyops.explain``: which kernel a call would run, and why not another."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from pyops import _dispatch
from pyops.spherical import cross_entropy as _cross_entropy
from pyops.spherical import reference_ops as _reference_ops  # noqa: F401  (registers the backends)
from pyops.spherical import spherical_loss as _spherical_loss
from pyops.ternary import linear_packed
from pyops.ternary import reference_ops as _ternary_ops  # noqa: F401  (registers the backends)
from pyops.ternary._formats import packed_shape
from pyops.ternary.bitlinear import _arguments as _bitlinear_arguments
from pyops.ternary.bitlinear import bitlinear
from pyops.ternary.linear import _arguments as _linear_packed_arguments


def _spherical(loss: int, function: Callable) -> tuple[str, Callable]:
    def arguments(bound: dict) -> tuple:
        bound.pop("inplace_backward")
        defaults = dict(a=1.0, b=0.0, eps=0.0)
        return _spherical_loss._arguments(loss, **(defaults | bound))

    return "spherical_loss", function, arguments


def _softmax(bound: dict) -> tuple:
    bound.pop("inplace_backward")
    bound.pop("return_z_loss")
    return _cross_entropy._arguments(**bound)


def _bitlinear(bound: dict) -> tuple:
    x, bias, weight_options, options = _bitlinear_arguments(**bound)
    weight = bound["weight"]
    packed = weight.new_empty(packed_shape("t2", *weight.shape), dtype=torch.uint8)
    gamma = weight.new_empty(weight.shape[:1] if weight_options[1] else (), dtype=torch.float32)
    return (_rows(x), weight, packed, gamma, bias, *options)


def _linear_packed(bound: dict) -> tuple:
    x, *others = _linear_packed_arguments(**bound)
    return (_rows(x), *others)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


# Public function -> (dispatcher op, function, its arguments as those of the op).
_FUNCTIONS = {
    function.__name__: _spherical(loss, function)
    for loss, function in enumerate(
        (
            _spherical_loss.z_loss,
            _spherical_loss.taylor_softmax_loss,
            _spherical_loss.spherical_softmax_loss,
            _spherical_loss.mse_onehot_loss,
        )
    )
} | {
    "bitlinear": ("bitlinear", bitlinear, _bitlinear),
    "cross_entropy": ("cross_entropy", _cross_entropy.cross_entropy, _softmax),
    "linear_packed": ("ternary_linear", linear_packed, _linear_packed),
}


def explain(op: str | Callable, *args, **kwargs) -> _dispatch.Explanation:
    """Which backend ``op(*args, **kwargs)`` would run on, at which kernel level, and why not the others.

    Args:
        op: a public pyops function or its name; the other arguments are those of the call. Nothing is run.

    Returns:
        An object with ``op``, ``backend``, ``cpu_isa`` and ``rejected`` (backend -> reasons); ``print`` it.

    Raises:
        ValueError: an unknown op. Errors of the call's options are raised as by the call.

    Example:
        >>> import torch, pyops
        >>> pyops.explain("z_loss", torch.zeros(2, 5), torch.tensor([1, 2])).backend
        'cpu'
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name not in _FUNCTIONS:
        raise ValueError(f"explain: unknown op {name!r}; known: {', '.join(sorted(_FUNCTIONS))}")
    dispatcher_op, function, arguments = _FUNCTIONS[name]
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    found = _dispatch.explain_op(dispatcher_op, arguments(dict(bound.arguments)))
    return dataclasses.replace(found, op=name)
