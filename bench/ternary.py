"""Benchmark cases of the ternary family: packed products, training, quantizers, against what a user of torch has."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pyops._bench.harness import (
    Case,
    DeviceCase,
    Prepared,
    Timed,
    available_threads,
    memory_probes,
    peak_probe,
    stream_probe,
)
from torch import Tensor

import pyops
from pyops import _lib
from pyops.ternary import reference
from pyops.ternary._compute_layout import compute_format
from pyops.ternary._formats import FORMATS, packed_shape

SHAPES = ((2560, 2560), (6912, 2560), (2560, 6912), (4096, 14336))  # out_features x in_features
LARGE = SHAPES[-1]
TOKENS = (1, 8, 128, 512)
COLD_TOKENS = (1, 8)  # from there on a call reads its weights once for so much work that their place counts for little
COLD_BYTES = 320 << 20  # of weights over which a cold case cycles, for each rival
GAMMA = 0.02
RANK = 16
OPS = ("linear_packed", "bitlinear_lowrank", "bitlinear", "quantize_weight", "quantize_act")


# ---- operands ----------------------------------------------------------------------------------------------


def _generator(device: torch.device | str = "cpu", seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _ternary(shape: tuple[int, int], device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    return torch.randint(-1, 2, shape, generator=_generator(device, seed), device=device, dtype=torch.int8)


def _activations(
    tokens: int, in_features: int, dtype: str, device: torch.device | str = "cpu", seed: int = 1
) -> Tensor:
    x = torch.randn(tokens, in_features, generator=_generator(device, seed), device=device)
    return x.to(getattr(torch, dtype))


def _copies(operand, size: int, cold: bool, again: Callable[[], object]) -> list:
    """The operand, and where the case is cold as many more as fill ``COLD_BYTES``."""
    return [operand] + [again() for _ in range(math.ceil(COLD_BYTES / size) - 1 if cold else 0)]


def _in_turn(function: Callable[[object], Tensor], operands: list, calls: int) -> Timed:
    turn = itertools.cycle(operands)

    def run(_):
        for operand in itertools.islice(turn, calls):
            result = function(operand)
        return result

    return Timed(run)


def _no_grad(timed: Timed) -> Timed:
    return Timed(torch.no_grad()(timed.run), timed.prepare)


def _at_level(timed: Timed, level: str) -> Timed:
    """With the kernels of a lower instruction set."""

    def run(argument):
        _lib.native.force_isa(level)
        try:
            return timed.run(argument)
        finally:
            _lib.native.force_isa(None)

    return Timed(run, timed.prepare)


def _on_one_thread(timed: Timed) -> Timed:
    def run(argument):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return timed.run(argument)
        finally:
            torch.set_num_threads(threads)

    return Timed(run, timed.prepare)


def _faster(candidates: list[Timed]) -> Timed:
    """The one that takes less time, of two calls each."""

    def seconds(timed: Timed) -> float:
        times = []
        for _ in range(2):
            start = time.perf_counter()
            timed.run(timed.prepare())
            times.append(time.perf_counter() - start)
        return min(times)

    return min(candidates, key=seconds)


# ---- packed products: linear_packed ------------------------------------------------------------------------
# `what` is the format, "hot" or "cold", and where it is not all of the processor's the level, as "t2_cold_avx2";
# "t2_float" is the product of activations that are not rounded.


def _layout(fmt: str, level: str | None = None) -> str:
    """The layout in which :class:`pyops.nn.PackedBitLinear` keeps such weights on this processor."""
    if level is not None and level != "avx512vnni":
        return "t2x16"
    return compute_format(fmt, torch.device("cpu"))


def _linear(x: Tensor, layout: str, shape: tuple[int, int], act: str | None) -> Callable[[Tensor], Tensor]:
    gamma = torch.tensor(GAMMA, device=x.device)
    out_features, in_features = shape

    def call(packed: Tensor) -> Tensor:
        return pyops.ternary.linear_packed(
            x, packed, gamma, fmt=layout, in_features=in_features, out_features=out_features, act=act
        )

    return call


def _int_mm(x: Tensor, ternary: Tensor, cold: bool, calls: int) -> Timed:
    """torch._int_mm alone, the activations being rounded before; the weights lie in whichever order suits it more."""
    q = pyops.ternary.quantize_act(x)[0]

    def timed(transposed: bool) -> Timed:
        def again() -> Tensor:
            return ternary.clone().t() if transposed else ternary.t().contiguous()

        operands = _copies(again(), ternary.nbytes, cold, again)
        return _in_turn(lambda weight: torch._int_mm(q, weight), operands, calls)

    return _faster([timed(False), timed(True)])


def _dynamic(x: Tensor, ternary: Tensor, cold: bool, calls: int) -> Timed:
    """What torch.ao's dynamically quantized Linear calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # deprecated, with nothing yet in its place for this
        weight = torch.quantize_per_tensor(ternary.float() * GAMMA, GAMMA, 0, torch.qint8)

    def again():
        return torch.ops.quantized.linear_prepack(weight, None)

    operands = _copies(again(), ternary.nbytes, cold, again)
    return _in_turn(lambda packed: torch.ops.quantized.linear_dynamic(x, packed, False), operands, calls)


