"""Which kernel runs: the backend table of every op, ``use_backend``, ``explain``, ``PYOPS_BACKEND``.

A CUDA tensor is served by CUDA C++, else Triton, else the torch reference; a CPU tensor by C++, else the
reference. The C++ kernels sit directly on the dispatcher's CPU and CUDA keys, so that the default path pays
nothing for the choice. Only when a backend is asked for (or a CUDA tensor has no C++ kernel) a Python router is
put on the key; it runs inside the op, so eager, compiled and exported calls choose alike. The choice never looks
at data values and never synchronises.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

import torch

from pyops import _emulation, _environment, _lib
from pyops._environment import BACKENDS

_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
_logger = logging.getLogger("pyops")

# Registrations of this module live as long as this object.
library = torch.library.Library("pyops", "FRAGMENT")

# (family or "" for all) -> backend, for this thread and what it calls.
_forced: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("pyops_backend", default=None)


@dataclass
class Op:
    """One dispatcher op: who can serve it beside the C++ kernels."""

    name: str
    family: str
    reference: Callable
    triton_module: str
    levels: tuple[str, ...]  # instruction sets that its CPU kernels are compiled for
    missing: tuple[str, ...] = ()  # backends that have no kernel for it
    native: dict[str, object] = field(default_factory=dict)  # dispatch key -> C++ kernel, once a router sits on it

    def reasons_against(self, backend: str, args: tuple) -> list[str]:
        """Why ``backend`` cannot serve this call; empty when it can."""
        device = args[_first_tensor(args)].device.type
        if backend == "reference":
            return []
        if backend in self.missing:
            return [f"the op has no {backend} kernel"]
        if backend == "cuda" and _lib.emulated:
            return [] if device == "cpu" else [f"the emulation serves CPU tensors, the tensors are on {device}"]
        if backend in ("cpu", "cuda"):
            if backend == "cuda" and _lib.cuda_unavailable():
                return [_lib.cuda_unavailable()]
            if device != backend:
                return [f"the tensors are on {device}"]
            return []
        module, missing = _triton_kernels(self.triton_module)
        return [missing] if missing else list(module.reasons_against(self.name, *args))

    def run(self, backend: str, keyset, args: tuple):
        if backend == "triton":
            return getattr(_triton_kernels(self.triton_module)[0], self.name)(*args)
        if backend == "reference":
            return self.reference(*args)
        if backend == "cuda" and _lib.emulated:
            return _emulation.run(self.name, args)
        return self.native[backend.upper()].call_boxed(keyset, *args)


_ops: dict[str, Op] = {}
_reported: set[tuple[str, str]] = set()


def _first_tensor(args: tuple) -> int:
    return next(i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor))


@functools.cache
def _triton_kernels(name: str) -> tuple[ModuleType | None, str]:
    """A module of Triton kernels, or why it cannot be had; a damaged Triton must cost no more than its kernels."""
    missing = triton_unavailable()
    if missing:
        return None, missing
    try:
        return importlib.import_module(f"pyops.triton_kernels.{name}"), ""
    except Exception as error:
        return None, f"the Triton kernels do not import: {type(error).__name__}: {error}"


def triton_unavailable() -> str:
    """Why Triton cannot be used at all, or an empty string. Does not import it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return ""


def register(
    family: str,
    triton_module: str,
    levels: tuple[str, ...] = _lib.KERNEL_LEVELS,
    missing: tuple[str, ...] = (),
    **references: Callable,
) -> None:
    """Declares ops of a family: ``op=reference implementation`` with the op's own arguments and outputs."""
    for name, reference in references.items():
        _ops[name] = Op(name, family, reference, triton_module, levels, missing)
        if torch.version.cuda and ("cuda" in missing or not _lib.cuda_loaded()):
            library.impl(name, functools.partial(_route, _ops[name], "CUDA"), "CUDA", with_keyset=True)
    if _environment.values["PYOPS_BACKEND"]:
        _install_routers()


def _install_routers() -> None:
    """Puts the Python router on the CPU and CUDA keys of every op, keeping the C++ kernels reachable."""
    for op in _ops.values():
        for key in ("CPU", "CUDA"):
            if key in op.native or not torch._C._dispatch_has_kernel_for_dispatch_key(f"pyops::{op.name}", key):
                continue
            op.native[key] = torch.library.get_kernel(f"pyops::{op.name}", key)
            with warnings.catch_warnings():  # the override is the point
                warnings.simplefilter("ignore", UserWarning)
                library.impl(op.name, functools.partial(_route, op, key), key, with_keyset=True, allow_override=True)


