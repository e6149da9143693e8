"""Benchmark cases of the spherical family: fused losses on given logits, against what a user of torch would write."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pyops._bench import spherical_linear
from pyops._bench.harness import Case, DeviceCase, Prepared, Timed, available_threads, memory_probes
from torch import Tensor

import pyops

LSE_SCALE = 1e-4
EPS = 0.1  # of the spherical softmax


# ---- rivals ------------------------------------------------------------------------------------------------
# "eager" is the formula as one would write it; the other entry is the best composition of torch's own fused
# kernels that we found (one thread, float32, 128 x 50257, forward+backward: z_loss 105 ms as mean and std, 67 ms
# centred, 29 ms by layer_norm; taylor_softmax 58 -> 32 ms, spherical_softmax 45 -> 31 ms and mse_onehot
# 47 -> 27 ms by vector_norm). torch.compile is applied to the first. F.cross_entropy runs beside every loss: it
# computes something else, but it is what these losses replace.


def _chosen(values: Tensor, target: Tensor) -> Tensor:
    return values.gather(1, target.unsqueeze(1)).squeeze(1)


def z_mean_std(logits: Tensor, target: Tensor) -> Tensor:
    z = (_chosen(logits, target) - logits.mean(1)) / logits.std(1, correction=0)
    return F.softplus(4.0 - z).mean()


def z_layer_norm(logits: Tensor, target: Tensor) -> Tensor:
    z = F.layer_norm(logits, logits.shape[1:], eps=1e-12)
    return F.softplus(4.0 - _chosen(z, target)).mean()


def taylor_plain(logits: Tensor, target: Tensor) -> Tensor:
    unnormalised = 1 + logits + 0.5 * logits.square()
    return (unnormalised.sum(1).log() - _chosen(unnormalised, target).log()).mean()


def taylor_vector_norm(logits: Tensor, target: Tensor) -> Tensor:
    squares = torch.linalg.vector_norm(logits, dim=1).square()
    chosen = _chosen(logits, target)
    total = logits.shape[1] + logits.sum(1) + 0.5 * squares
    return (total.log() - (1 + chosen + 0.5 * chosen.square()).log()).mean()


def spherical_plain(logits: Tensor, target: Tensor) -> Tensor:
    unnormalised = logits.square() + EPS
    return (unnormalised.sum(1).log() - _chosen(unnormalised, target).log()).mean()


def spherical_vector_norm(logits: Tensor, target: Tensor) -> Tensor:
    total = torch.linalg.vector_norm(logits, dim=1).square() + EPS * logits.shape[1]
    return (total.log() - (_chosen(logits, target).square() + EPS).log()).mean()


def mse_plain(logits: Tensor, target: Tensor) -> Tensor:
    return (logits.square().sum(1) - 2 * _chosen(logits, target) + 1).mean()


def mse_vector_norm(logits: Tensor, target: Tensor) -> Tensor:
    return (torch.linalg.vector_norm(logits, dim=1).square() - 2 * _chosen(logits, target) + 1).mean()


def cross_entropy_lse_square(logits: Tensor, target: Tensor) -> Tensor:
    lse = torch.logsumexp(logits, 1)
    return (lse - _chosen(logits, target) + LSE_SCALE * lse.square()).mean()


def cross_entropy_plus_lse_square(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target) + LSE_SCALE * torch.logsumexp(logits, 1).square().mean()


def _lse_square(logits: Tensor, target: Tensor, **options) -> Tensor:
    return pyops.cross_entropy(logits, target, lse_square_scale=LSE_SCALE, **options)


# op -> (our function, the same formula in eager torch; the first of them is also compiled)
OPS: dict[str, tuple[Callable, dict[str, Callable]]] = {
    "z_loss": (pyops.z_loss, {"eager": z_mean_std, "layer_norm": z_layer_norm}),
    "taylor_softmax_loss": (
        pyops.taylor_softmax_loss,
        {"eager": taylor_plain, "vector_norm": taylor_vector_norm},
    ),
    "spherical_softmax_loss": (
        pyops.spherical_softmax_loss,
        {"eager": spherical_plain, "vector_norm": spherical_vector_norm},
    ),
    "mse_onehot_loss": (pyops.mse_onehot_loss, {"eager": mse_plain, "vector_norm": mse_vector_norm}),
    "cross_entropy": (pyops.cross_entropy, {"F.cross_entropy": F.cross_entropy}),
    "cross_entropy_lse_square": (
        _lse_square,
        {"eager": cross_entropy_lse_square, "F + logsumexp": cross_entropy_plus_lse_square},
    ),
}

# pass -> bytes that must move, in units of the logits
PASSES = {"forward": 1, "backward": 2, "backward_inplace": 2, "forward_backward": 3}
CALLS = ("call", "call_grad")  # the price of a call on 4 x 8 logits, without and with a gradient wanted


# ---- how each pass is timed --------------------------------------------------------------------------------


def _forward(function: Callable, logits: Tensor, target: Tensor) -> Timed:
    def run(_):
        with torch.no_grad():
            return function(logits, target)

    return Timed(run)


def _backward(function: Callable, logits: Tensor, target: Tensor) -> Timed:
    """A fresh graph for each run, as in training: with retain_graph torch's rivals would keep intermediates."""
    leaf = logits.detach().requires_grad_()

    def run(loss):
        return torch.autograd.grad(loss, leaf)

    return Timed(run, lambda: function(leaf, target))