def _float(x: Tensor, ternary: Tensor, cold: bool, calls: int, dtype: torch.dtype) -> Timed:
    weight = (ternary.float() * GAMMA).to(dtype)
    operands = _copies(weight, weight.nbytes, cold, weight.clone)
    x = x.to(dtype)
    return _in_turn(lambda weight: F.linear(x, weight), operands, calls)


def _product_rivals(x: Tensor, ternary: Tensor, cold: bool, calls: int) -> dict[str, Timed]:
    return {
        "_int_mm": _int_mm(x, ternary, cold, calls),
        "dynamic int8": _dynamic(x, ternary, cold, calls),
        "F.linear float32": _float(x, ternary, cold, calls, torch.float32),
        "F.linear bfloat16": _float(x, ternary, cold, calls, torch.bfloat16),
    }


def _exact_product(x: Tensor, ternary: Tensor, rounded: bool) -> Tensor:
    weight = ternary.double() * torch.tensor(GAMMA).double()
    if not rounded:
        return x.double() @ weight.t()
    q, step = pyops.ternary.quantize_act(x)
    return (q.double() * step.double()) @ weight.t()


def _check_product(call: Callable[[Tensor], Tensor], packed: Tensor, exact: Tensor, rivals: dict, x, ternary) -> None:
    """A comparison counts only if both sides compute the same: ours to float32's precision, the integers of _int_mm
    exactly, the other rivals up to the rounding of activations."""
    ours = call(packed)[: len(exact)].double()
    tolerance = 1e-5 if x.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())
    for name, rival in rivals.items():
        found = rival.run(rival.prepare())[: len(exact)]
        if name == "_int_mm":
            q = pyops.ternary.quantize_act(x[: len(exact)])[0]
            assert torch.equal(found.double(), q.double() @ ternary.double().t()), name
        else:
            assert (found.double() - exact).norm() <= 0.02 * exact.norm(), name


def _calls(case: Case) -> int:
    """On several threads so many that a run takes some milliseconds, beside which starting them counts for little."""
    if case.threads == 1:
        return 1
    call = 2e-5 + max(case.macs / 3e11, math.prod(case.shape[1:]) / 4 / 1.5e10)
    return max(1, round(2e-3 / call))


