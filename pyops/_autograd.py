"""The one place that knows torch's private switches behind the autograd recipe.

A public function chooses, in this order: the op itself while ``torch.compile`` traces (one opaque,
differentiable node); the composite reference formula while a ``torch.func`` transform or forward-mode AD is
active (right for vmap, jvp, Hessians; an op without a forward rule would give silent zeros); an
``autograd.Function`` with ``forward(ctx, ...)`` when a gradient is wanted (2.6 times cheaper per call than one
with ``setup_context``); the op below the autograd keys otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.autograd import forward_ad

from pyops._dispatch import library

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


#: Decorator of a function that ``torch.compile`` calls and does not trace: torch.compiler.disable, but for the import
#: of the compiler (a second), which waits for the first call.
outside_graph = getattr(torch._compile, "_disable_dynamo", torch.compiler.disable)

_AUTOGRAD_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradMeta")


def register_derivative(name: str, backward: Callable, save: Callable, check: Callable = lambda *args: None) -> None:
    """Gives the op ``name`` a gradient, and makes it refuse forward-mode AD, where torch would return silent zeros.
    ``check(*args)`` may reject arguments that ask for a gradient and have none."""
    torch.library.register_autograd(f"pyops::{name}", backward, setup_context=save)
    for key in _AUTOGRAD_KEYS:
        kernel = torch.library.get_kernel(f"pyops::{name}", key)

        def run(keyset, *args, kernel=kernel):
            _refuse_tangents(name, args)
            check(*args)
            return kernel.call_boxed(keyset, *args)

        library.impl(name, run, key, with_keyset=True)


_EXACT = "call the pyops function in eager mode, whose second derivative is exact"


def register_no_derivative(name: str, advice: str = _EXACT) -> None:
    """Makes the gradient op ``name`` refuse to be differentiated: unregistered, its gradient comes back as 0. What
    it writes, if anything, gets a new version, so that whoever saved the tensor for a backward notices."""
    op = getattr(torch.ops.pyops, name).default
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def refuse(ctx, *grads):
        raise NotImplementedError(f"pyops::{name}: the op has no derivative; {advice}")

    if not written:  # the error can wait for a backward, which may never come
        register_derivative(name, refuse, lambda ctx, inputs, output: None)
        return

    def below(keyset, *args):
        _refuse_tangents(name, args)
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            refuse(None)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def write(keyset, *args):
        for position in written:
            torch.autograd.graph.increment_version(args[position])
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    library.impl(name, below, "Autograd", with_keyset=True)
    with warnings.catch_warnings():  # torch asks for a warning at each kernel on this key, which it needs here
        warnings.simplefilter("ignore", UserWarning)
        library.impl(name, write, "ADInplaceOrView", with_keyset=True)


def _refuse_tangents(name: str, args: tuple) -> None:
    if forward_ad._current_level >= 0 and any(
        isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args
    ):
        raise NotImplementedError(
            f"pyops::{name}: the op has no forward-mode derivative; call the pyops function, which has"
        )


def reject(op: str, argument: str, rule: str, got: object, error: type[Exception] = RuntimeError) -> None:
    """Raises the one error text: ``pyops::<op>: <argument> must <rule>, got <got>``."""
    raise error(f"pyops::{op}: {argument} must {rule}, got {got}")
