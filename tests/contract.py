"""The contract: what every operator and public function of pyops does, whatever its family.

Each family describes its operators and functions in ``tests/<family>/samples.py`` (``OPS`` and ``FUNCTIONS``:
tuples of :class:`Op` and :class:`Function`). Everything below runs over all of them, and the first tests fail when
the dispatcher knows an operator, or the package a function, that no table describes.

The accuracy rule is :func:`assert_accurate`; nothing here has a hand-picked tolerance.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

TESTS = Path(__file__).resolve().parent

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ALL_DTYPES = (
    *FLOATING,
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)


# ---- what a family describes -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of one call of a public function, all by name."""

    tensors: dict[str, Tensor | None]
    options: dict[str, Any]

    def __call__(self, function: Callable) -> tuple[Tensor, ...]:
        result = function(**self.tensors, **self.options)
        return result if isinstance(result, tuple) else (result,)

    def replace(self, **changed: Any) -> Call:
        """The same call with some tensors or options changed."""
        tensors = {name: changed.get(name, tensor) for name, tensor in self.tensors.items()}
        options = {**self.options, **{name: value for name, value in changed.items() if name not in tensors}}
        return Call(tensors, options)

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor changed."""
        return Call({n: None if t is None else change(t) for n, t in self.tensors.items()}, self.options)

    def to(self, dtype: torch.dtype) -> Call:
        """The same call with every floating tensor converted."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def given(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if tensor is not None}


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A bad call: what to change in a good one, and the error; ``text`` is what follows "pyops::<name>: "."""

    label: str
    change: Callable[[dict[str, Any]], dict[str, Any]]
    error: type[Exception]
    text: str
    by_value: bool = False  # depends on tensor elements, so that a fake tensor cannot know


@dataclasses.dataclass(frozen=True)
class Function:
    """A public function.

    ``make(variant, dtype, seed, **sizes)`` builds a :class:`Call`; ``sizes`` overrides the named sizes below. A
    size may be 0 or 1. ``definition`` is the mathematical definition as differentiable torch code, independent
    of the package, in the dtype of its arguments; ``plain`` the honest torch code in the working dtype.
    """

    name: str
    function: Callable
    make: Callable[..., Call]
    variants: tuple[str, ...]  # the first is the plain one
    per_row: str  # a variant whose output has one entry per row, for checks of independence
    full: str  # a variant in which every tensor argument is given
    sizes: dict[str, int]
    edges: dict[str, tuple[int, ...]]  # per size: tile borders and their neighbours
    large: tuple[dict[str, int], ...]  # sizes at which work is shared among threads
    batch: dict[str, int]  # tensor argument -> its batch dimension
    positional: tuple[str, ...]  # arguments that may be given without their name
    differentiable: tuple[str, ...]  # the first is given in every variant
    definition: Callable
    plain: Callable
    calls: Callable[[bool], st.SearchStrategy[Call]]  # random calls; True asks for tiny ones
    stages: Callable  # (call, upstream, forward context, backward context) -> results, on split backends
    module: Callable[[Call], tuple[torch.nn.Module, tuple[Tensor, ...]]]  # a module that does the call
    autocast: Callable[[Call, torch.dtype], tuple[Call, torch.dtype]]  # what is computed then, dtype of the output
    mixed: tuple[str, ...]  # arguments that may have a dtype of their own under autocast
    aliases: Callable[[], Iterator[tuple[str, Tensor, Callable[[Tensor], Call]]]]  # arguments sharing memory
    rejections: tuple[Rejection, ...]
    memory: dict[str, int]  # sizes that make the first variant need 64 MiB, and as much for a gradient
    dtypes: tuple[torch.dtype, ...] = FLOATING
    exported: bool = True  # at the top of the package
    smooth: bool = True  # finite differences tell its derivative; otherwise it rounds, and gradients pass through
    second_derivative: str = "exact"  # or "raises"
    bit_identical: tuple[str, ...] = ()  # variants whose outputs are the same bits on every backend
    gradients_by_row: bool = True  # a row's gradient has the same bits in every batch
    few_edges: dict[str, tuple[int, ...]] | None = None  # where a call takes a second, in place of edges
    largest: float = 1.0  # the largest extreme, as a share of the dtype's: sums of products stay in range
    summed_by_torch: tuple[str, ...] = ()  # arguments whose gradient is a sum left to torch
    sizes_in_options: tuple[str, ...] = ()  # sizes that an option repeats: each is another graph
    operators: int = 1  # that a call runs
    operators_in_transforms: tuple[str, ...] = ()
    backward_operators: Callable[[Call, tuple[str, ...]], set[str]] | None = None  # None: some for any gradient
    error_names: dict[str, str] = dataclasses.field(default_factory=dict)  # by argument, where not the function's

    def __str__(self) -> str:
        return self.name

    @property
    def widest(self) -> torch.dtype:
        """Where nothing but the formula matters."""
        return torch.float64 if torch.float64 in self.dtypes else torch.float32

    def error(self, text: str) -> str:
        """The whole error text, of one that begins with the name of an argument."""
        if text.startswith("pyops::"):
            return text
        return f"pyops::{self.error_names.get(text.split()[0], self.error_names.get('', self.name))}: {text}"

    def given(self, call: Call) -> tuple[str, ...]:
        """The differentiable arguments that a call has."""
        return tuple(name for name in self.differentiable if call.tensors[name] is not None)


@dataclasses.dataclass(frozen=True)
class Op:
    """An operator of the dispatcher; ``make(variant, dtype, seed, **sizes)`` gives arguments by schema name."""

    name: str
    make: Callable[..., dict[str, Any]]
    variants: tuple[str, ...]
    full: str  # a variant in which every tensor argument is given
    accepts: dict[str, tuple[torch.dtype, ...]]  # dtypes a tensor argument of the full variant may have
    public_name: Callable[[dict[str, Any]], str]  # the name in error texts
    differentiable: tuple[str, ...]
    rejections: tuple[Rejection, ...]
    other_sizes: tuple[dict[str, int], ...]
    dtypes: tuple[torch.dtype, ...] = FLOATING
    smooth: bool = True
    autocast: torch.dtype = torch.float32  # dtype of its output for bfloat16 arguments under autocast

    def __str__(self) -> str:
        return self.name

    @property
    def widest(self) -> torch.dtype:
        return torch.float64 if torch.float64 in self.dtypes else torch.float32

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.pyops, self.name).default

    @property
    def tensors(self) -> list[str]:
        """Names of the tensor arguments."""
        return [a.name for a in self.overload._schema.arguments if "Tensor" in str(a.type)]

    @property
    def written(self) -> list[str]:
        """Names of the arguments that the operator changes."""
        arguments = self.overload._schema.arguments
        return [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]

    def __call__(self, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        """Outputs, then the arguments that were changed (in place: pass copies)."""
        result = self.overload(**arguments)
        outputs = result if isinstance(result, tuple) else () if result is None else (result,)
        return (*outputs, *(arguments[name] for name in self.written))


@functools.cache
def families() -> tuple[Any, ...]:
    found = sorted(path.parent.name for path in TESTS.glob("*/samples.py"))
    return tuple(importlib.import_module(f"{name}.samples") for name in found)


def family_of(item: Function | Op) -> Any:
    """The module that describes a function or an operator."""
    return next(family for family in families() if any(item is one for one in (*family.FUNCTIONS, *family.OPS)))


def functions() -> tuple[Function, ...]:
    return tuple(itertools.chain.from_iterable(family.FUNCTIONS for family in families()))


def ops() -> tuple[Op, ...]:
    return tuple(itertools.chain.from_iterable(family.OPS for family in families()))


# ---- backends ----------------------------------------------------------------------------------------------

ON_GPU = ("cuda", "triton-gpu")
# Levels that a family's CPU kernels are compiled for, unless its table (LEVELS) says otherwise.
LEVELS = ("baseline", "avx2", "avx512")
ALL_LEVELS = ("baseline", "avx2", "avxvnni", "avx512", "avx512vnni")
ON_CPU = tuple(f"cpu:{level}" for level in ALL_LEVELS)
BACKENDS = (*ON_CPU, "cuda-emulated", "triton-interpreted", "reference", *ON_GPU)
ON_HOST = tuple(name for name in BACKENDS if name not in ON_GPU)
# For tests that bring their tensors by on_device; those that do not run on_every_host_backend.
on_every_backend = pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=pytest.mark.gpu) if name in ON_GPU else name for name in BACKENDS],
    indirect=True,
)
on_every_host_backend = pytest.mark.parametrize("backend", ON_HOST, indirect=True)


def levels(family: str) -> tuple[str, ...]:
    return getattr(next((f for f in families() if f.__name__ == f"{family}.samples"), None), "LEVELS", LEVELS)


def concerns(family: str, parameters: dict[str, Any]) -> bool:
    """Whether there is such a case: the family has kernels of that level, the function takes that dtype."""
    item = next((value for value in parameters.values() if isinstance(value, (Function, Op))), None)
    if item is not None:
        family = family_of(item).__name__.partition(".")[0]
    missing = {f"cpu:{level}" for level in ALL_LEVELS if level not in levels(family)}
    dtypes = ALL_DTYPES if item is None else item.dtypes
    return not any(
        value in missing if isinstance(value, str) else isinstance(value, torch.dtype) and value not in dtypes
        for value in parameters.values()
    )


def native():
    import pyops._lib

    return pyops._lib.native


@functools.cache
def unavailable(backend: str) -> str:
    """Why a backend cannot run here, or an empty string."""
    from pyops import _dispatch, _lib

    kind, _, level = backend.partition(":")
    if kind == "cpu":
        native().force_isa(level)
        reached = native().current_isa()
        native().force_isa(None)
        return "" if reached == level else f"this processor reaches {native().detected_isa()} only"
    if kind == "cuda-emulated":
        return "" if _lib.emulated else "a run of its own (make emulate)"
    if kind == "cuda":
        return _lib.cuda_unavailable()
    if kind.startswith("triton"):
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if kind == "triton-gpu" and not torch.cuda.is_available():
            return "no CUDA device is available to torch"
        if interpreted != (kind == "triton-interpreted"):
            return f"a run of its own (TRITON_INTERPRET={int(not interpreted)})"
        return _dispatch.triton_unavailable()
    return ""


@contextlib.contextmanager
def running_on(backend: str) -> Iterator[None]:
    """Within the block, calls on CPU tensors run on one backend ("default": whatever a user gets)."""
    import pyops

    kind, _, level = backend.partition(":")
    if kind == "cpu":
        native().force_isa(level)
        try:
            yield
        finally:
            native().force_isa(None)
    elif backend in ("default", "cuda"):
        yield
    else:
        names = {"triton-interpreted": "triton", "triton-gpu": "triton", "cuda-emulated": "cuda"}
        with pyops.use_backend(names.get(kind, kind)):
            yield


def moved(tensor: Tensor, device: str) -> Tensor:
    """On a device in the same layout; ``Tensor.to`` makes most views contiguous."""
    negative = tensor.is_neg()
    plain = torch._neg_view(tensor) if negative else tensor
    whole = torch.empty(0, dtype=tensor.dtype).set_(plain.untyped_storage()).to(device, copy=True)
    there = whole.as_strided(plain.shape, plain.stride(), plain.storage_offset())
    return torch._neg_view(there) if negative else there


def on_device(call: Call, backend: str) -> Call:
    return call.map(lambda tensor: moved(tensor, "cuda")) if backend in ON_GPU else call


def is_slow(backend: str) -> bool:
    """Interpreted kernels take milliseconds per tile."""
    return backend == "triton-interpreted"


# ---- comparing ---------------------------------------------------------------------------------------------

Results = dict[str, Tensor]  # "output 0", ..., "gradient of <argument>"


def upstream_gradient(output: Tensor) -> Tensor:
    """A fixed gradient without zeros whose entries are exact in every floating dtype."""
    count = torch.arange(output.numel(), device=output.device)
    eighths = count * 5 % 13 - 6
    return (torch.where(eighths == 0, 7, eighths) / 8).reshape(output.shape).to(output.dtype)


def outputs_and_gradients(function: Callable, call: Call, wanted: tuple[str, ...]) -> Results:
    """Outputs of a call and the gradients of some of its tensors, for a fixed upstream gradient."""
    leaves = {name: call.tensors[name].detach().requires_grad_() for name in wanted}
    outputs = call.replace(**leaves)(function)
    results = {f"output {position}": output.detach() for position, output in enumerate(outputs)}
    roots = [output for output in outputs if output.requires_grad]
    if roots:
        torch.autograd.backward(roots, [upstream_gradient(root) for root in roots])
    return results | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}


def ulp(dtype: torch.dtype, magnitude: Tensor) -> Tensor:
    """The spacing of numbers of a dtype at some magnitudes."""
    info = torch.finfo(dtype)
    _, exponent = magnitude.clamp(min=info.tiny).frexp()
    return torch.ldexp(torch.full(exponent.shape, info.eps / 2, dtype=torch.float64), exponent)


def assert_accurate(
    ours: Tensor,
    same_dtype_torch: Tensor,
    float64_reference: Tensor,
    what: str = "",
    working: torch.dtype | None = None,
) -> None:
    """The accuracy rule, for one output or gradient.

    With K = ours, P = plain torch in the working dtype, R = float64 on the same rounded inputs::

        max |K - R|  <=  2 max |P - R| + 4 ulp(max |R|)
        mean |K - R| <=  1.5 mean |P - R| + mean ulp(R) / 2

    The last term lets a correctly rounded result pass where P happens to be exact; the rule for means says
    nothing about a handful of numbers and is applied from 16 on. If R is 0 throughout, everything has cancelled and
    ulp(1) stands for ulp(max |R|). Of float64 a relative error of 1e-12 is asked. Where R is NaN, infinite or beyond
    the dtype, ours must be NaN or that infinity. ``working`` is the dtype of the computation, where ours is stored
    in a wider one.
    """
    assert ours.shape == float64_reference.shape, f"{what}: {ours.shape} is not {float64_reference.shape}"
    assert float64_reference.dtype == torch.float64, f"{what}: the reference must be float64"
    dtype = max(ours.dtype, working or ours.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    rounded = float64_reference.to(dtype)
    assert_same_specials(ours, rounded, what)
    finite = rounded.isfinite()
    if not finite.any():
        return
    exact = float64_reference[finite]
    error = (ours[finite].double() - exact).abs()
    largest = exact.abs().max()
    scale = f"{dtype}, largest value {largest:.3g}"
    if dtype == torch.float64:
        # No wider type serves as truth here: the definition's own noise is what it gives for inputs that differ by a
        # few units in the last place (see expected_results).
        nudged_error = (same_dtype_torch[finite] - exact).abs()
        nudged_error = nudged_error[nudged_error.isfinite()]
        bound = 1e-12 * (largest.item() or 1) + (2 * nudged_error.max().item() if nudged_error.numel() else 0)
        assert error.max() <= bound, f"{what}: error {error.max():.3g} exceeds {bound:.3g} ({scale})"
        return
    plain_error = (same_dtype_torch[finite].double() - exact).abs()
    plain_error = plain_error[plain_error.isfinite()]  # where plain torch overflows it sets no bar
    worst_plain = plain_error.max().item() if plain_error.numel() else 0.0
    bound = 2 * worst_plain + 4 * ulp(dtype, largest if largest > 0 else torch.ones_like(largest)).item()
    assert error.max() <= bound, (
        f"{what}: error {error.max():.3g} exceeds {bound:.3g} ({scale}, plain torch {worst_plain:.3g})"
    )
    if plain_error.numel() < 16:
        return
    bound = 1.5 * plain_error.mean().item() + ulp(dtype, exact.abs()).mean().item() / 2
    assert error.mean() <= bound, (
        f"{what}: mean error {error.mean():.3g} exceeds {bound:.3g} ({scale}, plain torch {plain_error.mean():.3g})"
    )


def assert_same_specials(ours: Tensor, expected: Tensor, what: str = "") -> None:
    """NaN exactly where expected, infinities of the same sign exactly where expected."""
    for name, test in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(ours) != test(expected)
        assert not wrong.any(), (
            f"{what}: {name} in the wrong places, e.g. {tuple(wrong.nonzero()[0].tolist())}: "
            f"{ours[wrong].flatten()[0]} instead of {expected[wrong].flatten()[0]}"
        )


def assert_results_accurate(ours: Results, plain: Results, reference: Results, what: str = "") -> None:
    assert ours.keys() == reference.keys()
    working = torch.float64 if plain["output 0"].dtype == torch.float64 else torch.float32
    for name, tensor in ours.items():
        assert tensor is not None, f"{what} {name} is None"
        rounded = plain[name].to(tensor.dtype)
        assert_accurate(tensor, rounded, reference[name], f"{what} {name}".strip(), working)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal to the last bit; NaN equals NaN."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    same = (actual == expected) & (actual.signbit() == expected.signbit()) | (actual != actual) & (expected != expected)
    assert same.all(), f"{what}: {int((~same).sum())} of {same.numel()} elements differ"


def assert_same_results(actual: Results, expected: Results, what: str = "") -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert_same_bits(tensor, expected[name], f"{what} {name}".strip())


def expected_results(function: Function, call: Call, wanted: tuple[str, ...]) -> tuple[Results, Results]:
    """(plain torch, float64 reference) on the same rounded inputs. Plain torch computes 16-bit types in float32,
    as torch's own kernels do: a stricter bar than rounding every intermediate. For float64 it is the definition for
    inputs that differ in their last bits."""
    dtype = call.tensors[function.differentiable[0]].dtype
    working = call if dtype in (torch.float32, torch.float64) else call.to(torch.float32)
    exact = outputs_and_gradients(function.definition, call.to(torch.float64), wanted)
    if dtype != torch.float64:
        return outputs_and_gradients(function.plain, working, wanted), exact
    nearby = [
        outputs_and_gradients(
            function.definition, call.replace(**{n: nudged(call.tensors[n], seed) for n in wanted}), wanted
        )
        for seed in range(3)
    ]
    plain = {
        name: torch.stack([value, *(results[name] for results in nearby)]).sub(value).abs().amax(0) + value
        for name, value in exact.items()
    }
    return plain, exact


def nudged(tensor: Tensor, seed: int) -> Tensor:
    """Up to 16 units in the last place up or down."""
    steps = torch.randint(-16, 17, tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.device)
    return tensor.detach() * (1 + steps.to(tensor.dtype) * torch.finfo(tensor.dtype).eps)


def check_accuracy(function: Function, call: Call, what: str = "") -> None:
    """Outputs and gradients of a call obey the accuracy rule."""
    wanted = function.given(call)
    ours = outputs_and_gradients(function.function, call, wanted)
    for name in wanted:
        assert ours[f"gradient of {name}"].dtype == call.tensors[name].dtype
    assert_results_accurate(ours, *expected_results(function, call, wanted), what)


# ---- generators --------------------------------------------------------------------------------------------


def placed(tensor: Tensor, buffer_shape: tuple[int, ...], where: Callable[[Tensor], Tensor]) -> Tensor:
    """The values of a tensor in a view of a larger buffer, whose other elements would show if they were read: NaN,
    an index that is out of range, or a byte that is no code."""
    poison = float("nan") if tensor.is_floating_point() else max(-12345, torch.iinfo(tensor.dtype).min)
    poison = 255 if tensor.dtype == torch.uint8 else poison
    view = where(torch.full(buffer_shape, poison, dtype=tensor.dtype))
    view.copy_(tensor)
    return view


def layout_makers(tensor: Tensor, written: bool = False) -> dict[str, Callable[[], Tensor]]:
    """Views of every kind by name, made when called. The first few keep the values; the others change them. A tensor
    that will be written cannot overlap itself, and torch does not write through a negative bit."""
    shape, dims = tensor.shape, range(tensor.dim())
    makers: dict[str, Callable[[], Tensor]] = {}
    for dim, size in enumerate(shape):
        doubled = (*shape[:dim], 2 * size + 3, *shape[dim + 1 :])
        steps = (*[slice(None)] * dim, slice(3, None, 2))
        padding = (*[slice(None)] * dim, slice(1, 1 + size))
        makers[f"every second along {dim}"] = functools.partial(placed, tensor, doubled, lambda t, at=steps: t[at])
        makers[f"padded along {dim}"] = functools.partial(placed, tensor, doubled, lambda t, at=padding: t[at])
    for order in itertools.islice(itertools.permutations(dims), 1, 6):
        inverse = [order.index(dim) for dim in dims]
        makers[f"stored as {order}"] = lambda order=order, inverse=inverse: (
            tensor.permute(order).contiguous().permute(inverse)
        )
    if tensor.dim() == 4:
        makers["channels last"] = lambda: tensor.contiguous(memory_format=torch.channels_last)
    if tensor.is_floating_point() and not written:
        makers["negative bit"] = lambda: torch._neg_view(-tensor)
    for dim in dims:
        makers[f"flipped along {dim}"] = lambda dim=dim: tensor.flip(dim)
        if shape[dim] and not written:
            makers[f"expanded along {dim}"] = lambda dim=dim: tensor.narrow(dim, 0, 1).expand(shape)
    if tensor.dim() > 1 and tensor.numel() and not written:
        makers["overlapping rows"] = lambda: tensor.reshape(-1).as_strided(shape, [1] * tensor.dim())
    return makers


def layouts(tensor: Tensor, *, written: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Views of every kind, each to be compared with its own contiguous copy."""
    for name, make in layout_makers(tensor, written).items():
        yield name, make()