def build_product(case: Case, compiled: bool) -> Prepared:
    tokens, *shape = case.shape
    fmt, mode, *level = case.what.split("_")
    cold, act = mode == "cold", None if mode == "float" else "int8"
    layout = _layout(fmt, level[0] if level else None)
    calls = _calls(case)
    ternary, x = _ternary(shape), _activations(tokens, shape[1], case.dtype)
    packed = pyops.ternary.pack(ternary, layout)
    ring = _copies(packed, packed.nbytes, cold, packed.clone)
    call = _linear(x, layout, shape, act)
    target = _no_grad(_in_turn(call, ring, calls))
    rivals = _product_rivals(x, ternary, cold, calls)
    _check_product(call, packed, _exact_product(x[:8], ternary, act is not None), rivals, x, ternary)
    yardsticks = peak_probe(case.macs * calls, case.threads)
    if cold:
        yardsticks |= stream_probe(ring, calls, case.threads)
    if fmt == "t5":
        other = pyops.ternary.pack(ternary, _layout("t2"))
        others = _copies(other, other.nbytes, cold, other.clone)
        yardsticks["t2"] = _no_grad(_in_turn(_linear(x, _layout("t2"), shape, act), others, calls))
    if case.threads > 1:
        yardsticks["one thread"] = _on_one_thread(target)
    if level:
        _lib.native.force_isa(level[0])
        try:
            yardsticks |= {name: _at_level(timed, level[0]) for name, timed in
                           peak_probe(case.macs * calls, case.threads).items()}  # fmt: skip
        finally:
            _lib.native.force_isa(None)
        target = _at_level(target, level[0])
    return Prepared(
        target=target,
        rivals=rivals,
        exact=lambda: _exact_product(x, ternary, act is not None),
        comparable=("F.linear float32",) if act is None else (),
        yardsticks=yardsticks,
        backend="cpu",
        calls=calls,
    )