def _route(op: Op, key: str, keyset, *args):
    device = key.lower()
    wanted = requested(op.family)
    if wanted is not None:
        reasons = op.reasons_against(wanted, args)
        if reasons:
            raise RuntimeError(
                f"pyops::{op.name}: backend {wanted} was asked for but cannot serve: {'; '.join(reasons)}"
            )
        return op.run(wanted, keyset, args)
    rejected = []
    for backend in _ORDER[device]:
        reasons = op.reasons_against(backend, args)
        if not reasons:
            if backend == "reference" and rejected:
                _report_fallback(op, rejected)
            return op.run(backend, keyset, args)
        rejected.append(f"{backend}: {'; '.join(reasons)}")
    raise RuntimeError(f"pyops::{op.name}: no backend can serve: {' | '.join(rejected)}")


def _report_fallback(op: Op, rejected: list[str]) -> None:
    text = f"pyops::{op.name} runs the torch reference because {' | '.join(rejected)}"
    if _environment.values["PYOPS_STRICT"] == "1":
        raise RuntimeError(text + " (PYOPS_STRICT=1 makes this an error)")
    if (op.name, text) not in _reported:
        _reported.add((op.name, text))
        _logger.warning(text)


def _parse_choice(text: str, source: str) -> dict[str, str]:
    """``"triton"`` or ``"ternary=triton,solvers=reference"`` as {family: backend}."""
    choice = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        family, _, backend = part.rpartition("=")
        if backend not in BACKENDS:
            raise ValueError(f"{source}: unknown backend {backend!r}; available: {_available()}")
        families = {op.family for op in _ops.values()}
        if family and families and family not in families:
            raise ValueError(f"{source}: unknown family {family!r}, must be one of {sorted(families)}")
        choice[family] = backend
    return choice


def _available() -> str:
    notes = {"cuda": _lib.cuda_unavailable(), "triton": triton_unavailable()}
    return ", ".join(f"{name} (not here: {notes[name]})" if notes.get(name) else name for name in BACKENDS)


def requested(family: str) -> str | None:
    """The backend that the caller asked for, for one family."""
    choice = _forced.get()
    if choice is None:
        text = _environment.values["PYOPS_BACKEND"]
        choice = _parse_choice(text, "PYOPS_BACKEND") if text else {}
    return choice.get(family) or choice.get("")


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Runs pyops ops on one backend in this thread: ``with pyops.use_backend("reference"): ...``

    Args:
        backend: ``"cuda"``, ``"triton"``, ``"cpu"``, ``"reference"``, or per family
            ``"spherical=reference"`` (comma-separated).

    An op that the backend cannot serve raises RuntimeError with the reasons: there is never a silent
    substitute. Unknown names raise ValueError. The setting is a context variable: other threads do not see it.
    Triton serves CPU tensors only when ``TRITON_INTERPRET=1`` was set before its first use.

    Example:
        >>> import torch, pyops
        >>> with pyops.use_backend("reference"):
        ...     loss = pyops.z_loss(torch.zeros(2, 5), torch.tensor([1, 2]))
        >>> round(loss.item(), 4)
        4.0181
    """
    if not isinstance(backend, str):
        raise TypeError(f"use_backend: backend must be a str, got {type(backend).__name__}")
    choice = _parse_choice(backend, "use_backend")
    if not choice:
        raise ValueError(f"use_backend: unknown backend {backend!r}; available: {_available()}")
    _install_routers()
    outer = {} if "" in choice else _forced.get() or {}  # a choice for all families replaces an outer one
    token = _forced.set({**outer, **choice})
    try:
        yield
    finally:
        _forced.reset(token)


def snapshot() -> dict[str, str] | None:
    """The forced choice, for a backward that may run in another thread."""
    return _forced.get()


@contextlib.contextmanager
def restored(choice: dict[str, str] | None) -> Iterator[None]:
    token = _forced.set(choice)
    try:
        yield
    finally:
        _forced.reset(token)


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found: the backend that would run, its CPU kernel level, and why not the others."""

    op: str
    backend: str
    cpu_isa: str | None
    rejected: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}" + (f" ({self.cpu_isa})" if self.cpu_isa else "")]
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.rejected.items()]
        return "\n".join(lines)


def explain_op(name: str, args: tuple) -> Explanation:
    """The choice for a dispatcher op and its arguments, without running it."""
    op = _ops[name]
    device = args[_first_tensor(args)].device.type
    wanted = requested(op.family)
    rejected: dict[str, list[str]] = {}
    chosen = None
    for backend in dict.fromkeys((*_ORDER.get(device, ("reference",)), *BACKENDS)):
        reasons = op.reasons_against(backend, args)
        if wanted is not None and backend != wanted:
            reasons = [*reasons, f"backend {wanted} was asked for"]
        elif backend not in _ORDER.get(device, ()) and wanted is None:
            reasons = [*reasons, f"not chosen by itself for {device} tensors"]
        if reasons:
            rejected[backend] = reasons
        elif chosen is None:
            chosen = backend
        else:
            rejected[backend] = [f"{chosen} comes first"]
    if chosen is None:
        raise RuntimeError(f"pyops::{name}: no backend can serve: {rejected}")
    return Explanation(name, chosen, _lib.kernel_level(op.levels) if chosen == "cpu" else None, rejected)