def _backward_inplace(function: Callable, logits: Tensor, target: Tensor) -> Timed:
    def prepare():
        leaf = logits.clone().requires_grad_()
        inner = leaf.view_as(leaf)  # not a leaf, as the op asks
        return function(inner, target, inplace_backward=True), inner

    return Timed(lambda pair: torch.autograd.grad(*pair), prepare)


def _forward_backward(function: Callable, logits: Tensor, target: Tensor) -> Timed:
    leaf = logits.detach().requires_grad_()
    return Timed(lambda _: torch.autograd.grad(function(leaf, target), leaf))


def _call_grad(function: Callable, logits: Tensor, target: Tensor) -> Timed:
    leaf = logits.detach().requires_grad_()
    return Timed(lambda _: function(leaf, target))


_TIMED = {
    "forward": _forward,
    "backward": _backward,
    "backward_inplace": _backward_inplace,
    "forward_backward": _forward_backward,
    "call": lambda function, logits, target: Timed(lambda _: function(logits, target)),
    "call_grad": _call_grad,
}


SPHERICAL = ("z_loss", "taylor_softmax_loss", "spherical_softmax_loss", "mse_onehot_loss")  # by their numbers


def _dispatcher_call(op: str, logits: Tensor, target: Tensor) -> Timed:
    """The op below the autograd keys: what any Python function around it pays at least."""
    if op.startswith("cross_entropy"):
        scale = LSE_SCALE if op == "cross_entropy_lse_square" else 0.0
        name, arguments = "cross_entropy", (0.0, scale, -100, 1, False, None)
    else:
        a, b, eps = {"z_loss": (1.0, 4.0, 1e-12), "spherical_softmax_loss": (1.0, 0.0, EPS)}.get(op, (1.0, 0.0, 0.0))
        name, arguments = "spherical_loss", (SPHERICAL.index(op), a, b, eps, 0.0, -100, 1, False, None)
    packet = getattr(torch.ops.pyops, name).default

    def run(_):
        with torch._C._AutoDispatchBelowAutograd():
            return packet(logits, target, None, None, *arguments)

    return Timed(run)


def _check_same(op: str, logits: Tensor, target: Tensor) -> None:
    """A comparison counts only if both sides compute the same."""
    ours, formulas = OPS[op]
    expected = ours(logits, target)
    tolerance = 2e-2 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-4
    for formula in formulas.values():
        torch.testing.assert_close(formula(logits, target), expected, rtol=tolerance, atol=tolerance)