def build_lowrank(case: Case, compiled: bool) -> Prepared:
    """With a correction of rank 16, against the product without it."""
    tokens, *shape = case.shape
    calls = _calls(case)
    ternary, x = _ternary(shape), _activations(tokens, shape[1], case.dtype)
    layout = _layout("t2")
    packed, gamma = pyops.ternary.pack(ternary, layout), torch.tensor(GAMMA)
    A, B = _activations(shape[0], RANK, case.dtype), _activations(RANK, shape[1], case.dtype) / shape[1]
    options = {"fmt": layout, "in_features": shape[1], "out_features": shape[0]}

    def corrected(operand: Tensor) -> Tensor:
        return pyops.ternary.bitlinear_lowrank(x, operand, gamma, A, B, **options)

    weight = ternary * GAMMA + A @ B
    exact = _exact_product(x, ternary, True) + x.double() @ B.double().t() @ A.double().t()
    torch.testing.assert_close(corrected(packed).double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    return Prepared(
        target=_no_grad(_in_turn(corrected, [packed], calls)),
        rivals={"F.linear float32": _in_turn(lambda w: F.linear(x, w), [weight], calls)},
        exact=lambda: exact,
        comparable=("F.linear float32",),
        yardsticks={"without": _no_grad(_in_turn(_linear(x, layout, shape, "int8"), [packed], calls))}
        | peak_probe(case.macs * calls, case.threads),
        backend="cpu",
        calls=calls,
    )


# ---- training: bitlinear -----------------------------------------------------------------------------------


def eager_bitlinear(x: Tensor, weight: Tensor) -> Tensor:
    """As one would write it: both quantizers in torch, gradients straight through them."""
    gamma = weight.float().abs().mean().clamp(min=1e-5)
    rounded = ((weight.float() / gamma).round().clamp(-1, 1) * gamma).to(weight.dtype)
    step = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    tokens = ((x.float() / step).round().clamp(-128, 127) * step).to(x.dtype)
    return F.linear(x + (tokens - x).detach(), weight + (rounded - weight).detach())


def training_step(function: Callable, x: Tensor, weight: Tensor, grad: Tensor) -> Timed:
    """Forward and backward on a weight that has changed, as an optimizer leaves it."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    prepare = lambda: pyops.ternary.forget(weight)  # noqa: E731
    return Timed(lambda _: torch.autograd.grad(function(x, weight), (x, weight), grad), prepare)


def _forward(function: Callable, x: Tensor, weight: Tensor) -> Timed:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    return Timed(lambda _: function(x, weight), lambda: pyops.ternary.forget(weight))


def saved_bytes(function: Callable, x: Tensor, weight: Tensor) -> int:
    """Of what autograd keeps for the backward, each memory once."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(x.detach().requires_grad_(), weight.detach().requires_grad_())
    return sum(kept.values())


def training_contest(case: Case | DeviceCase, device: torch.device | str, seed: int) -> Prepared:
    tokens, out_features, in_features = case.shape
    x = _activations(tokens, in_features, case.dtype, device, seed)
    weight = _activations(out_features, in_features, case.dtype, device, seed + 1) * GAMMA
    grad = _activations(tokens, out_features, case.dtype, device, seed + 2)
    functions = {"F.linear": F.linear, "eager": eager_bitlinear}
    make = _forward if case.what == "forward" else lambda *given: training_step(*given, grad)

    def exact() -> Tensor:
        rounded, gamma = pyops.ternary.quantize_weight(weight)
        if case.what == "forward":
            q, step = pyops.ternary.quantize_act(x)
            return (q.double() * step.double()) @ (rounded.double() * gamma.double()).t()
        return grad.double() @ (rounded.double() * gamma.double())

    return Prepared(
        target=make(pyops.bitlinear, x, weight),
        rivals={name: make(function, x, weight) for name, function in functions.items()},
        exact=exact,
        comparable=("eager",),
        backend=pyops.explain("bitlinear", x, weight).backend,
        facts={"saved_bytes": saved_bytes(pyops.bitlinear, x, weight), "float_bytes": saved_bytes(F.linear, x, weight)},
    )


def build_training(case: Case, compiled: bool) -> Prepared:
    prepared = training_contest(case, "cpu", 1)
    ours, eager = (timed.run(timed.prepare()) for timed in (prepared.target, prepared.rivals["eager"]))
    tolerance = 1e-3 if case.dtype == "float32" else 2e-2
    for mine, other in zip(*((ours, eager) if isinstance(ours, tuple) else ((ours,), (eager,))), strict=True):
        assert (mine - other).double().norm() <= tolerance * other.double().norm(), case.name
    prepared.yardsticks = peak_probe(case.macs, case.threads)
    return prepared


# ---- quantizers --------------------------------------------------------------------------------------------


def _quantize(weight: Tensor, what: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """The op itself: gamma and t2. "given" has gamma already, which leaves the rounding."""
    scale = torch.tensor(GAMMA, device=weight.device) if what == "given" else None
    measure = int(what == "absmedian")
    return lambda: torch.ops.pyops.ternary_quantize_weight(weight, scale, measure, False, 1e-5, False)


def eager_quantizer(weight: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """(T int8, gamma), as one would write it."""
    magnitude = weight.float().abs()
    gamma = {"absmean": magnitude.mean, "absmedian": magnitude.median}.get(what, lambda: torch.tensor(GAMMA))()
    gamma = gamma.clamp(min=1e-5).to(weight.device)
    return (weight.float() * (1 / gamma)).round().clamp(-1, 1).to(torch.int8), gamma


def weight_contest(case: Case | DeviceCase, device: torch.device | str, seed: int) -> Prepared:
    weight = _activations(*case.shape, case.dtype, device, seed) * GAMMA
    quantize = _quantize(weight, case.what)

    def exact() -> Tensor:
        """With our gamma, once that is found right: its last bit moves weights at the threshold."""
        gamma = quantize()[1]
        torch.testing.assert_close(gamma, eager_quantizer(weight, case.what)[1], rtol=1e-5, atol=0)
        return pyops.ternary.pack(reference.quantize_weight(weight, gamma)[0]).double()

    return Prepared(
        target=Timed(lambda _: quantize()),
        rivals={"eager": Timed(lambda _: eager_quantizer(weight, case.what))},
        exact=exact,
        comparable=(),
        backend="cuda" if weight.is_cuda else "cpu",
    )


def build_weight(case: Case, compiled: bool) -> Prepared:
    prepared = weight_contest(case, "cpu", 1)
    assert torch.equal(prepared.target.run(None)[0].double(), prepared.exact()), case.name
    weight = torch.empty(case.shape, dtype=getattr(torch, case.dtype)).fill_(1)
    prepared.yardsticks = stream_probe([weight], 1, case.threads) | memory_probes(weight, case.threads)
    if case.threads > 1:
        prepared.yardsticks["one thread"] = _on_one_thread(prepared.target)
    return prepared


def eager_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x.float() * (127 / largest)).round().clamp(-128, 127).to(torch.int8), largest / 127


def activation_contest(case: Case | DeviceCase, device: torch.device | str, seed: int) -> Prepared:
    x = _activations(*case.shape, case.dtype, device, seed)
    return Prepared(
        target=Timed(lambda _: pyops.ternary.quantize_act(x)),
        rivals={"eager": Timed(lambda _: eager_activations(x))},
        exact=lambda: reference.quantize_activation(x)[0].double(),
        comparable=(),
        backend="cuda" if x.is_cuda else "cpu",
    )


def build_activations(case: Case, compiled: bool) -> Prepared:
    prepared = activation_contest(case, "cpu", 1)
    assert torch.equal(prepared.target.run(None)[0].double(), prepared.exact()), case.name
    x = torch.empty(case.shape, dtype=getattr(torch, case.dtype)).fill_(1)
    prepared.yardsticks = stream_probe([x], 1, case.threads) | memory_probes(x, case.threads)
    return prepared


# ---- the price of a call -----------------------------------------------------------------------------------


def _below_autograd(call: Callable[[], object]) -> Timed:
    def run(_):
        with torch._C._AutoDispatchBelowAutograd():
            return call()

    return Timed(run)


def build_call(case: Case, compiled: bool) -> Prepared:
    """Sizes so small that nothing else counts; "call_grad" of bitlinear wants gradients. The quantized weight of
    bitlinear is remembered, as in evaluation."""
    tokens, out_features, in_features = case.shape
    ternary, x = _ternary((out_features, in_features)), _activations(tokens, in_features, case.dtype)
    weight = (ternary * GAMMA).requires_grad_(case.what == "call_grad")
    packed, gamma = pyops.ternary.pack(ternary), torch.tensor(GAMMA)
    if case.op == "bitlinear":
        gamma = pyops.ternary.quantize_weight(weight)[1]
    ops = torch.ops.pyops
    if case.op == "bitlinear":
        function = lambda _: pyops.bitlinear(x, weight)  # noqa: E731
        dispatched = lambda: ops.bitlinear.default(x, weight, packed, gamma, None, 8, 127, 1e-5)  # noqa: E731
    else:
        layout = _layout("t2")
        operand = pyops.ternary.pack(ternary, layout)
        linear, code = _linear(x, layout, (out_features, in_features), "int8"), FORMATS.index(layout)
        function = lambda _: linear(operand)  # noqa: E731
        arguments = x, operand, gamma, None, code, out_features, in_features, 8, 127, 1e-5, None
        dispatched = lambda: ops.ternary_linear.default(*arguments)  # noqa: E731
    exact = _exact_product(x, ternary, True) * (gamma.double() / GAMMA)
    torch.testing.assert_close(function(None).double(), exact, rtol=1e-5, atol=1e-5)
    return Prepared(
        target=Timed(function),
        rivals={"F.linear": Timed(lambda _: F.linear(x, weight))},
        exact=lambda: exact,
        comparable=("F.linear",),
        yardsticks={"dispatcher": _below_autograd(dispatched)},
        backend="cpu",
    )


# ---- the cases ---------------------------------------------------------------------------------------------


def _product(what: str, tokens: int, shape: tuple[int, int], threads: int, gate: str = "", dtype="float32") -> Case:
    macs = tokens * math.prod(shape)
    return Case("linear_packed", (tokens, *shape), dtype, what, threads, gate, 0, build_product, macs)


def _training(tokens: int, shape: tuple[int, int], dtype: str, threads: int, gate: str = "") -> Case:
    macs = 3 * tokens * math.prod(shape)
    return Case("bitlinear", (tokens, *shape), dtype, "forward_backward", threads, gate, 0, build_training, macs)


def _weight(what: str, shape: tuple[int, int], threads: int, gate: str = "", dtype: str = "float32") -> Case:
    size = math.prod(shape) * getattr(torch, dtype).itemsize
    return Case("quantize_weight", shape, dtype, what, threads, gate, size, build_weight)


def _activation(shape: tuple[int, int], threads: int, gate: str = "", dtype: str = "float32") -> Case:
    size = math.prod(shape) * getattr(torch, dtype).itemsize
    return Case("quantize_act", shape, dtype, "forward", threads, gate, size, build_activations)


def _lowrank(tokens: int, shape: tuple[int, int], threads: int) -> Case:
    macs = tokens * math.prod(shape)
    return Case("bitlinear_lowrank", (tokens, *shape), "float32", f"rank{RANK}", threads, "", 0, build_lowrank, macs)


def _call(op: str, what: str, gate: str = "") -> Case:
    return Case(op, (1, 64, 64), "float32", what, 1, gate, 0, build_call)


def gated_cases() -> list[Case]:
    """Small enough for a hundred rounds in a fraction of a second. Products against the processor's own peak, which
    moves with the clock alone; what reads memory against reading it; calls against the dispatcher."""
    square = (1024, 1024)
    return [
        *(_product(what, tokens, square, 1, "peak") for what in ("t2_hot", "t5_hot") for tokens in (1, 8)),
        _product("t2_hot_avx2", 8, square, 1, "peak"),
        _product("t2_hot", 128, (320, 2560), 1, "peak"),
        _product("t2_float", 8, square, 1, "F.linear float32"),
        *(_weight(what, square, 1, "stream") for what in ("absmean", "absmedian")),
        _activation((512, 1024), 1, "stream"),
        _training(64, (256, 512), "float32", 1, "F.linear"),
        _call("linear_packed", "call", "dispatcher"),
        *(_call("bitlinear", what, "dispatcher") for what in ("call", "call_grad")),
    ]


def cases() -> list[Case]:
    """Every case; the gated ones first."""
    informing = []
    for threads in sorted({1, available_threads()}):
        for shape, fmt in itertools.product(SHAPES, ("t2", "t5")):
            informing += [_product(f"{fmt}_cold", tokens, shape, threads) for tokens in COLD_TOKENS]
            informing += [_product(f"{fmt}_hot", tokens, shape, threads) for tokens in TOKENS]
        informing += [_training(512, shape, dtype, threads) for shape in SHAPES for dtype in ("float32", "bfloat16")]
        informing += [_weight(what, LARGE, threads) for what in ("absmean", "absmedian", "given")]
        informing += [_activation((512, LARGE[1]), threads)]
    for shape in SHAPES:
        informing += [_product("t2_cold_avx2", 1, shape, 1), _product("t2_hot_avx2", 8, shape, 1)]
    informing += [_product("t2_float", tokens, SHAPES[0], 1) for tokens in TOKENS]
    informing += [_lowrank(tokens, SHAPES[0], 1) for tokens in TOKENS]
    gated = gated_cases()
    names = {case.name for case in gated}  # a case that gates is measured in full as well
    return gated + [case for case in informing if case.name not in names]


def custom_cases(ops: list[str], shape: tuple[int, int], dtype: str) -> list[Case]:
    """At a shape (out_features x in_features, of quantize_act tokens x in_features) and dtype of the user's choice, on
    all threads."""
    if dtype == "float64":
        raise ValueError("the ternary ops take float32, bfloat16 and float16, got float64")
    threads = torch.get_num_threads()
    formats = ("t2_hot", "t5_hot")
    made = {
        "linear_packed": lambda: [_product(f, m, shape, threads, "", dtype) for f in formats for m in TOKENS],
        "bitlinear_lowrank": lambda: [_lowrank(tokens, shape, threads) for tokens in TOKENS],
        "bitlinear": lambda: [_training(512, shape, dtype, threads)],
        "quantize_weight": lambda: [_weight(what, shape, threads, "", dtype) for what in ("absmean", "absmedian")],
        "quantize_act": lambda: [_activation(shape, threads, "", dtype)],
    }
    return [case for op in ops for case in made[op]()]


# ---- on a GPU ----------------------------------------------------------------------------------------------
# The passes have names of their own: the ledger counts "forward" and "backward" and holds what they move against what
# must move, but a matrix product reads its operands once per tile.


def _device_layout(device: torch.device) -> str:
    return compute_format("t2", device)


def build_product_on_device(case: DeviceCase, device: torch.device, seed: int | None) -> Prepared:
    tokens, *shape = case.shape
    layout = _device_layout(device)
    x = _activations(tokens, shape[1], case.dtype, device, seed or 0)
    if seed is None:  # weights 0, of which every kernel reads as much
        packed = torch.full(packed_shape(layout, *shape), 0x55, dtype=torch.uint8, device=device)
        return Prepared(Timed(lambda _: _linear(x, layout, shape, "int8")(packed)), {}, lambda: x, ())
    ternary = _ternary(shape, device, seed)
    packed = pyops.ternary.pack(ternary, layout)
    weight = (ternary.float() * GAMMA).to(x.dtype)
    half = weight.to(torch.float16), x.to(torch.float16)
    q, step = pyops.ternary.quantize_act(x)
    wide = ternary.float()
    rivals = {
        f"F.linear {case.dtype}": Timed(lambda _: F.linear(x, weight)),
        "F.linear float16": Timed(lambda _: F.linear(half[1], half[0])),
        "eager": Timed(lambda _: ((q.float() @ wide.t()) * (step * GAMMA)).to(x.dtype)),
    }
    if tokens > 16 and not (shape[0] % 8 or shape[1] % 8):  # as cuBLASLt asks
        rivals["_int_mm"] = Timed(lambda _: torch._int_mm(q, ternary.t()))
    call = _linear(x, layout, shape, "int8")
    explained = pyops.explain(
        "linear_packed", x, packed, torch.tensor(GAMMA, device=device), fmt=layout, in_features=shape[1],
        out_features=shape[0],
    )  # fmt: skip
    return Prepared(
        target=Timed(lambda _: call(packed)),
        rivals=rivals,
        exact=lambda: _exact_product(x, ternary, True),
        comparable=("eager",),
        backend=explained.backend,
    )


def build_training_on_device(case: DeviceCase, device: torch.device, seed: int | None) -> Prepared:
    return training_contest(case, device, seed or 0)


def build_weight_on_device(case: DeviceCase, device: torch.device, seed: int | None) -> Prepared:
    prepared = weight_contest(case, device, seed or 0)
    prepared.backend = _backend_of(device)
    return prepared


def build_activations_on_device(case: DeviceCase, device: torch.device, seed: int | None) -> Prepared:
    prepared = activation_contest(case, device, seed or 0)
    prepared.backend = _backend_of(device)
    return prepared


def _backend_of(device: torch.device) -> str:
    """Of the quantizers, by the layer that they belong to."""
    return pyops.explain("bitlinear", torch.zeros(1, 4, device=device), torch.zeros(4, 4, device=device)).backend


def _device_product(tokens: int, shape: tuple[int, int], dtype: str) -> DeviceCase:
    moved = math.prod(shape) // 4 + tokens * sum(shape) * getattr(torch, dtype).itemsize
    flops = 2 * tokens * math.prod(shape)
    return DeviceCase("linear_packed", (tokens, *shape), dtype, "product", moved, flops, False, build_product_on_device)


def _device_training(tokens: int, shape: tuple[int, int], dtype: str) -> DeviceCase:
    out_features, in_features = shape
    one = getattr(torch, dtype).itemsize
    moved = one * (2 * math.prod(shape) + tokens * (2 * in_features + 2 * out_features))
    flops = 6 * tokens * math.prod(shape)
    return DeviceCase(
        "bitlinear", (tokens, *shape), dtype, "forward_backward", moved, flops, False, build_training_on_device
    )


def device_cases(tiny: bool = False) -> list[DeviceCase]:
    """Decoding, small batches, prefill; a training step; the quantizers."""
    shapes = ((48, 256),) if tiny else (LARGE, *SHAPES[:3])
    tokens = (1, 5, 20) if tiny else (1, 512, 32, 4, 2048)
    dtype = "float32" if tiny else "bfloat16"
    products = [_device_product(m, shape, dtype) for m in tokens for shape in shapes]
    first, size = shapes[0], math.prod(shapes[0]) * getattr(torch, dtype).itemsize
    training = [_device_training(24 if tiny else 2048, first, dtype)]
    weights = [
        DeviceCase("quantize_weight", first, dtype, what, size, 0, False, build_weight_on_device)
        for what in ("absmean", "absmedian")
    ]
    rows = (4 if tiny else 2048, first[1])
    moved = math.prod(rows) * (getattr(torch, dtype).itemsize + 1)
    activations = [DeviceCase("quantize_act", rows, dtype, "tokens", moved, 0, False, build_activations_on_device)]
    return products[:2] + training + weights + activations + products[2:]
