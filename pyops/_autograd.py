"""The one place that knows torch's private switches behind the autograd recipe.

A public function chooses, in this order: the op itself while ``torch.compile`` traces (one opaque,
differentiable node); the composite reference formula while a ``torch.func`` transform or forward-mode AD is
active (right for vmap, jvp, Hessians; an op without a forward rule would give silent zeros); an
``autograd.Function`` with ``forward(ctx, ...)`` when a gradient is wanted (2.6 times cheaper per call than one
with ``setup_context``); the op below the autograd keys otherwise.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.autograd import forward_ad

_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", None)

#: Context manager under which an op call skips the autograd keys; plain torch code works without it.
below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


def transform_level_active() -> bool:
    """Whether a ``torch.func`` transform or a forward-mode AD level is active in this thread."""
    if forward_ad._current_level >= 0:
        return True
    if _functorch_active is not None:
        return _functorch_active()
    return torch._C._functorch.maybe_current_level() is not None


def refuse_transforms_under_compile(name: str) -> None:
    """Inside ``torch.compile`` a transform cannot take the composite path; the op would give silent zeros."""
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"pyops::{name}: torch.func transforms and forward-mode AD inside torch.compile are not supported; "
            "compile outside the transform"
        )


def refuse_second_derivative(name: str) -> None:
    """Registers ``name`` as not differentiable, loudly: unregistered, a second derivative comes back as 0."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"pyops::{name}: the gradient op has no derivative; call the pyops function in eager mode, whose "
            "second derivative is exact"
        )

    torch.library.register_autograd(f"pyops::{name}", backward, setup_context=lambda ctx, inputs, output: None)


def reject(op: str, argument: str, rule: str, got: object, error: type[Exception] = RuntimeError) -> None:
    """Raises the one error text: ``pyops::<op>: <argument> must <rule>, got <got>``."""
    raise error(f"pyops::{op}: {argument} must {rule}, got {got}")