def _compiled(formula: Callable, make: Callable, logits: Tensor, target: Tensor) -> dict[str, Timed]:
    """The rival by torch.compile, or nothing (and a word why) where it cannot compile, as without a C++ compiler."""
    torch._dynamo.reset()  # graphs of earlier cases would count against the limit of recompilations
    timed = make(torch.compile(formula, dynamic=False), logits, target)
    try:
        timed.run(timed.prepare())
    except Exception as error:  # inductor raises many kinds
        warnings.warn(f"no torch.compile rival: {type(error).__name__}: {str(error)[:200]}", stacklevel=2)
        return {}
    return {"compile": timed}


def _result(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def contest(op: str, what: str, logits: Tensor, target: Tensor, compiled: bool) -> Prepared:
    """One op in one pass with its rivals, on the tensors given."""
    ours, formulas = OPS[op]
    plain = what.removesuffix("_inplace")  # a rival has no backward in place: it competes with the one that it has
    functions = formulas | {"F.cross_entropy": F.cross_entropy}
    rivals = {name: _TIMED[plain](function, logits, target) for name, function in functions.items()}
    formula = next(iter(formulas.values()))
    if compiled and what not in CALLS:
        rivals |= _compiled(formula, _TIMED[plain], logits, target)

    def exact() -> Tensor:
        timed = _TIMED[plain](formula, logits.double(), target)
        return _result(timed.run(timed.prepare()))

    return Prepared(
        target=_TIMED[what](ours, logits, target),
        rivals=rivals,
        exact=exact,
        comparable=(*formulas, "compile"),
        backend=pyops.explain(op.removesuffix("_lse_square"), logits, target).backend,
    )


def prepare(op: str, what: str, logits: Tensor, target: Tensor, threads: int, compiled: bool) -> Prepared:
    """A contest on the CPU, with yardsticks."""
    _check_same(op, logits, target)
    prepared = contest(op, what, logits, target, compiled)
    prepared.yardsticks = (
        {"dispatcher": _dispatcher_call(op, logits, target)} if what in CALLS else memory_probes(logits, threads)
    )
    return prepared


def build(case: Case, compiled: bool) -> Prepared:
    """A case with tensors of its own."""
    rows, classes = case.shape
    generator = torch.Generator().manual_seed(rows + classes)
    logits = torch.randn(rows, classes, generator=generator).mul_(2).to(getattr(torch, case.dtype))
    target = torch.randint(0, classes, (rows,), generator=generator)
    return prepare(case.op, case.what, logits, target, case.threads, compiled)


def build_on_device(case: DeviceCase, device: torch.device, seed: int | None) -> Prepared:
    rows, classes = case.shape
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(seed or 0)
    target = torch.randint(0, classes, (rows,), generator=generator, device=device)
    if seed is None:
        shift = classes % 64  # elements: the same place within 128 bytes as if each row followed the last
        memory = torch.randn(classes + rows * shift, generator=generator, device=device).to(dtype)
        logits = memory.as_strided((rows, classes), (shift, 1))
    else:
        logits = torch.randn(rows, classes, generator=generator, device=device).mul_(2).to(dtype)
    return contest(case.op, case.what, logits, target, case.compiled and seed == 0)


# ---- the cases ---------------------------------------------------------------------------------------------

LARGE = (2048, 32768)  # 256 MiB in float32, far larger than a cache
LANGUAGE_MODEL = (512, 50257)
MEDIUM = (64, 50257)  # 13 MB in float32
CACHED = (32, 8192)  # 1 MiB in float32
SMALL = (64, 1000)
TINY = (4, 8)


# What gates: forwards over logits larger than a core's own caches against the probe that reads (cross-entropy computes
# too much to follow it: "copy"); everything that writes against torch's own loss on logits that stay in the cache. On
# large logits the pages of a fresh gradient make the ratio jump: twelve runs on a quiet machine, spread of backward
# over copy 0.57 to 0.84 at 64 x 50257, of forward over read 0.01 to 0.05.
def _gate(op: str, shape: tuple[int, int]) -> str:
    if shape is not MEDIUM:
        return "F.cross_entropy"
    return "copy" if op.startswith("cross_entropy") else "read"


def _bytes(what: str, shape: tuple[int, int], dtype: str) -> int:
    """That must move."""
    return PASSES.get(what, 0) * shape[0] * shape[1] * getattr(torch, dtype).itemsize


def case(op: str, what: str, shape: tuple[int, int], dtype: str, threads: int, gate: str = "") -> Case:
    return Case(op, shape, dtype, what, threads, gate, _bytes(what, shape, dtype), build)


def _gated_case(op: str, what: str, shape: tuple[int, int], dtype: str) -> Case:
    return case(op, what, shape, dtype, 1, _gate(op, shape))


def cases() -> list[Case]:
    """Every case; the gated ones first."""
    main = ("z_loss", "cross_entropy")
    gated = [
        *((op, "forward", MEDIUM, "float32") for op in OPS),
        *((op, "forward", MEDIUM, "bfloat16") for op in main),
        *((op, what, CACHED, "float32") for op in OPS for what in PASSES if what != "forward"),
        *((op, what, CACHED, "bfloat16") for op in main for what in PASSES if what != "forward"),
        *((op, what, SMALL, "float32") for op in OPS for what in ("forward", "forward_backward")),
        *(("z_loss", what, SMALL, dtype) for what in ("forward", "backward") for dtype in ("float16", "float64")),
        *((op, what, TINY, "float32") for op in OPS for what in CALLS),
    ]
    shapes = [(LARGE, "float32"), (LANGUAGE_MODEL, "float32"), (LANGUAGE_MODEL, "bfloat16")]
    informing = [(op, what, *shape, 1) for shape in shapes for op in main for what in PASSES]
    others = [op for op in OPS if op not in main]
    without_inplace = [what for what in PASSES if what != "backward_inplace"]
    informing += [(op, what, LANGUAGE_MODEL, "float32", 1) for op in others for what in without_inplace]
    if available_threads() > 1:
        threads = available_threads()
        informing += [(op, what, *shape, threads) for shape in shapes for op in main for what in PASSES]
    known = [_gated_case(*chosen) for chosen in gated] + [case(*chosen) for chosen in informing]
    return known + spherical_linear.cases()


def custom_cases(ops: list[str], shape: tuple[int, int], dtype: str) -> list[Case]:
    """All passes at a shape and dtype of the user's choice, on all threads."""
    return [case(op, what, shape, dtype, torch.get_num_threads()) for op in ops for what in PASSES]


# ---- on a GPU ----------------------------------------------------------------------------------------------

# Large vocabulary in the dtype of training; a row that starts at any alignment; float32; many short rows; few long
# ones, which several blocks share.
DEVICE_SHAPES = (
    ((8192, 32768), "bfloat16"),
    ((4096, 50257), "bfloat16"),
    ((2048, 32768), "float32"),
    ((65536, 4096), "bfloat16"),
    ((16, 1 << 20), "bfloat16"),
)
TINY_DEVICE_SHAPES = (((8, 1000), "bfloat16"), ((3, 257), "float32"))  # for dry runs


def device_cases(tiny: bool = False) -> list[DeviceCase]:
    shapes = TINY_DEVICE_SHAPES if tiny else DEVICE_SHAPES
    first, rest = shapes[0], shapes[1:]
    main = ("z_loss", "cross_entropy")
    chosen = [(op, what, *first, what != "backward_inplace" and not tiny) for what in PASSES for op in main]
    chosen += [(op, what, *shape, False) for shape in rest for what in ("forward", "backward") for op in main]
    others = [op for op in OPS if op not in main]
    chosen += [(op, what, *first, False) for op in others for what in ("forward", "backward")]
    if not tiny:
        chosen += [(op, "forward_backward", SMALL, "float32", False) for op in main]  # the price of launches
    return [
        DeviceCase(op, shape, dtype, what, _bytes(what, shape, dtype), 0, compiled, build_on_device)
        for op, what, shape, dtype, compiled in chosen
    ]