def drawn_layout(data: st.DataObject, name: str, tensor: Tensor) -> Tensor:
    """A random view of the same values."""
    makers = layout_makers(tensor)
    kept = [kind for kind in makers if not kind.startswith(("flipped", "expanded", "overlapping"))]
    kind = data.draw(st.sampled_from(["contiguous", *kept]), f"layout of {name}")
    return makers.get(kind, lambda: tensor)()


def misaligned(tensor: Tensor, offset: int) -> Tensor:
    """The same values, starting some elements into their storage."""
    return placed(
        tensor, (tensor.numel() + offset,), lambda buffer: buffer[offset:].as_strided(tensor.shape, tensor.stride())
    )


def fresh(arguments: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """Arguments with contiguous copies of all tensors but the changed ones."""
    copies = {
        n: a.clone(memory_format=torch.contiguous_format) if isinstance(a, Tensor) else a for n, a in arguments.items()
    }
    return copies | changed


def applicable(kind: str) -> list | None:
    """The items that a test asks for by the name of an argument."""
    choices = {
        "op": ops,
        "differentiable_op": lambda: [op for op in ops() if op.differentiable],
        "writing_op": lambda: [op for op in ops() if op.written],
        "functional_op": lambda: [op for op in ops() if not op.written],
        "function": functions,
        "smooth_function": lambda: [f for f in functions() if f.smooth],
        "rounding_function": lambda: [f for f in functions() if not f.smooth],
        "twice_differentiable_function": lambda: [f for f in functions() if f.second_derivative == "exact"],
        "once_differentiable_function": lambda: [f for f in functions() if f.second_derivative == "raises"],
        "bit_identical_function": lambda: [f for f in functions() if f.bit_identical],
        "smooth_op": lambda: [op for op in ops() if op.differentiable and op.smooth],
    }
    return list(choices[kind]()) if kind in choices else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises over functions or operators and, as far as the test asks for them, their variants or the names of
    their tensor arguments."""
    kind = next((name for name in metafunc.fixturenames if applicable(name) is not None), None)
    if kind is None:
        return
    items = applicable(kind)
    second = next((name for name in ("variant", "argument") if name in metafunc.fixturenames), None)
    if second is None:
        metafunc.parametrize(kind, items, ids=str)
        return

    def names(item: Op | Function) -> list[str]:
        if second == "variant":
            return list(item.variants)
        return item.tensors if isinstance(item, Op) else list(item.make(item.full).given())

    pairs = [(item, name) for item in items for name in names(item)]
    metafunc.parametrize((kind, second), pairs, ids=[f"{item}-{name}" for item, name in pairs])


@contextlib.contextmanager
def recorded_ops() -> Iterator[Counter]:
    """Counts the pyops operators that run within the block."""
    counts: Counter = Counter()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "pyops":
                counts[function._schema.name.removeprefix("pyops::")] += 1
            return function(*args, **(kwargs or {}))

    with Recorder():
        yield counts


def in_fresh_process(script: str, *arguments: object, timeout: float = 180, **environment: str) -> str:
    """Runs Python code in a new interpreter that can import the tests; its output, or a failed test."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))}
        | environment,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def error_of(call: Callable[[], object]) -> tuple[type[Exception], str]:
    """Type and text of what a call raises."""
    try:
        result = call()
    except Exception as error:
        return type(error), str(error)
    raise AssertionError(f"no error, but {result!r}")


def test_moving_to_a_device_keeps_the_layout():
    values = torch.arange(24.0).reshape(4, 6)
    for name, view in layouts(values):
        there = moved(view, "cpu")
        assert torch.equal(there, view), name
        kept = (there.stride(), there.storage_offset(), there.is_neg())
        assert kept == (view.stride(), view.storage_offset(), view.is_neg()), name
        assert there.untyped_storage().data_ptr() != view.untyped_storage().data_ptr(), name


# ---- nothing is left out -----------------------------------------------------------------------------------


def test_every_operator_is_in_a_table():
    import pyops  # noqa: F401  (loads the operators)

    known = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyops::")}
    described = {f"pyops::{op.name}" for op in ops()}
    assert known == described, f"without an entry: {known - described}; without an operator: {described - known}"


# What the tables cannot describe, by the file that tests it: a layer that takes steps and is no function, and what has
# no operator of its own yet.
COMPOSED = {
    "FactoredSphericalLinear": "spherical/test_factored_linear.py",
    "SphericalLinearLoss": "spherical/test_linear_loss.py",
    "linear_cross_entropy": "spherical/test_linear_cross_entropy.py",
    "spherical_linear_loss": "spherical/test_linear_loss.py",
}


def test_what_is_composed_has_tests_of_its_own():
    for name, file in COMPOSED.items():
        assert name in (Path(__file__).parent / file).read_text(), name
        assert name not in {function.name for function in functions()}


def test_every_public_function_is_in_a_table():
    import pyops

    # These take no tensors to compute with; they have tests of their own.
    tools = {"explain", "use_backend", "convert", "pack", "revert"}
    public = {name for name in pyops.__all__ if callable(getattr(pyops, name))} - tools
    public -= {name for name in public if isinstance(getattr(pyops, name), type)}  # exceptions
    assert public - set(COMPOSED) == {function.name for function in functions() if function.exported}


def test_every_module_is_in_a_table():
    import pyops

    modules = {type(f.module(f.make(f.variants[0]))[0]).__name__ for f in functions()}
    assert modules == set(pyops.nn.__all__) - set(COMPOSED)


def test_every_family_has_its_folder():
    import pyops

    package = Path(pyops.__file__).parent
    declared = {path.parent.name for path in package.glob("*/reference.py")}
    assert declared == {family.__name__.partition(".")[0] for family in families()}


def test_every_tensor_argument_is_given(op):
    assert [name for name in op.tensors if op.make(op.full)[name] is None] == []


def test_only_operators_named_so_write(op):
    assert bool(op.written) == op.name.endswith("_")
    returns = op.overload._schema.returns
    assert all(result.alias_info is None for result in returns), "an output shares memory with an argument"


# ---- the accuracy rule (R4, R7, R8, R47) ---------------------------------------------------------------------


@pytest.mark.row("R47")
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@on_every_backend
def test_accuracy(function, variant, dtype, backend):
    check_accuracy(function, on_device(function.make(variant, dtype), backend))


@pytest.mark.row("R4")
@on_every_backend
def test_sizes_one_prime_and_around_tiles(function, backend, count_cases):
    cases = 0
    kinds = ((function.per_row, torch.float32), (function.full, torch.bfloat16))
    for size, values in (function.few_edges or function.edges if is_slow(backend) else function.edges).items():
        for value in values:
            if is_slow(backend) and value > 70:
                continue
            for variant, dtype in kinds[:1] if is_slow(backend) else kinds:
                others = {n: min(number, 2) if value > 1000 else number for n, number in function.sizes.items()}
                call = on_device(function.make(variant, dtype, seed=value, **others | {size: value}), backend)
                check_accuracy(function, call, f"{size} = {value}, {variant}")
                cases += 1
    count_cases(cases)


@pytest.mark.row("R4")
@on_every_backend
def test_all_sizes_one(function, variant, backend):
    check_accuracy(function, on_device(function.make(variant, **dict.fromkeys(function.sizes, 1)), backend))


def magnitude_name(magnitude: tuple[float, float]) -> str:
    return f"scale {magnitude[0]:g} offset {magnitude[1]:g}"


MAGNITUDES = ((1e-4, 0.0), (1e5, 0.0), (1.0, 1e3), (1.0, -1e4), (1e-3, 1e2), (30.0, 1e5), (1e-6, 1e-6), (1e3, -1e3))


@pytest.mark.row("R8")
@pytest.mark.parametrize("magnitude", MAGNITUDES, ids=magnitude_name)
@on_every_backend
def test_large_and_small_magnitudes(function, magnitude, backend):
    scale, offset = magnitude
    for variant in (function.per_row, function.full):
        call = on_device(function.make(variant, seed=7, scale=scale, offset=offset), backend)
        check_accuracy(function, call, variant)


def extreme_values(dtype: torch.dtype, share: float = 1.0) -> dict[str, tuple[float, ...]]:
    """Fillings of an argument, repeated along it. Squares of the larger ones overflow the dtype, not float64."""
    info = torch.finfo(dtype)
    largest = info.max * share
    return {
        "zeros": (0.0,),
        "negative zeros": (-0.0, 0.0),
        "equal": (0.7,),
        "largest": (largest, -largest, 0.5 * largest),
        "equal and largest": (largest,),
        "smallest normal": (info.tiny, -info.tiny),
        "denormals": (info.smallest_normal / 4, 0.0, -info.smallest_normal / 2),
        "both ends": (largest, info.tiny, -1.0, 0.0),
    }


@pytest.mark.row("R7")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("values", extreme_values(torch.float32))
@on_every_backend
def test_extreme_values(function, values, dtype, backend):
    """Finite where the formula is, by the accuracy rule."""
    if backend == "triton-interpreted" and dtype == torch.bfloat16 and "denormals" in values:
        pytest.skip("Triton's interpreter converts bfloat16 subnormals to other numbers")
    call = function.make(function.per_row, dtype)
    pattern = torch.tensor(extreme_values(dtype, function.largest)[values], dtype=dtype)
    for name in function.given(call):
        shape = call.tensors[name].shape
        repeated = pattern.repeat(-(-shape.numel() // len(pattern)))[: shape.numel()].reshape(shape)
        check_accuracy(function, on_device(call.replace(**{name: repeated}), backend), name)


@pytest.mark.row("R6")
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")], ids=str)
@on_every_backend
def test_specials_in_differentiable_arguments(function, special, backend, count_cases):
    """NaN and infinities come out exactly where the definition has them; other rows do not notice."""
    count_cases(check_specials(function, special, backend, function.differentiable, assert_same_specials))


@pytest.mark.row("R6")
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")], ids=str)
@on_every_backend
def test_specials_in_other_arguments(function, special, backend, count_cases):
    """A result is finite exactly where the definition's is. (Of an infinite weight the definition makes infinity
    minus infinity along its way; whether that shows as NaN or infinity says nothing about the weight.)"""

    def assert_as_finite(ours: Tensor, expected: Tensor, what: str) -> None:
        wrong = ours.isfinite() != expected.isfinite()
        assert not wrong.any(), f"{what}: {ours[wrong][0]} instead of {expected[wrong][0]}"

    names = function.make(function.full).given()
    others = tuple(n for n, t in names.items() if t.is_floating_point() and n not in function.differentiable)
    count_cases(check_specials(function, special, backend, others, assert_as_finite))


def check_specials(function: Function, special: float, backend: str, names: tuple[str, ...], compare: Callable) -> int:
    """Puts a special value into three places of each argument; the number of cases."""
    cases = 0
    for variant, name in itertools.product((function.per_row, function.full), names):
        good = function.make(variant)
        if good.tensors[name] is None:
            continue
        for position in (0, good.tensors[name].numel() // 2, good.tensors[name].numel() - 1):
            changed = good.tensors[name].clone()
            changed.view(-1)[position] = special
            call = on_device(good.replace(**{name: changed}), backend)
            wanted = function.given(call)
            ours = outputs_and_gradients(function.function, call, wanted)
            expected = outputs_and_gradients(function.definition, call.to(torch.float64), wanted)
            for result, value in ours.items():
                compare(value, expected[result], f"{variant}, {name}[{position}], {result}")
            cases += 1
    return cases


@pytest.mark.row("R47")
@pytest.mark.parametrize("backward_on", ON_HOST)
@pytest.mark.parametrize("backend", ON_HOST, indirect=True)
def test_forward_of_one_backend_with_backward_of_another(function, backend, backward_on, count_cases):
    """What a forward saves means the same on every backend."""
    if unavailable(backward_on):
        pytest.skip(unavailable(backward_on))
    contexts = (functools.partial(running_on, backend), functools.partial(running_on, backward_on))
    for variant in (function.per_row, function.full, function.variants[0]):
        call = function.make(variant, seed=5)
        results = function.stages(call, *contexts)
        assert_results_accurate(results, *expected_results(function, call, function.given(call)), variant)
    count_cases(3)


@pytest.mark.row("R47")
@pytest.mark.routed
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@on_every_backend
def test_outputs_are_the_same_bits_on_every_backend(bit_identical_function, dtype, backend, count_cases):
    """Of the variants that promise it, in sizes around the tiles: those of the torch code."""
    function, cases = bit_identical_function, 0
    for variant in function.bit_identical:
        edges = function.edges if variant == function.full and not is_slow(backend) else {}
        sizes = [{}] + [{size: value} for size, values in edges.items() for value in values]
        for changed in sizes:
            call = function.make(variant, dtype, seed=11, **{**function.sizes, **changed})
            with torch.no_grad():
                actual = on_device(call, backend)(function.function)
                with running_on("reference"):
                    expected = call(function.function)
            for left, right in zip(actual, expected, strict=True):
                assert_same_bits(left.cpu(), right, f"{variant} {changed}")
            cases += 1
    count_cases(cases)


# ---- layouts (R1, R2, R3) ------------------------------------------------------------------------------------


@pytest.mark.row("R1")
def test_layouts_equal_contiguous(op, argument, count_cases):
    """Any strides, one argument at a time, to the last bit; what lies around a written view stays. Where a layout
    changes the values to ones that the operator rejects, the error is the same."""
    arguments = op.make(op.full)
    cases = 0
    for label, view in layouts(arguments[argument], written=argument in op.written):
        expected = outcome(op, fresh(arguments, **{argument: view.clone(memory_format=torch.contiguous_format)}))
        storage_before = whole_storage(view).clone()
        actual = outcome(op, fresh(arguments, **{argument: view}))
        if isinstance(expected, str):
            assert actual == expected, label
            continue
        for position, tensor in enumerate(actual):
            assert_same_bits(tensor, expected[position], f"{label}, output {position}")
        untouched = outside(view) if argument in op.written else slice(None)
        assert_same_bits(whole_storage(view)[untouched], storage_before[untouched], f"{label}, memory of the input")
        cases += 1
    count_cases(cases)


def outcome(op: Op, arguments: dict[str, Any]) -> tuple[Tensor, ...] | str:
    """What an operator returns, or what it says of an index that is out of range."""
    try:
        with torch.no_grad():
            return op(arguments)
    except IndexError as error:
        return str(error)


def whole_storage(view: Tensor) -> Tensor:
    """All elements of the memory that a view lies in."""
    elements = view.untyped_storage().nbytes() // view.element_size()
    return (
        torch._neg_view(view).as_strided((elements,), (1,), 0)
        if view.is_neg()
        else view.as_strided((elements,), (1,), 0)
    )


def outside(view: Tensor) -> Tensor:
    """A mask of the storage: elements that do not belong to the view."""
    mask = torch.ones(view.untyped_storage().nbytes() // view.element_size(), dtype=torch.bool)
    mask.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return mask


@pytest.mark.row("R2")
def test_offsets_equal_aligned(op, argument, count_cases):
    """Starting at any element of a storage, 1 to 15 past its aligned begin."""
    arguments = op.make(op.full)
    with torch.no_grad():
        expected = op(fresh(arguments))
        for offset in range(1, 16):
            changed = fresh(arguments)
            changed[argument] = misaligned(changed[argument], offset)
            for position, tensor in enumerate(op(changed)):
                assert_same_bits(tensor, expected[position], f"offset {offset}, output {position}")
    count_cases(15)


@pytest.mark.row("R1")
@on_every_backend
def test_layouts_on_every_backend(function, backend, count_cases):
    """Views of every kind as the differentiable arguments: values and gradients by the accuracy rule."""
    call, cases = function.make(function.full), 0
    for name in function.given(call):
        for label, view in layouts(call.tensors[name]):
            check_accuracy(function, on_device(call.replace(**{name: view}), backend), f"{name} {label}")
            cases += 1
    count_cases(cases)


@pytest.mark.row("R1")
def test_layouts_of_differentiable_arguments(function, count_cases):
    """Output and gradient are those of the contiguous copy, to the last bit."""
    call = function.make(function.full)
    wanted, cases = function.given(call), 0
    for name in wanted:
        for label, view in layouts(call.tensors[name]):
            actual = outputs_and_gradients(function.function, call.replace(**{name: view}), wanted)
            copy_of = view.clone(memory_format=torch.contiguous_format)
            expected = outputs_and_gradients(function.function, call.replace(**{name: copy_of}), wanted)
            assert_same_results(actual, expected, label)
            cases += 1
    count_cases(cases)


@pytest.mark.row("R1")
def test_expanded_upstream_gradient(function):
    """``loss.sum().backward()`` sends a gradient of stride 0."""
    call = function.make(function.per_row)
    leaves = {name: call.tensors[name].clone().requires_grad_() for name in function.given(call)}
    (output, *_) = call.replace(**leaves)(function.function)
    ones = torch.ones_like(output)
    expected = torch.autograd.grad(output, [*leaves.values()], ones, retain_graph=True)
    actual = torch.autograd.grad(output.sum(), [*leaves.values()])
    for left, right in zip(actual, expected, strict=True):
        assert_same_bits(left, right)


@pytest.mark.row("R1")
def test_written_argument_must_not_overlap_itself(writing_op):
    op = writing_op
    arguments = op.make(op.full)
    for name in op.written:
        shape = arguments[name].shape
        for label, view in (
            ("expanded", torch.zeros(shape[1:]).expand(shape)),
            ("overlapping", torch.zeros(shape.numel()).as_strided(shape, [1] * len(shape))),
        )[: len(shape)]:  # a vector with a stride does not overlap
            kind, text = error_of(lambda view=view, name=name: op(fresh(arguments, **{name: view})))
            assert kind is RuntimeError, label
            assert text.startswith(f"pyops::{op.public_name(arguments)}: {name} must "), text


@pytest.mark.row("R3")
@on_every_backend
def test_empty_dimensions(function, variant, backend, count_cases):
    """Each size 0, and all: the right shape, the identity of the reduction, a gradient of zeros."""
    names = list(function.sizes)
    empties = [{name: 0} for name in names] + [dict.fromkeys(names, 0)]
    for sizes in empties:
        call = on_device(function.make(variant, **{**function.sizes, **sizes}), backend)
        wanted = function.given(call)
        ours = outputs_and_gradients(function.function, call, wanted)
        expected = outputs_and_gradients(function.definition, call.to(torch.float64), wanted)
        for name, tensor in ours.items():
            assert tensor.shape == expected[name].shape, f"{sizes} {name}"
            if tensor.numel() == 0:
                continue
            if name.startswith("gradient") and not expected[name].any():
                assert not tensor.any(), f"{sizes} {name}"
            else:
                assert_accurate(tensor, tensor, expected[name], f"{sizes} {name}", torch.float32)
    count_cases(len(empties))


# ---- errors (R9, R10) ------------------------------------------------------------------------------------------


def as_fake(arguments: dict[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    return {n: mode.from_tensor(a) if isinstance(a, Tensor) else a for n, a in arguments.items()}


def as_meta(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: a.to("meta") if isinstance(a, Tensor) else a for n, a in arguments.items()}


def fake_error(op: Op, arguments: dict[str, Any]) -> tuple[type[Exception], str]:
    with FakeTensorMode() as mode:
        return error_of(lambda: op(as_fake(arguments, mode)))


def assert_rejected_alike(op: Op, arguments: dict[str, Any], beginning: str, *, meta: bool = True) -> str:
    """RuntimeError that begins so, in eager mode, with fake tensors and with meta tensors, in the same words."""
    kind, text = error_of(lambda: op(arguments))
    assert kind is RuntimeError, f"{kind.__name__}: {text}"
    assert text.startswith(f"pyops::{op.public_name(arguments)}: {beginning}"), text
    assert fake_error(op, arguments) == (kind, text), "fake tensors"
    if meta:
        assert error_of(lambda: op(as_meta(arguments))) == (kind, text), "meta tensors"
    return text


@pytest.mark.row("R9")
def test_every_dtype_is_taken_or_rejected(op, argument, count_cases):
    """Each tensor argument in every dtype while the others stay: the declared ones run, the rest are rejected."""
    arguments = op.make(op.full)
    for dtype in ALL_DTYPES:
        changed = fresh(arguments)
        changed[argument] = changed[argument].to(dtype)
        if dtype in op.accepts[argument]:
            with torch.no_grad():
                op(changed)
        else:
            text = assert_rejected_alike(op, changed, "")
            assert " must be " in text, text
    count_cases(len(ALL_DTYPES))


@pytest.mark.row("R10")
def test_mixed_devices_are_rejected(op, argument):
    """One argument on another device than the others (meta stands for it): named in the error, in the same words
    with fake tensors."""
    if op.tensors == [argument]:
        return  # no others
    arguments = fresh(op.make(op.full))
    arguments[argument] = arguments[argument].to("meta")
    text = assert_rejected_alike(op, arguments, "", meta=False)
    assert "meta" in text, text
    assert "cpu" in text, text


def other_layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of prototype layouts
        yield "coo", tensor.to_sparse()
        if tensor.dim() == 2:
            yield "csr", tensor.to_sparse_csr()
        if tensor.dim() >= 1:
            yield "nested", torch.nested.nested_tensor([tensor, tensor])
        if tensor.dtype == torch.float32:
            yield "quantized", torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
        if tensor.dtype == torch.float32 and tensor.dim() >= 1:
            yield "mkldnn", tensor.to_mkldnn()


@pytest.mark.row("R10")
def test_other_layouts_are_rejected(op, argument, count_cases):
    """Sparse, nested, quantized and mkldnn tensors: an error, never a result."""
    arguments = op.make(op.full)
    cases = 0
    for label, tensor in other_layouts(arguments[argument]):
        with torch.no_grad(), pytest.raises(RuntimeError) as caught:
            op(fresh(arguments) | {argument: tensor})
        assert f"pyops::{op.name}" in str(caught.value) or " must " in str(caught.value), label
        cases += 1
    count_cases(cases)


@pytest.mark.row("R9")
def test_bad_calls_of_operators(op, count_cases):
    """The table of bad calls: type and text, the same for fake and meta tensors unless values decide."""
    for rejection in op.rejections:
        arguments = rejection.change(fresh(op.make(op.full)))
        expected = f"pyops::{op.public_name(arguments)}: {rejection.text}"
        assert error_of(lambda arguments=arguments: op(arguments)) == (rejection.error, expected), rejection.label
        if not rejection.by_value:
            assert fake_error(op, arguments) == (rejection.error, expected), f"{rejection.label}, fake"
            meta = as_meta(arguments)
            assert error_of(lambda meta=meta: op(meta)) == (rejection.error, expected), f"{rejection.label}, meta"
    count_cases(len(op.rejections))


@pytest.mark.row("R9")
def test_bad_calls_of_operators_in_the_reference(op, count_cases):
    """The torch code says the same words."""
    from pyops import _dispatch

    for rejection in op.rejections:
        arguments = rejection.change(fresh(op.make(op.full)))
        expected = f"pyops::{op.public_name(arguments)}: {rejection.text}"
        run = functools.partial(_dispatch._ops[op.name].reference, *arguments.values())
        assert error_of(run) == (rejection.error, expected), rejection.label
    count_cases(len(op.rejections))


@pytest.mark.row("R9")
def test_bad_calls_of_functions(function, count_cases):
    """The table of bad calls of the public function: type and text."""
    for rejection in function.rejections:
        good = function.make(function.full)
        call = good.replace(**rejection.change({**good.tensors, **good.options}))
        kind, text = error_of(lambda call=call: call(function.function))
        assert kind is rejection.error, f"{rejection.label}: {kind.__name__}: {text}"
        assert text.startswith(function.error(rejection.text)), f"{rejection.label}: {text}"
    count_cases(len(function.rejections))


@pytest.mark.row("R9")
@pytest.mark.parametrize("mode", ["grad", "no grad", "torch.func"])
def test_functions_reject_like_their_operators(function, mode, count_cases):
    """Wrong tensors get the operator's words on every path through the public function."""
    call = function.make(function.full)
    cases = 0
    for name, tensor in call.given().items():
        for dtype in (torch.bool, torch.complex64, torch.int16):
            bad = call.replace(**{name: tensor.to(dtype)})
            kind, text = error_of(lambda bad=bad: run_in_mode(function, bad, mode))
            assert kind is RuntimeError, f"{name} {dtype}: {kind.__name__} {text}"
            assert text.startswith(function.error(f"{name} must be ")), f"{name} {dtype}: {text}"
            cases += 1
    count_cases(cases)


def run_in_mode(function: Function, call: Call, mode: str) -> object:
    if mode == "no grad":
        with torch.no_grad():
            return call(function.function)
    name = function.differentiable[0]
    tensor = call.tensors[name]
    if mode == "grad":
        return call.replace(**{name: tensor.requires_grad_() if tensor.is_floating_point() else tensor})(
            function.function
        )
    return torch.func.vmap(lambda t: call.replace(**{name: t})(function.function)[0])(tensor.unsqueeze(0))


# ---- gradients (R17 - R22) -----------------------------------------------------------------------------------


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [subset for size in range(len(names) + 1) for subset in itertools.combinations(names, size)]


@pytest.mark.row("R17")
def test_subsets_of_requires_grad(function, variant, count_cases):
    """Only the wanted gradients are computed, they do not depend on which others are wanted, and neither does the
    output."""
    call = function.make(variant)
    everything = outputs_and_gradients(function.function, call, function.given(call))
    for subset in subsets(function.given(call)):
        leaves = {name: call.tensors[name].detach().requires_grad_() for name in subset}
        outputs = call.replace(**leaves)(function.function)
        for position, output in enumerate(outputs):
            assert_same_bits(output.detach(), everything[f"output {position}"], f"{subset}")
        assert outputs[0].requires_grad == bool(subset)
        with recorded_ops() as ran:
            if subset:
                outputs[0].backward(upstream_gradient(outputs[0]))
        if function.backward_operators is None:
            assert bool(ran) == bool(subset), dict(ran)
        else:
            assert set(ran) == function.backward_operators(call, subset), subset
        for name, leaf in leaves.items():
            assert_same_bits(leaf.grad, everything[f"gradient of {name}"], f"{name} of {subset}")
    count_cases(len(subsets(function.given(call))))


@pytest.mark.row("R17")
@pytest.mark.parametrize("way", ["function", "operator under autograd", "torch.func"])
def test_arguments_without_a_derivative_must_not_ask_for_one(function, way):
    """Never a silently missing gradient."""
    call = function.make(function.full)
    for name, tensor in call.given().items():
        if name in function.differentiable or not tensor.is_floating_point():
            continue
        wants = tensor.clone().requires_grad_()
        if way == "torch.func":
            run = functools.partial(
                torch.func.grad(lambda t, name=name: call.replace(**{name: t})(function.function)[0]), tensor
            )
        elif way == "function":
            run = functools.partial(call.replace(**{name: wants}), function.function)
        else:
            run = functools.partial(raw_call_of, function, call.replace(**{name: wants}))
        kind, text = error_of(run)
        assert kind is RuntimeError, f"{name}: {kind.__name__}: {text}"
        assert text.startswith(function.error(f"{name} must not require grad")), text
        if way == "function":
            with torch.no_grad():
                call.replace(**{name: wants})(function.function)


def raw_call_of(function: Function, call: Call) -> tuple[Tensor, ...]:
    """Outputs of the differentiable operator that a public function calls, reached through the dispatcher as a compiled
    graph reaches it; none where no operator does the whole."""
    with recorded_calls() as calls, torch.no_grad():
        call(function.function)
    differentiable = {op.name for op in ops() if op.differentiable}
    found = [call for call in calls if call[0]._schema.name.removeprefix("pyops::") in differentiable]
    if not found:
        return ()
    operator, args, kwargs = found[-1]
    outputs = operator(*args, **kwargs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[tuple]]:
    """The calls of pyops operators within the block: (operator, args, kwargs)."""
    calls: list[tuple] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "pyops":
                calls.append((function, args, kwargs or {}))
            return function(*args, **(kwargs or {}))

    with Recorder():
        yield calls


@pytest.mark.row("R18")
@pytest.mark.parametrize("way", ["function", "operator"])
def test_saved_tensors_modified_before_backward(function, argument, way):
    """The version counter notices, or the gradient is that of the values at the time of the call."""
    call = function.make(function.full)
    (name,) = function.differentiable[:1]
    expected = outputs_and_gradients(function.function, call, (name,))[f"gradient of {name}"]
    call = call.map(torch.clone)
    leaf = call.tensors[name].requires_grad_()
    call = call.replace(**{name: leaf.clone()})
    output = call(function.function)[0] if way == "function" else raw_call_of(function, call)[0]
    with torch.no_grad():
        changed = call.tensors[argument]
        changed.copy_(changed.flip(0) + 1)
    upstream = upstream_gradient(output)
    try:
        output.backward(upstream)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017  (either outcome is right)
    else:
        assert_same_bits(leaf.grad, expected, argument)


@pytest.mark.row("R19")
def test_arguments_that_share_memory(function, count_cases):
    """The gradient of the shared memory is that of the definition."""
    cases = 0
    for label, leaf, build in function.aliases():
        gradients = {}
        for kind, run, dtype in (
            ("ours", function.function, torch.float32),
            ("plain", function.plain, torch.float32),
            ("reference", function.definition, torch.float64),
        ):
            own = leaf.to(dtype, copy=True).requires_grad_()
            build(own)(run)[0].sum().backward()
            gradients[kind] = own.grad
        assert_accurate(gradients["ours"], gradients["plain"], gradients["reference"], label)
        cases += 1
    count_cases(cases)


@pytest.mark.row("R19")
def test_one_tensor_used_twice(function):
    call = function.make(function.variants[0])
    name = function.differentiable[0]
    leaf = call.tensors[name].clone().requires_grad_()
    call = call.replace(**{name: leaf})
    total = call(function.function)[0] + call(function.function)[0]
    total.backward(upstream_gradient(total))
    once = outputs_and_gradients(function.function, call.replace(**{name: leaf.detach()}), (name,))
    assert_accurate(leaf.grad, leaf.grad, 2 * once[f"gradient of {name}"].double())


def loss_of(function: Function, call: Call) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A function of the differentiable tensors alone, and their values; of the first output."""
    names = function.given(call)
    values = tuple(call.tensors[name].detach() for name in names)

    def run(*tensors: Tensor) -> Tensor:
        return call.replace(**dict(zip(names, tensors, strict=True)))(function.function)[0]

    return run, values


def defined(function: Function, call: Call) -> list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """The same of the definition, in the widest dtype of the function and in float64."""
    define = dataclasses.replace(function, function=function.definition)
    return [loss_of(define, call.to(dtype)) for dtype in (function.widest, torch.float64)]


def small(function: Function, variant: str) -> Call:
    return function.make(variant, function.widest, **{name: min(size, 4) for name, size in function.sizes.items()})


@pytest.mark.row("R20")
@on_every_backend
def test_gradcheck(smooth_function, variant, backend):
    function = smooth_function
    run, values = loss_of(function, on_device(small(function, variant), backend))
    leaves = tuple(value.clone().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=is_slow(backend))


@pytest.mark.row("R20")
def test_gradcheck_in_forward_mode_and_batched(smooth_function, variant):
    function = smooth_function
    run, values = loss_of(function, small(function, variant))
    leaves = tuple(value.clone().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(
        run, leaves, check_forward_ad=True, check_batched_forward_grad=True, check_batched_grad=True
    )


@pytest.mark.row("R20")
def test_batched_gradients(rounding_function, variant):
    """Of gradients through a rounding finite differences know nothing (their values: test_accuracy). Several upstream
    gradients at once give what they give one by one."""
    run, values = loss_of(rounding_function, small(rounding_function, variant))
    leaves = tuple(value.clone().requires_grad_() for value in values)
    output = run(*leaves)
    upstream = torch.stack([factor * upstream_gradient(output) for factor in (1, -2, 0)])
    actual = torch.autograd.grad(output, leaves, upstream, is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(output, leaves, row, retain_graph=True) for row in upstream]
    for position, batch in enumerate(actual):
        expected = torch.stack([row[position] for row in rows])
        assert_accurate(batch, expected, expected.double(), f"gradient {position}")


@pytest.mark.row("R20")
def test_gradgradcheck(twice_differentiable_function, variant):
    run, values = loss_of(twice_differentiable_function, small(twice_differentiable_function, variant))
    leaves = tuple(value.clone().requires_grad_() for value in values)
    assert torch.autograd.gradgradcheck(run, leaves, check_batched_grad=True)


@pytest.mark.row("R20")
def test_second_derivative_raises(once_differentiable_function, variant):
    """With respect to any argument, as soon as it is asked for."""
    function = once_differentiable_function
    run, values = loss_of(function, small(function, variant))
    for position in range(len(values)):
        leaves = [value.clone().requires_grad_(number == position) for number, value in enumerate(values)]
        output = run(*leaves)
        with pytest.raises(NotImplementedError, match="pyops::"):
            torch.autograd.grad(output.sum(), leaves[position], create_graph=True)


@pytest.mark.row("R20")
def test_operators_and_functions_have_the_same_gradient(function, variant):
    """Through the dispatcher, where compiled and exported graphs take their gradients."""
    call = function.make(variant)
    expected = outputs_and_gradients(function.function, call, function.given(call))
    leaves = {name: call.tensors[name].clone().requires_grad_() for name in function.given(call)}
    outputs = raw_call_of(function, call.replace(**leaves))
    if not outputs:
        return
    output = outputs[0].reshape(expected["output 0"].shape)
    assert_same_bits(output.detach(), expected["output 0"])
    output.backward(upstream_gradient(output))
    for name, leaf in leaves.items():
        if leaf.grad is not None:  # None where another operator takes the argument
            assert_same_bits(leaf.grad, expected[f"gradient of {name}"], name)
    assert call.tensors[function.differentiable[0]].dim() != 2 or leaves[function.differentiable[0]].grad is not None


@pytest.mark.row("R20")
def test_gradcheck_of_operators(smooth_op, variant):
    """Also through the dispatcher, where compiled and exported graphs take their gradients."""
    op = smooth_op
    arguments = op.make(variant, torch.float64)
    leaves = tuple(arguments[name].clone().requires_grad_() for name in op.differentiable)

    def run(*tensors: Tensor) -> Tensor:
        return op(arguments | dict(zip(op.differentiable, tensors, strict=True)))[0]

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.row("R20")
def test_operators_without_a_derivative_say_so(functional_op, count_cases):
    """A gradient through an argument that has none raises; it does not come back as None or zero."""
    op = functional_op
    arguments = op.make(op.full, op.widest)
    names = [name for name in op.tensors if arguments[name].is_floating_point() and name not in op.differentiable]
    for name in names:
        kind, text = error_of(lambda name=name: differentiate_through(op, fresh(arguments), name))
        assert issubclass(kind, RuntimeError), f"{name}: {kind.__name__}: {text}"
        assert "pyops::" in text, f"{name}: {text}"
    count_cases(len(names))


def differentiate_through(op: Op, arguments: dict[str, Any], name: str) -> Tensor | None:
    """The gradient of what an operator gives, with respect to one argument."""
    leaf = arguments[name].requires_grad_()
    outputs = op(arguments | {name: leaf.clone()})
    next(output for output in outputs if output.is_floating_point()).sum().backward()
    return leaf.grad


@pytest.mark.row("R18", "R20")
def test_autograd_knows_of_writes(writing_op):
    """Writing raises the version counter, so that whoever saved the tensor notices; and a gradient through what was
    written raises, as the operator has none."""
    op = writing_op
    for name in op.written:
        arguments = fresh(op.make(op.full, op.widest))
        version = arguments[name]._version
        with torch.no_grad():
            op(arguments)
        assert arguments[name]._version > version, "the write is invisible to autograd"
        kind, text = error_of(lambda name=name: differentiate_through(op, fresh(op.make(op.full, op.widest)), name))
        assert issubclass(kind, RuntimeError), f"{name}: {kind.__name__}: {text}"


@pytest.mark.row("R20")
def test_second_derivative_of_operators_raises(differentiable_op):
    """Differentiating an operator twice raises; a public function may have exact second derivatives."""
    op = differentiable_op
    arguments = op.make(op.variants[0], op.widest)
    leaf = arguments[op.differentiable[0]].clone().requires_grad_()
    output = op(arguments | {op.differentiable[0]: leaf})[0]

    def differentiate_twice() -> None:
        (gradient,) = torch.autograd.grad(output.sum(), leaf, create_graph=True)
        gradient.square().sum().backward()

    kind, text = error_of(differentiate_twice)
    assert kind is NotImplementedError, f"{kind.__name__}: {text}"
    assert "pyops::" in text, text


@pytest.mark.row("R21")
def test_jvp(function, variant):
    call = small(function, variant)
    ours, plain, exact = (
        torch.func.jvp(run, values, tuple(upstream_gradient(value) for value in values))
        for run, values in (loss_of(function, call), *defined(function, call))
    )
    for name, left, middle, right in zip(("value", "tangent"), ours, plain, exact, strict=True):
        assert_accurate(left, middle, right, name)


@pytest.mark.row("R21")
def test_dual_tensors_keep_their_tangents(function, variant):
    call = small(function, variant)
    tangents = []
    for loss, values in (loss_of(function, call), *defined(function, call)):
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(v, upstream_gradient(v)) for v in values]
            tangents.append(torch.autograd.forward_ad.unpack_dual(loss(*duals)).tangent)
    assert tangents[0] is not None
    assert_accurate(*tangents)


@pytest.mark.row("R21")
@pytest.mark.parametrize("way", ["forward over reverse", "reverse over reverse", "reverse over forward"])
def test_hessian(function, variant, way):
    inner, outer = {
        "forward over reverse": (torch.func.jacrev, torch.func.jacfwd),
        "reverse over reverse": (torch.func.jacrev, torch.func.jacrev),
        "reverse over forward": (torch.func.jacfwd, torch.func.jacrev),
    }[way]
    call = small(function, variant)
    assert_accurate(
        *(
            outer(inner(lambda *all_values, run=run: run(*all_values).sum()))(*values)
            for run, values in (loss_of(function, call), *defined(function, call))
        )
    )


@pytest.mark.row("R21")
def test_forward_mode_through_operators_is_right_or_raises(differentiable_op):
    """A tangent that silently vanishes would make every Hessian of a raw operator zero."""
    op = differentiable_op
    arguments = op.make(op.variants[0], op.widest)
    name = op.differentiable[0]
    value = arguments[name]
    direction = upstream_gradient(value)

    def run(tensor: Tensor) -> Tensor:
        return op(arguments | {name: tensor})[0].sum()

    expected = (torch.autograd.functional.vjp(run, value)[1] * direction).sum()
    assert expected.abs() > 1e-3, "the test needs a derivative that is not zero"
    with contextlib.suppress(NotImplementedError, RuntimeError):
        _, tangent = torch.func.jvp(run, (value,), (direction,))
        assert_accurate(tangent, expected, expected.double(), "torch.func.jvp")
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(value, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(run(dual)).tangent
        assert tangent is not None, "the dual tensor lost its tangent"
        assert_accurate(tangent, expected, expected.double(), "dual tensor")


def stacked(function: Function, variant: str, count: int) -> list[Call]:
    sizes = {name: min(size, 4) for name, size in function.sizes.items()}
    return [function.make(variant, function.widest, seed=seed, **sizes) for seed in range(count)]


def expected_of(function: Function, result: Callable[[Callable, torch.dtype], Tensor]) -> tuple[Tensor, Tensor]:
    """(plain, exact) values of what ``result`` computes with a function in a dtype: our own, called without a
    transform, where it knows float64; else those of the definition."""
    if function.widest == torch.float64:
        own = result(function.function, torch.float64)
        return own, own.double()
    return result(function.definition, torch.float32), result(function.definition, torch.float64)


@pytest.mark.row("R22")
def test_vmap_over_each_argument_and_all(function, variant, count_cases):
    """vmap over any choice of arguments equals a loop."""
    calls = stacked(function, variant, 3)
    given = list(calls[0].given())
    for mapped in [(name,) for name in given] + [tuple(given)]:
        batch = [torch.stack([call.tensors[name] for call in calls]) for name in mapped]

        def run(*tensors: Tensor, mapped: tuple[str, ...] = mapped) -> tuple[Tensor, ...]:
            return calls[0].replace(**dict(zip(mapped, tensors, strict=True)))(function.function)

        actual = torch.func.vmap(run)(*batch)
        rows = [calls[0].replace(**{name: call.tensors[name] for name in mapped}) for call in calls]
        for position, result in enumerate(actual):
            expected = expected_of(
                function,
                lambda one, dtype, rows=rows, position=position: torch.stack(
                    [row.to(dtype)(one)[position] for row in rows]
                ),
            )
            assert_accurate(result, *expected, f"over {mapped}")
    count_cases(len(given) + 1)


@pytest.mark.row("R22")
def test_vmap_of_gradients_nested_and_along_other_dims(function, variant):
    """Per-sample gradients; vmap within vmap; in_dims other than 0."""
    calls = stacked(function, variant, 4)
    name = function.differentiable[0]
    batch = torch.stack([call.tensors[name] for call in calls])

    def loss(value: Tensor, one: Callable = function.function) -> Tensor:
        return calls[0].to(value.dtype).replace(**{name: value})(one)[0].sum()

    def one_by_one(one: Callable, dtype: torch.dtype) -> Tensor:
        return torch.stack([torch.func.grad(loss)(value, one) for value in batch.to(dtype)])

    per_sample = torch.func.vmap(torch.func.grad(loss))
    expected = expected_of(function, one_by_one)
    assert_accurate(per_sample(batch), *expected)
    moved = torch.func.vmap(torch.func.grad(loss), in_dims=-1, out_dims=-1)(batch.movedim(0, -1)).movedim(-1, 0)
    assert_accurate(moved, *expected)
    nested = torch.func.vmap(per_sample)(batch.unflatten(0, (2, 2))).flatten(0, 1)
    assert_accurate(nested, *expected)


@pytest.mark.row("R22")
def test_gradient_transforms(function, variant):
    """torch.func.grad, vjp and jacrev equal autograd; functional_call trains a module with them."""
    call = small(function, variant)
    run, values = loss_of(function, call)
    output, pullback = torch.func.vjp(run, *values)
    for position, name in enumerate(function.given(call)):

        def gradient(one: Callable, dtype: torch.dtype, name: str = name) -> Tensor:
            leaf = call.tensors[name].to(dtype).clone().requires_grad_()
            return torch.autograd.grad(call.to(dtype).replace(**{name: leaf})(one)[0].sum(), leaf)[0]

        expected = expected_of(function, gradient)
        actual = torch.func.grad(lambda *v: run(*v).sum(), argnums=position)(*values)
        assert_accurate(actual, *expected, "grad")
        assert_accurate(pullback(torch.ones_like(output))[position], *expected, "vjp")
        jacobian = torch.func.jacrev(run, argnums=position)(*values)
        summed = jacobian.sum(tuple(range(output.dim()))) if output.dim() else jacobian
        assert_accurate(summed, *expected, "jacrev")


@pytest.mark.row("R22")
def test_vmap_of_operators(functional_op, argument):
    """The dispatcher's fallback loops over the samples."""
    op = functional_op
    samples = [op.make(op.full, op.widest, seed=seed) for seed in range(3)]
    batch = torch.stack([sample[argument] for sample in samples])

    def run(tensor: Tensor) -> tuple[Tensor, ...]:
        return op(samples[0] | {argument: tensor})

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is slow, says torch
        actual = torch.func.vmap(run)(batch)
        rows = [run(tensor) for tensor in batch]
    for position, result in enumerate(actual):
        assert_same_bits(result, torch.stack([row[position] for row in rows]), f"output {position}")


@pytest.mark.row("R22")
def test_torch_func_leaves_the_kernels_alone_otherwise(function):
    """Without a transform the kernel runs, with one the composite code: not the other way round."""
    call = function.make(function.variants[0])
    with recorded_ops() as plainly:
        call(function.function)
    assert sum(plainly.values()) == function.operators, dict(plainly)
    run, values = loss_of(function, call)
    with recorded_ops() as transformed:
        torch.func.grad(lambda *v: run(*v).sum())(*values)
    assert set(transformed) == set(function.operators_in_transforms), dict(transformed)


# ---- torch's own machinery (R23 - R27) -----------------------------------------------------------------------


def opcheck_samples(op: Op) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every variant, with and without a gradient; other dtypes; odd layouts; empty and single rows."""
    for variant in op.variants:
        yield variant, op.make(variant)
        for name in op.differentiable:
            arguments = op.make(variant)
            if arguments[name] is not None:
                yield f"{variant}, gradient of {name}", arguments | {name: arguments[name].requires_grad_()}
    for dtype in {op.widest, torch.bfloat16} & {*op.dtypes}:
        yield f"{dtype}", op.make(op.full, dtype)
    arguments = op.make(op.full)
    for name in op.tensors:
        for label, view in itertools.islice(layouts(arguments[name], written=name in op.written), 1):
            yield f"{name} {label}", fresh(arguments, **{name: view})
    for sizes in op.other_sizes:
        yield f"{sizes}", op.make(op.full, **sizes)


@pytest.mark.row("R23")
def test_opcheck(op, count_cases):
    """Schema, fake tensors, autograd registration, and compiling with static and dynamic shapes."""
    cases = 0
    for label, arguments in opcheck_samples(op):
        result = torch.library.opcheck(op.overload, (), arguments, raise_exception=False)
        assert set(result.values()) == {"SUCCESS"}, f"{label}: {result}"
        cases += 1
    assert cases >= 10
    count_cases(cases)


def training_step(function: Function, call: Call) -> Callable[..., tuple[Tensor, ...]]:
    """The outputs of a call as a function of all its tensors, between two operations of torch's own."""
    names = list(call.given())

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        name = function.differentiable[0]
        outputs = call.replace(**given | {name: given[name] * 2})(function.function)
        return (outputs[0] * 3, *outputs[1:])

    return step


def run_step(step: Callable, function: Function, call: Call) -> Results:
    leaves = {n: t.detach().clone() for n, t in call.given().items()}
    for name in function.given(call):
        leaves[name].requires_grad_()
    outputs = step(*leaves.values())
    outputs[0].backward(upstream_gradient(outputs[0]))
    results = {f"output {position}": output.detach() for position, output in enumerate(outputs)}
    return results | {f"gradient of {name}": leaves[name].grad for name in function.given(call)}


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.row("R24")
@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_fullgraph(function, variant):
    """One graph, no break, to the last bit what eager mode gives; forward and backward."""
    call = function.make(variant)
    step = training_step(function, call)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same_results(run_step(compiled, function, call), run_step(step, function, call))


@pytest.mark.row("R24")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_with_inductor(function, mode):
    """To the last bit what eager mode gives, where no sum of torch's own is compiled with it."""
    call = function.make(function.full)
    step = training_step(function, call)
    compiled = torch.compile(step, fullgraph=True, mode=mode)
    expected, wide = run_step(step, function, call), call.to(torch.float64)
    define = dataclasses.replace(function, function=function.definition)
    exact = run_step(training_step(define, wide), define, wide)
    for _ in range(2):  # a captured graph is replayed from the second call on
        actual = run_step(compiled, function, call)
        for name in (f"gradient of {name}" for name in function.summed_by_torch):
            assert_accurate(actual.pop(name), expected[name], exact[name], name)
        assert_same_results(actual, {name: expected[name] for name in actual})


@pytest.mark.row("R24")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_compile_once_for_many_sizes(function, dynamic):
    """With dynamic=True the first call compiles all there is to compile for four sizes (torch may take two attempts at
    it, while it finds out that the options are constants); left alone, torch compiles again once, for the second."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    sizes = [
        {name: size + more * (name not in function.sizes_in_options) for name, size in function.sizes.items()}
        for more in (0, 1, 4, 10)
    ]
    first = function.make(function.full, **sizes[0])
    compiled = torch.compile(training_step(function, first), fullgraph=True, dynamic=dynamic, backend=counter)
    counts = []
    for size in sizes:
        call = function.make(function.full, **size)
        eager = run_step(training_step(function, call), function, call)
        assert_same_results(run_step(compiled, function, call), eager, f"{size}")
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0] if dynamic else counts[-1] <= 2, counts


@pytest.mark.row("R24", "R21")
@pytest.mark.usefixtures("_fresh_compiler")
def test_transforms_inside_compile_are_right_or_raise(function):
    """A graph that holds a transform of the opaque operator would give zeros."""
    run, values = loss_of(function, small(function, function.variants[0]))
    tangents = tuple(upstream_gradient(value) for value in values)
    transforms = {
        "jvp": lambda *v: torch.func.jvp(run, v, tangents)[1],
        "grad": lambda *v: torch.func.grad(lambda *w: run(*w).sum())(*v),
        "vmap": lambda *v: torch.func.vmap(run)(*(torch.stack([t, 2 * t]) for t in v)),
        "hessian": lambda *v: torch.func.hessian(run)(*v),
    }
    for name, transform in transforms.items():
        expected = transform(*values)
        try:
            actual = torch.compile(transform, backend="aot_eager")(*values)
        except Exception as error:
            assert "not supported" in str(error) or "pyops::" in str(error), f"{name}: {error}"  # noqa: PT017
        else:
            assert_accurate(actual, expected, expected.detach().double(), name)


class Calling(torch.nn.Module):
    """A call as a module of its tensors, for torch.export."""

    def __init__(self, function: Function, call: Call) -> None:
        super().__init__()
        self.function, self.call, self.names = function.function, call, list(call.given())

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.call.replace(**dict(zip(self.names, tensors, strict=True)))(self.function)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[int, float]]:
    """Exports every function in two variants with a dynamic batch dimension, and runs all of them in one fresh
    process that imports only torch and pyops: {(function, variant): (operator nodes, largest difference)}."""
    folder = tmp_path_factory.mktemp("exported")
    for function, variant in itertools.product(functions(), ("first", "full")):
        name = function.full if variant == "full" else function.variants[0]
        call, other = function.make(name), function.make(name, rows=11)
        batch = torch.export.Dim("batch", min=2)
        given = list(call.given())
        shapes = tuple({function.batch[n]: batch} if n in function.batch else None for n in given)
        arguments = tuple(call.given().values())
        program = torch.export.export(Calling(function, call), arguments, dynamic_shapes=(shapes,))
        torch.export.save(program, folder / f"{function.name}.{variant}.pt2")
        torch.save((tuple(other.given().values()), other(function.function)), folder / f"{function.name}.{variant}.pt")
    script = """
        import json, pathlib, sys, torch, pyops
        found = {}
        for path in sorted(pathlib.Path(sys.argv[1]).glob("*.pt2")):
            program = torch.export.load(path)
            nodes = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
            arguments, expected = torch.load(path.with_suffix(".pt"))
            outputs = program.module()(*arguments)
            equal = all(torch.equal(left, right) for left, right in zip(outputs, expected, strict=True))
            found[path.stem] = sum(node.startswith("pyops.") for node in nodes), equal
        print(json.dumps(found))
    """
    found = json.loads(in_fresh_process(script, folder).splitlines()[-1])
    return {tuple(name.split(".")): tuple(value) for name, value in found.items()}


@pytest.mark.row("R25")
@pytest.mark.parametrize("which", ["first", "full"])
def test_export_save_load_in_a_fresh_process(function, which, exported):
    """The graph keeps its operator nodes and takes another batch size; the values are the same to the last bit."""
    assert exported[function.name, which] == (function.operators, True)


@pytest.mark.row("R26")
@pytest.mark.parametrize("autocast_to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_autocast(function, dtype, autocast_to):
    """The output has the declared dtype and obeys the accuracy rule, the gradient has the dtype of its argument; a
    nested disabled region behaves as if there were no autocast."""
    call = function.make(function.full, dtype)
    wanted = function.given(call)
    with torch.autocast("cpu", autocast_to):
        ours = outputs_and_gradients(function.function, call, wanted)
        with torch.autocast("cpu", enabled=False):
            nested = outputs_and_gradients(function.function, call, wanted)
    check_autocast(function, call, autocast_to, ours)
    outside = outputs_and_gradients(function.function, call, wanted)
    assert_same_results(nested, outside)


def check_autocast(function: Function, call: Call, autocast_to: torch.dtype, ours: Results) -> None:
    """The dtypes of results under autocast, and the accuracy rule for what was computed then; a gradient is as
    accurate as the tensor that autocast made of the argument."""
    computed, output = function.autocast(call, autocast_to)
    assert ours["output 0"].dtype == output
    for name in function.given(call):
        gradient = ours[f"gradient of {name}"]
        assert gradient.dtype == call.tensors[name].dtype, name
        narrow = max(gradient.dtype, computed.tensors[name].dtype, key=lambda dtype: torch.finfo(dtype).eps)
        ours = ours | {f"gradient of {name}": gradient.to(narrow)}
    assert_results_accurate(ours, *expected_results(function, computed, function.given(call)))


@pytest.mark.row("R26")
def test_autocast_of_operators(differentiable_op):
    """The same rule when the operator is called through the dispatcher."""
    op = differentiable_op
    arguments = op.make(op.full, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = op(arguments)[0]
        with torch.autocast("cpu", enabled=False):
            nested = op(arguments)[0]
    assert output.dtype == op.autocast
    assert nested.dtype == torch.bfloat16


@pytest.mark.row("R26")
@pytest.mark.parametrize("mixed", FLOATING, ids=str)
def test_mixed_dtypes_under_autocast_are_taken(function, mixed):
    """What raises elsewhere is converted, as torch converts operands."""
    call = function.make(function.full, torch.bfloat16)
    mixed_call = call.replace(**{name: call.tensors[name].to(mixed) for name in function.mixed})
    with torch.autocast("cpu", torch.bfloat16):
        ours = outputs_and_gradients(function.function, mixed_call, function.given(call))
    check_autocast(function, mixed_call, torch.bfloat16, ours)
    if mixed != torch.bfloat16:
        assert error_of(lambda: mixed_call(function.function))[0] is RuntimeError


@pytest.mark.row("R26")
def test_gradient_scaler(function):
    """A scaled step changes parameters as an unscaled one does; an overflow is found and the step skipped."""
    call = function.make(function.variants[0])
    name = function.differentiable[0]

    def step(scaler: torch.amp.GradScaler | None, factor: float = 1.0) -> Tensor:
        parameter = torch.nn.Parameter(call.tensors[name].clone())
        optimizer = torch.optim.SGD([parameter], lr=0.5)
        with torch.autocast("cpu", torch.float16):
            loss = call.replace(**{name: parameter.half()})(function.function)[0].sum() * factor
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return parameter.detach()

    unscaled = step(None)
    plain, reference = step(None), unscaled.double()
    assert_accurate(
        step(torch.amp.GradScaler("cpu", init_scale=16.0)).half(), plain.half(), reference, "", torch.float16
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    assert torch.equal(step(scaler, float("inf")), call.tensors[name])
    assert scaler.get_scale() < 16


@pytest.mark.row("R27")
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_activation_checkpointing(function, variant, reentrant):
    """Recomputing gives the same bits."""
    call = function.make(variant)
    name = function.differentiable[0]

    def run(checkpointed: bool) -> Tensor:
        leaf = call.tensors[name].clone().requires_grad_()

        def part(tensor: Tensor) -> Tensor:
            return call.replace(**{name: tensor * 2})(function.function)[0]

        output = torch.utils.checkpoint.checkpoint(part, leaf, use_reentrant=reentrant) if checkpointed else part(leaf)
        output.backward(upstream_gradient(output))
        return leaf.grad

    assert_same_bits(run(True), run(False))


@pytest.mark.row("R27")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradient(function, variant, mode):
    """The same bits, and nothing that requires a gradient; inference tensors can be inputs."""
    call = function.make(variant)
    name = function.differentiable[0]
    expected = call(function.function)
    with mode():
        actual = call.replace(**{name: call.tensors[name].clone().requires_grad_()})(function.function)
        within = call.map(torch.clone)
    for left, right in zip(actual, expected, strict=True):
        assert not left.requires_grad
        assert_same_bits(left, right)
    for left, right in zip(within(function.function), expected, strict=True):
        assert_same_bits(left, right, "tensors made in the mode, used outside")


@pytest.mark.row("R27")
def test_detach_cuts(function, variant):
    call = function.make(variant)
    name = function.differentiable[0]
    leaf = call.tensors[name].clone().requires_grad_()
    assert not call.replace(**{name: leaf.detach()})(function.function)[0].requires_grad


@pytest.mark.row("R27")
def test_backward_twice(function, variant):
    """With retain_graph the second gradient has the same bits; without it the second call raises."""
    call = function.make(variant)
    name = function.differentiable[0]
    leaf = call.tensors[name].clone().requires_grad_()
    output = call.replace(**{name: leaf})(function.function)[0]
    upstream = upstream_gradient(output)
    first = torch.autograd.grad(output, leaf, upstream, retain_graph=True)[0]
    assert_same_bits(torch.autograd.grad(output, leaf, upstream)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        output.backward(upstream)


@pytest.mark.row("R27")
def test_hooks(function):
    """Tensor, node, accumulation and saved-tensor hooks see the right tensors and may replace them."""
    call = function.make(function.full)
    name = function.differentiable[0]
    expected = outputs_and_gradients(function.function, call, (name,))[f"gradient of {name}"]
    leaf = call.tensors[name].clone().requires_grad_()
    seen: dict[str, Tensor] = {}
    leaf.register_hook(lambda gradient: seen.update(tensor=gradient))
    leaf.register_post_accumulate_grad_hook(lambda tensor: seen.update(accumulated=tensor.grad))
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda position: packed[position]):
        output = call.replace(**{name: leaf * 1})(function.function)[0]
    output.grad_fn.register_prehook(lambda gradients: (gradients[0] * 2, *gradients[1:]))
    output.backward(upstream_gradient(output) / 2)
    assert packed, "nothing went through the hooks"
    for gradient in (seen["tensor"], seen["accumulated"], leaf.grad):
        assert_same_bits(gradient, expected)


@pytest.mark.row("R46")
def test_tensor_subclasses(function):
    """Parameters and subclasses are tensors; wrappers that take the place of a tensor are unwrapped by torch."""
    from torch.testing._internal.two_tensor import TwoTensor

    class Named(Tensor):
        pass

    call = function.make(function.full)
    name = function.differentiable[0]
    expected = outputs_and_gradients(function.function, call, (name,))
    value = call.tensors[name]
    for label, tensor in (
        ("parameter", torch.nn.Parameter(value.clone())),
        ("subclass", value.clone().as_subclass(Named)),
    ):
        output = call.replace(**{name: tensor})(function.function)[0]
        assert_same_bits(output.detach().as_subclass(Tensor), expected["output 0"], label)
    both = TwoTensor(value.clone(), 2 * value)
    output = call.replace(**{name: both})(function.function)[0]
    assert_same_bits(output.a, expected["output 0"], "wrapper")
    doubled = outputs_and_gradients(function.function, call.replace(**{name: 2 * value}), (name,))
    assert_same_bits(output.b, doubled["output 0"], "wrapper")


@pytest.mark.row("R46")
def test_functionalization_and_fake_tensors(function):
    """A functional tensor gives the same bits; a fake one the shape and dtype without computing."""
    call = function.make(function.full)
    name = function.differentiable[0]
    expected = call(function.function)[0]
    run, values = loss_of(function, call)
    functional = torch.func.functionalize(run)(*values)
    if function.smooth:
        assert_accurate(functional, expected, expected.double(), "functional")
    else:  # the rounded numbers are summed in another order
        plain, exact = expected_results(function, call, ())
        assert_accurate(functional, plain["output 0"], exact["output 0"], "functional")
    with FakeTensorMode() as mode:
        fake = call.map(mode.from_tensor)
        for wants in (False, True):
            fake = fake.replace(**{name: fake.tensors[name].requires_grad_(wants)})
            output = fake(function.function)[0]
            assert (output.shape, output.dtype) == (expected.shape, expected.dtype)
        output.sum().backward()
        assert fake.tensors[name].grad.shape == call.tensors[name].shape


# ---- modules and processes (R28 - R33) -----------------------------------------------------------------------


def module_results(module: torch.nn.Module, arguments: tuple[Tensor | None, ...]) -> Results:
    leaf = arguments[0].clone().requires_grad_()
    output = module(leaf, *arguments[1:])
    output.backward(upstream_gradient(output))
    return {"output 0": output.detach(), "gradient": leaf.grad}


@pytest.mark.row("R30")
def test_modules_do_what_their_functions_do(function, variant):
    call = function.make(variant)
    module, arguments = function.module(call)
    actual = module_results(module, arguments)
    without_dtype = Call(call.tensors, {k: v for k, v in call.options.items() if k != "out_dtype"})
    expected = outputs_and_gradients(function.function, without_dtype, function.differentiable[:1])
    assert_same_bits(actual["output 0"], expected["output 0"])
    assert_same_bits(actual["gradient"], expected[f"gradient of {function.differentiable[0]}"])


@pytest.mark.row("R30")
def test_modules_copy_pickle_and_move(function, variant):
    """deepcopy, pickle, a saved state, and .to(dtype) give the same module."""
    module, arguments = function.module(function.make(variant))
    expected = module_results(module, arguments)
    assert_same_results(module_results(copy.deepcopy(module), arguments), expected, "deepcopy")
    assert_same_results(module_results(pickle.loads(pickle.dumps(module)), arguments), expected, "pickle")
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other, _ = function.module(function.make(variant, seed=1))
    other.load_state_dict(torch.load(buffer))
    assert_same_results(module_results(other, arguments), expected, "state_dict")
    other_dtype = torch.float64 if function.widest == torch.float64 else torch.bfloat16
    moved_module = copy.deepcopy(module).to(other_dtype)
    moved_arguments = tuple(t.to(other_dtype) if t is not None and t.is_floating_point() else t for t in arguments)
    assert module_results(moved_module, moved_arguments)["output 0"].dtype == other_dtype


def run_modules(payload: bytes) -> bytes:
    """Runs pickled modules in another process."""
    return pickle.dumps([module_results(*pickle.loads(one)) for one in pickle.loads(payload)])


@pytest.mark.row("R30")
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_modules_cross_into_other_processes(start, count_cases):
    pairs = [function.module(function.make(variant)) for function in functions() for variant in function.variants]
    payload = pickle.dumps([pickle.dumps(pair) for pair in pairs])
    with multiprocessing.get_context(start).Pool(1) as pool:
        answers = pickle.loads(pool.apply_async(run_modules, (payload,)).get(timeout=120))
    for (module, arguments), answer in zip(pairs, answers, strict=True):
        assert_same_results(answer, module_results(module, arguments), f"{module}")
    count_cases(len(pairs))


@pytest.mark.row("R29")
def test_fork_after_a_parallel_region():
    """A forked child with one thread, and data-loader workers, get what the parent gets."""
    script = """
        import os, sys, torch, contract
        functions = contract.functions()
        def digest(function):
            call = function.make(function.full, **function.large[0])
            results = contract.outputs_and_gradients(function.function, call, function.given(call))
            return {name: tensor.numpy().tobytes() for name, tensor in results.items()}
        torch.set_num_threads(2)
        expected = [digest(function) for function in functions]  # starts the pool of threads
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os._exit(0 if [digest(function) for function in functions] == expected else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child computed something else"
        class Losses(torch.utils.data.Dataset):
            def __len__(self): return len(functions)
            def __getitem__(self, index): return digest(functions[index]) == expected[index]
        workers = torch.utils.data.DataLoader(Losses(), num_workers=2, batch_size=None)
        assert all(workers), "a worker computed something else"
        print("equal")
    """
    assert in_fresh_process(script, timeout=60).strip().endswith("equal")


def mixed_calls() -> list[tuple[Function, Call]]:
    """Small calls of everything, in several dtypes."""
    return [
        (function, function.make(variant, dtype))
        for function in functions()
        for variant in (function.variants[0], function.full)
        for dtype in (torch.float32, torch.bfloat16)
    ]


@pytest.mark.row("R28")
@pytest.mark.routed
def test_many_python_threads(count_cases):
    """Eight threads on shared and own tensors, one of them switching backends: bit-equal to serial, and the switched
    backend stays in its thread. PYOPS_THREAD_CALLS calls per thread (1000 by night)."""
    import pyops

    calls = int(os.environ.get("PYOPS_THREAD_CALLS", "200"))
    shared = mixed_calls()
    expected = [outputs_and_gradients(f.function, call, f.given(call)) for f, call in shared]
    problems: list[str] = []

    def work(number: int) -> None:
        own = [(function, call.map(torch.clone)) for function, call in shared]
        for turn in range(calls):
            position = (turn * 7 + number) % len(shared)
            function, call = (shared if turn % 2 else own)[position]
            results = outputs_and_gradients(function.function, call, function.given(call))
            try:
                assert_same_results(results, expected[position], f"thread {number}, call {turn}")
            except AssertionError as error:
                problems.append(str(error))
                return

    def switch() -> None:
        for turn in range(calls):
            function, call = shared[turn % len(shared)]
            with pyops.use_backend("reference"):
                here = pyops.explain(function.name, **call.tensors, **call.options).backend
                outputs_and_gradients(function.function, call, function.given(call))
            after = pyops.explain(function.name, **call.tensors, **call.options).backend
            if (here, after) != ("reference", "cpu"):
                problems.append(f"the switching thread ran on {here}, then {after}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(7)] + [threading.Thread(target=switch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    count_cases(8 * calls)


@pytest.fixture(scope="module")
def after_out_of_memory() -> dict[str, list[str]]:
    """Per function, in one process whose address space is then capped: what two calls that need more memory say, and
    the result of a small call afterwards ("equal")."""
    script = """
        import json, resource, torch, contract
        def big(function):
            return function.make(function.variants[0], **function.memory)
        prepared = []
        for function in contract.functions():
            small = function.make(function.full)
            expected = contract.outputs_and_gradients(function.function, small, function.differentiable[:1])
            prepared.append((function, big(function), small, expected))
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
        said = {}
        for function, large, small, expected in prepared:
            said[function.name] = []
            for _ in range(2):
                try:
                    contract.outputs_and_gradients(function.function, large, function.differentiable[:1])
                except Exception as error:
                    said[function.name].append(f"{type(error).__name__}: {error}")
            actual = contract.outputs_and_gradients(function.function, small, function.differentiable[:1])
            contract.assert_same_results(actual, expected)
            said[function.name].append("equal")
        print(json.dumps(said))
    """
    return json.loads(in_fresh_process(script).splitlines()[-1])


@pytest.mark.row("R32")
def test_out_of_memory_is_an_error_and_the_next_call_works(function, after_out_of_memory):
    """The error says that memory is short, as torch's does, and nothing of where in our sources that was noticed."""
    first, second, small = after_out_of_memory[function.name]
    assert small == "equal"
    assert first == second
    assert first.startswith(("RuntimeError: ", "MemoryError: ")), first
    assert "memory" in first, first
    assert ".cpp" not in first, first


LEAK_COUNTS = {"forward": 100_000, "backward": 20_000, "error": 10_000}


@pytest.fixture(scope="module")
def growth() -> dict[str, dict[str, int]]:
    """Per function: bytes that the process grew by in many calls, after a tenth as many to warm up."""
    script = """
        import gc, json, resource, sys, torch, contract
        torch.set_num_threads(1)
        def resident():
            gc.collect()
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        def grown(run, count):
            for _ in range(count // 10):
                run()
            before = resident()
            for _ in range(count):
                run()
            return resident() - before
        def measured(function):
            call = function.make(function.full, **{name: 4 for name in function.sizes})
            name = function.differentiable[0]
            leaf = call.tensors[name].clone().requires_grad_()
            wants, bad = call.replace(**{name: leaf}), call.replace(**{name: call.tensors[name].int()})
            upstream = torch.ones_like(wants(function.function)[0])
            def forward():
                call(function.function)
            def backward():
                leaf.grad = None
                wants(function.function)[0].backward(upstream)
            def error():
                try:
                    bad(function.function)
                except RuntimeError:
                    return
                raise SystemExit("no error")
            runs = {"forward": forward, "backward": backward, "error": error}
            return {kind: grown(runs[kind], count) for kind, count in json.loads(sys.argv[1]).items()}
        print(json.dumps({function.name: measured(function) for function in contract.functions()}))
    """
    return json.loads(in_fresh_process(script, json.dumps(LEAK_COUNTS), timeout=400).splitlines()[-1])


@pytest.mark.row("R33")
@pytest.mark.parametrize("kind", LEAK_COUNTS)
def test_no_leak(function, kind, growth):
    """1e5 forwards, 2e4 forwards with backward, and 1e4 errors each add at most 1 MiB."""
    bytes_more = growth[function.name][kind]
    assert bytes_more <= 1 << 20, f"{bytes_more / LEAK_COUNTS[kind]:.1f} bytes per call"


# ---- property fuzz (R38) -------------------------------------------------------------------------------------

FUZZ_CASES = int(os.environ.get("PYOPS_FUZZ_CASES", "2000"))
FUZZ_SHARES = {"cpu": 0.84, "reference": 0.13, "triton-interpreted": 0.03}  # that of the CPU over all its levels


def fuzz_cases(function: Function, backend: str) -> int:
    family = family_of(function)
    kind = backend.partition(":")[0]
    share = FUZZ_SHARES[kind] / (len(levels(family.__name__.partition(".")[0])) if kind == "cpu" else 1)
    return max(1, round(FUZZ_CASES * share / len(family.FUNCTIONS)))


@pytest.mark.row("R38", "R4")
@pytest.mark.parametrize("backend", [*ON_CPU, "reference", "triton-interpreted"], indirect=True)
def test_fuzz(function, backend, count_cases):
    """Random shape, strides, dtype and options, on each backend: the accuracy rule. The cases are the same in every
    run; PYOPS_FUZZ_CASES is their number over all functions of a family and all backends (default 2000)."""
    cases = 0

    @hypothesis.settings(max_examples=fuzz_cases(function, backend))
    @hypothesis.given(st.data())
    def check(data: st.DataObject) -> None:
        nonlocal cases
        cases += 1
        call = data.draw(function.calls(is_slow(backend)), "call")
        views = {name: drawn_layout(data, name, tensor) for name, tensor in call.given().items()}
        check_accuracy(function, call.replace(**views))

    check()
    count_cases(cases)


# ---- determinism (R44, R45) ----------------------------------------------------------------------------------


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.row("R44")
@pytest.mark.parametrize("backend", ["cuda-emulated"], indirect=True)
def test_schedules_give_the_same_bits(function, backend, count_cases):
    """Whatever the order in which the threads of a CUDA kernel run, and wherever one gives way to another; under the
    checker without a report."""
    from pyops import _emulation

    calls = [function.make(variant) for variant in (function.per_row, function.full)]
    expected = [outputs_and_gradients(function.function, call, function.given(call)) for call in calls]
    schedules = [(seed, preemption) for seed in range(8) for preemption in (0.0, 0.05)]
    try:
        for seed, preemption in schedules:
            _emulation.configure(seed, preemption)
            for call, results in zip(calls, expected, strict=True):
                ours = outputs_and_gradients(function.function, call, function.given(call))
                assert_same_results(ours, results, f"{seed=} {preemption=}")
    finally:
        _emulation.configure()
    count_cases(len(schedules) * len(calls))


@pytest.mark.row("R44")
@pytest.mark.parametrize("number", [2, 3, 5])
def test_thread_counts_give_the_same_bits(function, number, count_cases):
    """As with one thread, where rows are shared out and where one row is."""
    cases = 0
    for sizes, dtype in itertools.product(function.large, (torch.float32, torch.bfloat16)):
        call = function.make(function.full, dtype, **sizes)
        with threads(1):
            expected = outputs_and_gradients(function.function, call, function.given(call))
        with threads(number):
            actual = outputs_and_gradients(function.function, call, function.given(call))
        assert_same_results(actual, expected, f"{sizes}, {dtype}")
        cases += 1
    count_cases(cases)


@pytest.mark.row("R44")
def test_nested_parallelism_gives_the_same_bits(function):
    """Calls from within other parallel work: torch's interop tasks and Python threads at once."""
    calls = [function.make(function.full, seed=seed, **function.large[0]) for seed in range(4)]
    expected = [outputs_and_gradients(function.function, call, function.given(call)) for call in calls]
    results: dict[int, Results] = {}

    def work(number: int) -> None:
        results[number] = outputs_and_gradients(function.function, calls[number], function.given(calls[number]))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number, right in enumerate(expected):
        assert_same_results(results[number], right)


@pytest.mark.row("R44")
@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "3", "OMP_PROC_BIND": "true"},
        {"OMP_NUM_THREADS": "2", "GOMP_CPU_AFFINITY": "0"},
    ],
    ids=lambda environment: " ".join(environment.values()),
)
def test_thread_environment_gives_the_same_bits(environment):
    script = """
        import hashlib, torch, contract
        digest = hashlib.sha256()
        for function in contract.functions():
            for sizes in function.large:
                call = function.make(function.full, **sizes)
                results = contract.outputs_and_gradients(function.function, call, function.given(call))
                for tensor in results.values():
                    digest.update(tensor.numpy().tobytes())
        print(digest.hexdigest())
    """
    assert in_fresh_process(script, **environment) == serial_digest(script)


@functools.cache
def serial_digest(script: str) -> str:
    return in_fresh_process(script)


@pytest.mark.row("R45")
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_repeats_give_the_same_bits(function, deterministic, count_cases):
    call = function.make(function.full, **function.large[-1])
    expected = outputs_and_gradients(function.function, call, function.given(call))
    torch.use_deterministic_algorithms(deterministic)
    try:
        for _ in range(100):
            assert_same_results(outputs_and_gradients(function.function, call, function.given(call)), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    count_cases(100)


@pytest.mark.row("R45")
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@on_every_backend
def test_rows_do_not_depend_on_their_batch(function, dtype, backend, count_cases):
    """Row i of a batch is what row i gives alone, and what it gives in another batch, to the last bit."""
    call = on_device(function.make(function.per_row, dtype, rows=6), backend)
    in_rows = tuple(name for name in function.given(call) if name in function.batch)
    whole = outputs_and_gradients(function.function, call, in_rows)
    splits = [slice(i, i + 1) for i in range(6)] + [slice(0, 2), slice(2, 6)]
    for rows in splits:
        part = {n: t[rows] if n in function.batch and t is not None else t for n, t in call.tensors.items()}
        output = call.replace(**{n: t for n, t in part.items() if n not in in_rows})
        leaves = {name: part[name].detach().requires_grad_() for name in in_rows}
        result = output.replace(**leaves)(function.function)[0]
        result.backward(upstream_gradient(whole["output 0"])[rows])
        assert_same_bits(result.detach(), whole["output 0"][rows], f"{rows}")
        for name, leaf in leaves.items():
            if function.gradients_by_row:
                assert_same_bits(leaf.grad, whole[f"gradient of {name}"][rows], f"{rows}")
    count_cases(len(splits))
