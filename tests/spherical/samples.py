"""The operators and public functions of the spherical family, as the contract wants them described.

The definitions below are written from the papers with dense target distributions, apart from the package and its
references: they are what everything is compared with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import torch
from contract import FLOATING, Call, Function, Op, Rejection, upstream_gradient
from spherical import factored_samples
from torch import Tensor

import pyops

# Public function -> name of the loss in the operator.
LOSSES = {
    "z_loss": "z",
    "taylor_softmax_loss": "taylor_softmax",
    "spherical_softmax_loss": "spherical_softmax",
    "mse_onehot_loss": "mse_onehot",
}
# What the operator takes and a function may lack.
OTHER_DEFAULTS = {"a": 1.0, "b": 0.0, "eps": 0.0}
OWN_DEFAULTS = {
    "z_loss": {"a": 1.0, "b": 4.0, "eps": 1e-12},
    "taylor_softmax_loss": {},
    "spherical_softmax_loss": {"eps": 0.1},
    "mse_onehot_loss": {},
    "cross_entropy": {"lse_square_scale": 0.0},
}
REDUCTIONS = ("none", "mean", "sum")


# ---- definitions -------------------------------------------------------------------------------------------


def _times(weights: Tensor, values: Tensor) -> Tensor:
    """Products in which a weight of 0 hides whatever it multiplies."""
    return torch.where(weights == 0, 0, weights * torch.where(weights == 0, 0, values))


def _z_values(o: Tensor, t: Tensor, a: float, b: float, eps: float) -> Tensor:
    """softplus(a (b - sum_k t_k z_k)) / a; z is 0 in a row of equal logits when eps is 0."""
    mean = o.mean(1, keepdim=True)
    variance = (o - mean).square().mean(1, keepdim=True) + eps
    sigma = torch.where(variance == 0, 1, variance).sqrt()
    z = torch.where(variance == 0, 0, (o - mean) / sigma)
    margin = a * (b - _times(t, z.unsqueeze(1)).sum(2))
    return torch.logaddexp(margin, torch.zeros_like(margin)) / a


def _softmax_values(unnormalised: Tensor, t: Tensor) -> Tensor:
    """- sum_k t_k log p_k, p_k = n_k / sum n."""
    log_p = unnormalised.log() - unnormalised.sum(1, keepdim=True).log()
    return -_times(t, log_p.unsqueeze(1)).sum(2)


def _values(
    loss: str, o: Tensor, t: Tensor, counts: Tensor, a: float = 1.0, b: float = 4.0, eps: float = 0.0
) -> Tensor:
    """Loss of every target distribution t [rows, K, D] on logits o [rows, D]."""
    if loss == "z":
        return _z_values(o, t, a, b, eps)
    if loss == "mse_onehot":
        return (torch.where(counts.unsqueeze(2), o.unsqueeze(1), 0) - t).square().sum(2)
    return _softmax_values(1 + o + o.square() / 2 if loss == "taylor_softmax" else o.square() + eps, t)


def _reduced(rows: Tensor, divisor: Tensor, reduction: str, safe_mean: bool) -> Tensor:
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if safe_mean:
        return torch.where(divisor == 0, 0, rows.sum() / torch.where(divisor == 0, 1, divisor))
    return rows.sum() / divisor


def _prepared(logits: Tensor, target: Tensor, weight, target_weight, ignore_index: int):
    """(logits without ignored rows, class index, its own weight, its class weight, what mean divides by per row,
    whether the row counts); index and weights are rows x K, the weights 0 where a target does not count."""
    index = target if target.dim() == 2 else target.unsqueeze(1)
    index = index.long()
    own = torch.ones_like(index, dtype=logits.dtype)
    if target_weight is not None:
        own = target_weight.reshape(index.shape)
    counts = (index != ignore_index) & (own != 0)
    index = torch.where(counts, index, 0)
    own = torch.where(counts, own, 0)
    of_class = torch.where(counts, 1 if weight is None else weight[index], 0).to(logits.dtype)
    row_counts = counts.any(1)
    row_weight = of_class.sum(1) / torch.where(row_counts, counts.sum(1), 1)
    return torch.where(row_counts.unsqueeze(1), logits, 0), index, own, of_class, row_weight, row_counts


def spherical_definition(
    loss: str, logits: Tensor, target: Tensor, *, weight=None, target_weight=None, ignore_index=-100,
    label_smoothing=0.0, reduction="mean", safe_mean=False, inplace_backward=False, out_dtype=None, **own_options,
) -> Tensor:  # fmt: skip
    if logits.shape[1] == 0:
        rows = logits.sum(1)
        return _reduced(rows, rows.new_zeros(()), reduction, safe_mean)
    o, index, own, of_class, row_weight, _ = _prepared(logits, target, weight, target_weight, ignore_index)
    classes = torch.arange(o.shape[1], device=o.device)
    t = (1 - label_smoothing) * (index.unsqueeze(2) == classes).to(o.dtype) + label_smoothing / o.shape[1]
    weights = own * of_class
    rows = _times(weights, _values(loss, o, t, weights != 0, **own_options)).sum(1)
    return _reduced(rows, row_weight.sum(), reduction, safe_mean)


def _log_sum_exp(o: Tensor) -> Tensor:
    """Written out: the gradient of torch's own is exp(o - lse), which is 1 for equal logits of 1e30."""
    largest = o.detach().max(1, keepdim=True).values
    largest = torch.where(largest.isfinite(), largest, 0)
    return (largest + (o - largest).exp().sum(1, keepdim=True).log()).squeeze(1)


def cross_entropy_definition(
    logits: Tensor, target: Tensor, *, weight=None, target_weight=None, ignore_index=-100, label_smoothing=0.0,
    lse_square_scale=0.0, return_z_loss=False, reduction="mean", safe_mean=False, inplace_backward=False,
    out_dtype=None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    if logits.shape[1] == 0:
        rows = logits.sum(1)
        loss = _reduced(rows, rows.new_zeros(()), reduction, safe_mean)
        return (loss, loss.detach()) if return_z_loss else loss
    o, index, own, of_class, row_weight, row_counts = _prepared(logits, target, weight, target_weight, ignore_index)
    log_p = o.log_softmax(1)
    values = _times((1 - label_smoothing) * own * of_class, -log_p.gather(1, index))
    if label_smoothing:
        smooth = -(log_p if weight is None else _times(weight.expand_as(log_p), log_p)).sum(1, keepdim=True)
        values = values + _times(label_smoothing / o.shape[1] * own, smooth.expand_as(own))
    loss = _reduced(values.sum(1), row_weight.sum(), reduction, safe_mean)
    z_term = torch.zeros_like(loss)
    if lse_square_scale:
        z_rows = torch.where(row_counts, lse_square_scale * _log_sum_exp(o).square(), 0)
        z_term = _reduced(z_rows, row_counts.sum().to(o.dtype), reduction, safe_mean)
        loss = loss + z_term
    return (loss, z_term.detach()) if return_z_loss else loss


def plain_cross_entropy(logits: Tensor, target: Tensor, **options) -> Tensor | tuple[Tensor, Tensor]:
    """torch's own function wherever it says the same."""
    more = any(options.get(name) for name in ("lse_square_scale", "return_z_loss", "safe_mean"))
    if more or options.get("target_weight") is not None or target.dim() == 2 or logits.shape[1] == 0:
        return cross_entropy_definition(logits, target, **options)
    shared = ("weight", "ignore_index", "label_smoothing", "reduction")
    options = {name: options[name] for name in shared if name in options}
    return torch.nn.functional.cross_entropy(logits, target.long(), **options)


def definition_of(name: str) -> Callable:
    if name == "cross_entropy":
        return cross_entropy_definition
    own = OWN_DEFAULTS[name]

    def define(logits, target, **options):
        return spherical_definition(LOSSES[name], logits, target, **{**own, **options})

    return define


# ---- calls -------------------------------------------------------------------------------------------------

SIZES = {"rows": 5, "classes": 37, "targets": 3}
# Vector widths of 4 to 16 lanes times an unrolling of 4, and the Triton tiles; blocks of 4096 and stretches of
# 32768 elements on the CPU.
EDGES = {
    "rows": (1, 2, 3, 7, 17),
    "classes": (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 255, 256, 257, 1021, 4095, 4096, 4097, 32769),
    "targets": (1, 2, 11),
}
OTHER_SIZES = ({"rows": 1}, {"rows": 2, "classes": 16})
LARGE = ({"rows": 67, "classes": 5003}, {"rows": 1, "classes": 3 * 32768 + 5}, {"rows": 3000, "classes": 17})

# Variants that every function of the family has: options, and which optional tensors are given.
VARIANTS: dict[str, dict[str, Any]] = {
    "mean": {},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum", "int32": True, "ignored": True},
    "weighted": {"weight": True, "label_smoothing": 0.1, "ignored": True},
    "full": {"weight": True, "target_weight": True, "several": True, "label_smoothing": 0.2, "ignored": True},
    "several": {"several": True, "reduction": "none", "ignored": True},
    "one weight per row": {"target_weight": True, "reduction": "sum"},
    "safe": {"safe_mean": True, "all_ignored": True},
    "double out": {"out_dtype": torch.float64},
}
OWN_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "z_loss": {"sharp": {"a": 3.0, "b": 10.0, "eps": 0.0, "weight": True}},
    "taylor_softmax_loss": {},
    "spherical_softmax_loss": {"sharp": {"eps": 1e-3, "reduction": "none"}},
    "mse_onehot_loss": {},
    "cross_entropy": {
        "regularised": {"lse_square_scale": 0.01, "return_z_loss": True},
        "regularised, weighted": {"lse_square_scale": 0.02, "weight": True, "ignored": True, "safe_mean": True},
        "all": {"lse_square_scale": 0.01, "return_z_loss": True, "reduction": "none", "several": True,
                "target_weight": True, "weight": True, "label_smoothing": 0.3, "ignored": True},
    },
}  # fmt: skip


def make_call(
    name: str, variant: str, dtype: torch.dtype = torch.float32, seed: int = 0, *, rows: int = SIZES["rows"],
    classes: int = SIZES["classes"], targets: int = SIZES["targets"], scale: float = 1.0, offset: float = 0.0,
) -> Call:  # fmt: skip
    """A call of a function; targets are legal, some double, some ignored where the variant says so."""
    options = dict({**VARIANTS, **OWN_VARIANTS[name]}[variant])
    several, ignored = options.pop("several", False), options.pop("ignored", False)
    all_ignored = options.pop("all_ignored", False) or classes == 0
    int32, has_weight = options.pop("int32", False), options.pop("weight", False)
    has_target_weight = options.pop("target_weight", False)
    random = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=random, dtype=torch.float64) * scale + offset).to(dtype)
    target = torch.randint(max(classes, 1), (rows, targets) if several else (rows,), generator=random)
    if several and targets > 1:
        target[::2, 1] = target[::2, 0]  # duplicates add
    if ignored:
        target[1::3] = -100
        if several and targets > 1:
            target[:, -1] = torch.where(torch.arange(rows) % 2 == 0, -100, target[:, -1])
    if all_ignored:
        target.fill_(-100)
    target_weight = None
    if has_target_weight:
        target_weight = (torch.rand(target.shape, generator=random) + 0.25).to(dtype)
        target_weight.view(-1)[3::4] = 0  # padding
    weight = None
    if has_weight:
        weight = (torch.rand(classes, generator=random) + 0.25).to(dtype)
        weight[2::7] = 0
        if classes > 2:
            target[(target >= 0) & (target % 7 == 2)] -= 1 if rows < 5 else 0  # few rows: the mean keeps a divisor
    target = target.int() if int32 else target
    tensors = {"logits": logits, "target": target, "weight": weight, "target_weight": target_weight}
    return Call(tensors, options)


@st.composite
def random_calls(draw, name: str, tiny: bool) -> Call:
    """Any legal call of moderate magnitude."""
    edges = (5, 16, 17, 63, 65) if tiny else (5, 64, 65, 257, 1021, 4097)
    rows = draw(st.integers(0, 3 if tiny else 9), "rows")
    classes = draw(st.one_of(st.integers(2, 20), st.sampled_from(edges)), "classes")
    several = draw(st.one_of(st.none(), st.integers(1, 4)), "targets")
    dtype = draw(st.sampled_from(FLOATING), "dtype")
    # Of two classes, or a uniform target, all of the gradient cancels, in the definition to what float64 leaves: with
    # 60 digits the kernels are right to 1e-16 there, the definition to 1e-11. No wider type is at hand to judge by.
    cancels = name == "z_loss" and dtype == torch.float64
    classes = max(classes, 3) if cancels else classes
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31), "seed"))
    scale, offset = draw(st.sampled_from((1e-2, 1.0, 8.0))), draw(st.sampled_from((0.0, 3.0, 300.0)))
    shape = (rows,) if several is None else (rows, several)
    logits = (torch.randn(rows, classes, generator=random, dtype=torch.float64) * scale + offset).to(dtype)
    target = torch.randint(classes, shape, generator=random)
    ignore_index = draw(st.sampled_from((-100, -1, 0)), "ignore_index")
    ignored = torch.rand(shape, generator=random) < draw(st.sampled_from((0.0, 0.3)))
    target = torch.where(ignored, ignore_index, target).to(draw(st.sampled_from((torch.int64, torch.int32))))
    weight = (torch.rand(classes, generator=random) + 0.25).to(dtype) if draw(st.booleans()) else None
    target_weight = (torch.rand(shape, generator=random) + 0.25).to(dtype) if draw(st.booleans()) else None
    options = {
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "label_smoothing": draw(st.sampled_from((0.0, 0.1) if cancels else (0.0, 0.1, 1.0))),
        "ignore_index": ignore_index,
        "safe_mean": draw(st.booleans()),
        "out_dtype": draw(st.sampled_from((None, torch.float32, torch.float64))),
    }
    own = {
        "a": st.sampled_from((0.25, 1.0, 3.0)),
        "b": st.sampled_from((-2.0, 0.0, 4.0)),
        "eps": st.sampled_from((1e-12, 1e-3, 0.1) if name == "z_loss" else (1e-3, 0.1, 2.0)),
        "lse_square_scale": st.sampled_from((0.0, 1e-4, 0.1)),
    }
    options |= {option: draw(own[option], option) for option in OWN_DEFAULTS[name]}
    tensors = {"logits": logits, "target": target, "weight": weight, "target_weight": target_weight}
    return Call(tensors, options)


def aliases(name: str) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Call]]]:
    """(label, leaf, the call whose arguments share its memory)."""
    target, classes = torch.tensor([2, 0, 4, 1]), 5
    random = torch.Generator().manual_seed(3)
    line = torch.randn(40, generator=random)
    square = torch.rand(4, classes, generator=random) + 0.25

    def call(logits: Tensor, **more: Tensor) -> Call:
        tensors = {"logits": logits, "target": target, "weight": None, "target_weight": None, **more}
        return Call(tensors, {"reduction": "sum"})

    yield "overlapping rows", line, lambda t: call(t.as_strided((4, classes), (2, 1)))
    yield "overlapping columns", line, lambda t: call(t.as_strided((4, classes), (1, 2)))
    yield "one row for all", line, lambda t: call(t[:classes].expand(4, classes))
    yield "class weight a row of the logits", square, lambda t: call(t, weight=t.detach()[1])
    yield "target weight a column of the logits", square, lambda t: call(t, target_weight=t.detach()[:, 2])
    yield (
        "several targets weighted by the logits",
        square,
        lambda t: call(t, target=target.unsqueeze(1).expand(4, 5), target_weight=t.detach()),
    )


# ---- functions ---------------------------------------------------------------------------------------------

MODULES = {
    "z_loss": pyops.nn.ZLoss,
    "taylor_softmax_loss": pyops.nn.TaylorSoftmaxLoss,
    "spherical_softmax_loss": pyops.nn.SphericalSoftmaxLoss,
    "mse_onehot_loss": pyops.nn.MSEOneHotLoss,
    "cross_entropy": pyops.nn.CrossEntropyLoss,
}


def as_module(name: str, call: Call) -> tuple[torch.nn.Module, tuple[Tensor, ...]]:
    """The module that does a call, and its arguments. Modules return the loss alone, in logits' dtype."""
    options = {k: v for k, v in call.options.items() if k not in ("out_dtype", "return_z_loss")}
    module = MODULES[name](weight=call.tensors["weight"], **options)
    return module, (call.tensors["logits"], call.tensors["target"], call.tensors["target_weight"])


def operator_arguments(name: str, call: Call) -> dict[str, Any]:
    """The forward operator's arguments for a call, by schema name and in schema order."""
    options = {"label_smoothing": 0.0, "ignore_index": -100, "reduction": "mean", "safe_mean": False}
    options |= {"out_dtype": None} | OWN_DEFAULTS[name] | call.options
    options["reduction"] = REDUCTIONS.index(options["reduction"])
    first = {n: call.tensors[n] for n in ("logits", "target", "target_weight", "weight")}
    last = {n: options[n] for n in ("ignore_index", "reduction", "safe_mean", "out_dtype")}
    smoothing = {"label_smoothing": options["label_smoothing"]}
    if name == "cross_entropy":
        return first | smoothing | {"lse_square_scale": options["lse_square_scale"]} | last
    own = {n: options.get(n, OTHER_DEFAULTS[n]) for n in ("a", "b", "eps")}
    return first | {"loss": list(LOSSES).index(name)} | own | smoothing | last


def forward_operator(name: str) -> torch._ops.OpOverload:
    return (torch.ops.pyops.cross_entropy if name == "cross_entropy" else torch.ops.pyops.spherical_loss).default


def backward_arguments(name: str, call: Call, grad_loss: Tensor | None = None) -> dict[str, Any]:
    """The backward operator's arguments, with what the forward saved on the backend in force."""
    forward = operator_arguments(name, call)
    loss, *_, statistics, normalizer = forward_operator(name)(**forward)
    arguments = {
        "grad_loss": upstream_gradient(loss) if grad_loss is None else grad_loss,
        "logits": forward["logits"],
        "target": forward["target"],
    }
    if name == "cross_entropy":
        return arguments | {"weight": forward["weight"], "statistics": statistics, "normalizer": normalizer}
    saved = {"statistics": statistics, "normalizer": normalizer}
    return arguments | saved | {"loss": forward["loss"], "eps": forward["eps"]}


def stages(name: str, call: Call, forward_on: Callable, backward_on: Callable) -> dict[str, Tensor]:
    """Outputs and gradient with the two passes on backends of their own; contexts are made by the arguments."""
    with torch.no_grad(), forward_on():
        outputs = call(FUNCTIONS_BY_NAME[name].function)
        arguments = backward_arguments(name, call)
    operator = "cross_entropy_backward" if name == "cross_entropy" else "spherical_loss_backward"
    with torch.no_grad(), backward_on():
        gradient = getattr(torch.ops.pyops, operator).default(**arguments)
    return {f"output {i}": output for i, output in enumerate(outputs)} | {"gradient of logits": gradient}


# ---- what must be rejected -----------------------------------------------------------------------------------

NUMBER = "be a number, got "


def option(label: str, error: type[Exception], text: str, **changed: Any) -> Rejection:
    return Rejection(label, lambda arguments: {**arguments, **changed}, error, text)


def common_function_rejections(name: str) -> Iterator[Rejection]:
    strided = "be a strided tensor, got another layout"
    yield option(
        "reduction", ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'average'", reduction="average"
    )
    yield option("reduction type", TypeError, "reduction must be one of 'none', 'mean', 'sum', got 1", reduction=1)
    yield option("smoothing", ValueError, "label_smoothing must be in [0, 1], got -0.5", label_smoothing=-0.5)
    yield option("smoothing high", ValueError, "label_smoothing must be in [0, 1], got 1.5", label_smoothing=1.5)
    yield option(
        "smoothing nan", ValueError, "label_smoothing must be in [0, 1], got nan", label_smoothing=float("nan")
    )
    yield option("smoothing type", TypeError, f"label_smoothing must {NUMBER}str", label_smoothing="0.1")
    yield option("smoothing none", TypeError, f"label_smoothing must {NUMBER}NoneType", label_smoothing=None)
    yield option("ignore_index", TypeError, "ignore_index must be an int, got", ignore_index=1.5)
    yield option("logits list", TypeError, "logits must be a Tensor, got list", logits=[[1.0]])
    yield option("target list", TypeError, "target must be a Tensor, got list", target=[1])
    yield option("weight list", TypeError, "weight must be a Tensor or None, got list", weight=[1.0])
    yield option(
        "target_weight list", TypeError, "target_weight must be a Tensor or None, got list", target_weight=[1.0]
    )
    for argument in ("logits", "target", "weight", "target_weight"):
        yield Rejection(
            f"sparse {argument}",
            lambda a, argument=argument: {**a, argument: a[argument].to_sparse()},
            RuntimeError,
            f"{argument} must {strided}",
        )
    for argument in ("weight", "target_weight"):
        yield Rejection(
            f"{argument} requires grad",
            lambda a, argument=argument: {**a, argument: a[argument].clone().requires_grad_()},
            RuntimeError,
            f"{argument} must not require grad (it has no derivative here), got requires_grad=True",
        )
    yield Rejection(
        "in place on a leaf",
        lambda a: {**a, "logits": a["logits"].clone().requires_grad_(), "inplace_backward": True},
        RuntimeError,
        "logits must not be a leaf with inplace_backward=True, got a leaf that requires grad",
    )


def own_function_rejections(name: str) -> Iterator[Rejection]:
    nan = float("nan")
    if name == "z_loss":
        for value, shown in ((0.0, "0"), (-1.0, "-1"), (nan, "nan")):
            yield option(f"a={shown}", ValueError, f"a must be positive, got {shown}", a=value)
        yield option("a type", TypeError, f"a must {NUMBER}str", a="1")
        yield option("b nan", ValueError, "b must be a number, got nan", b=nan)
        yield option("b type", TypeError, f"b must {NUMBER}NoneType", b=None)
    if "eps" in OWN_DEFAULTS[name]:
        yield option("eps", ValueError, "eps must be at least 0, got -0.001", eps=-1e-3)
        yield option("eps nan", ValueError, "eps must be at least 0, got nan", eps=nan)
        yield option("eps type", TypeError, f"eps must {NUMBER}list", eps=[1e-3])
    if name == "cross_entropy":
        text = "lse_square_scale must be at least 0, got "
        yield option("scale", ValueError, text + "-1", lse_square_scale=-1.0)
        yield option("scale nan", ValueError, text + "nan", lse_square_scale=nan)
        yield option("scale type", TypeError, f"lse_square_scale must {NUMBER}str", lse_square_scale="1")


def logits_rejections() -> Iterator[Rejection]:
    """What every operator of the family says about logits and target; of sizes as in SIZES."""
    rows, classes = SIZES["rows"], SIZES["classes"]
    target_shape = f"target must have shape [{rows}] or [{rows}, targets per row], got "

    def tensor(argument: str, shape: tuple[int, ...], text: str, dtype=torch.float32) -> Rejection:
        return Rejection(
            f"{argument} {list(shape)}",
            lambda a: {**a, argument: torch.zeros(shape, dtype=dtype)},
            RuntimeError,
            text,
        )

    yield tensor("logits", (rows,), f"logits must have shape [rows, classes], got [{rows}]")
    yield tensor("logits", (rows, classes, 1), f"logits must have shape [rows, classes], got [{rows}, {classes}, 1]")
    yield tensor("logits", (), "logits must have shape [rows, classes], got []")
    yield tensor("target", (rows + 1,), f"{target_shape}[{rows + 1}]", torch.int64)
    yield tensor("target", (), f"{target_shape}[]", torch.int64)
    yield tensor("target", (rows, 3, 1), f"{target_shape}[{rows}, 3, 1]", torch.int64)
    yield tensor("target", (rows,), "target must be int64 or int32, got float32")


def forward_rejections(name: str) -> Iterator[Rejection]:
    rows, classes, several = SIZES["rows"], SIZES["classes"], SIZES["targets"]
    yield from logits_rejections()
    yield Rejection(
        "weight too long",
        lambda a: {**a, "weight": torch.ones(classes + 1)},
        RuntimeError,
        f"weight must have shape [{classes}], got [{classes + 1}]",
    )
    yield Rejection(
        "weight 2-d",
        lambda a: {**a, "weight": torch.ones(1, classes)},
        RuntimeError,
        f"weight must have shape [{classes}], got [1, {classes}]",
    )
    yield Rejection(
        "weight double",
        lambda a: {**a, "weight": a["weight"].double()},
        RuntimeError,
        "weight must be float32 like logits, got float64",
    )
    yield Rejection(
        "target_weight short",
        lambda a: {**a, "target_weight": torch.ones(rows)},
        RuntimeError,
        f"target_weight must have the shape of target, [{rows}, {several}], got [{rows}]",
    )
    yield Rejection(
        "target_weight half",
        lambda a: {**a, "target_weight": a["target_weight"].half()},
        RuntimeError,
        "target_weight must be float32 like logits, got float16",
    )
    yield option("smoothing", RuntimeError, "label_smoothing must be in [0, 1], got 1.5", label_smoothing=1.5)
    yield option(
        "smoothing nan", RuntimeError, "label_smoothing must be in [0, 1], got nan", label_smoothing=float("nan")
    )
    yield option("reduction", RuntimeError, "reduction must be 0 (none), 1 (mean) or 2 (sum), got 3", reduction=3)
    yield option(
        "reduction negative", RuntimeError, "reduction must be 0 (none), 1 (mean) or 2 (sum), got -1", reduction=-1
    )
    yield option(
        "out_dtype",
        RuntimeError,
        "out_dtype must be float32, float64, bfloat16 or float16, got int64",
        out_dtype=torch.int64,
    )
    for value in (-1, classes, 2**40):

        def put(a, value=value):
            target = a["target"].clone()
            target[2, 1] = value
            return {**a, "target": target}

        yield Rejection(
            f"target {value}",
            put,
            IndexError,
            f"target must be in [0, {classes}) or ignore_index -100, got {value} at position [2, 1]",
            by_value=True,
        )
    nan = float("nan")
    if name == "cross_entropy":
        text = "lse_square_scale must be at least 0, got "
        yield option("scale", RuntimeError, text + "-1", lse_square_scale=-1.0)
        yield option("scale nan", RuntimeError, text + "nan", lse_square_scale=nan)
        return
    yield option("a", RuntimeError, "a must be positive, got 0", a=0.0)
    yield option("a nan", RuntimeError, "a must be positive, got nan", a=nan)
    yield option("b", RuntimeError, "b must be a number, got nan", b=nan)
    yield option("eps", RuntimeError, "eps must be at least 0, got -1", eps=-1.0)
    yield option("eps nan", RuntimeError, "eps must be at least 0, got nan", eps=nan)


def backward_rejections(name: str) -> Iterator[Rejection]:
    rows, several = SIZES["rows"], SIZES["targets"]
    columns, normalizers = (4, 2) if name == "cross_entropy" else (5, 1)
    yield from logits_rejections()
    wide = f"statistics must have shape [{rows}, {columns + several}], got "
    yield Rejection(
        "grad_loss shape",
        lambda a: {**a, "grad_loss": torch.ones(rows + 1)},
        RuntimeError,
        f"grad_loss must have shape [] or [{rows}], got [{rows + 1}]",
    )
    yield Rejection(
        "statistics narrow",
        lambda a: {**a, "statistics": a["statistics"][:, 1:]},
        RuntimeError,
        f"{wide}[{rows}, {columns + several - 1}]",
    )
    yield Rejection(
        "statistics float",
        lambda a: {**a, "statistics": a["statistics"].float()},
        RuntimeError,
        "statistics must be float64, got float32",
    )
    yield Rejection(
        "normalizer float",
        lambda a: {**a, "normalizer": a["normalizer"].float()},
        RuntimeError,
        "normalizer must be float64, got float32",
    )
    yield Rejection(
        "normalizer long",
        lambda a: {**a, "normalizer": torch.ones(3, dtype=torch.float64)},
        RuntimeError,
        f"normalizer must have {normalizers} elements, got [3]",
    )


def unknown_loss(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, "loss": 4}


# ---- the tables --------------------------------------------------------------------------------------------


def under_autocast(call: Call, autocast_to: torch.dtype) -> tuple[Call, torch.dtype]:
    """At least float32, whatever autocast asks for; a loss has the widest dtype of all tensors."""
    dtypes = {tensor.dtype for tensor in call.given().values()}
    wide = torch.float64 if call.tensors["logits"].dtype == torch.float64 else torch.float32
    return call.to(wide), torch.float64 if torch.float64 in dtypes else torch.float32


def describe(name: str) -> Function:
    plain = plain_cross_entropy if name == "cross_entropy" else definition_of(name)
    return Function(
        name=name,
        function=getattr(pyops, name),
        make=functools.partial(make_call, name),
        variants=(*VARIANTS, *OWN_VARIANTS[name]),
        per_row="several",
        full="full",
        sizes=SIZES,
        edges=EDGES,
        large=LARGE,
        batch={"logits": 0, "target": 0, "target_weight": 0},
        positional=("logits", "target"),
        differentiable=("logits",),
        definition=definition_of(name),
        plain=plain,
        calls=functools.partial(random_calls, name),
        stages=functools.partial(stages, name),
        module=functools.partial(as_module, name),
        autocast=under_autocast,
        mixed=("weight", "target_weight"),
        aliases=functools.partial(aliases, name),
        rejections=(*common_function_rejections(name), *own_function_rejections(name)),
        memory={"rows": 16, "classes": 1 << 20},
    )


FUNCTIONS = tuple(describe(name) for name in (*LOSSES, "cross_entropy"))
FUNCTIONS_BY_NAME = {function.name: function for function in FUNCTIONS}


def _spherical_name(suffix: str, arguments: dict[str, Any]) -> str:
    loss = arguments["loss"]
    return list(LOSSES)[loss] + suffix if 0 <= loss < len(LOSSES) else "spherical_loss"  # no loss, no name of its own


def _cross_entropy_name(suffix: str, arguments: dict[str, Any]) -> str:
    return "cross_entropy" + suffix


def _variant_of(variant: str) -> tuple[str, str]:
    """("z_loss", "mean") from "z_loss mean"."""
    name, _, variant = variant.partition(" ")
    return name, variant


def make_forward(variant: str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> dict[str, Any]:
    name, variant = _variant_of(variant)
    return operator_arguments(name, make_call(name, variant, dtype, seed, **sizes))


def make_backward(variant: str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> dict[str, Any]:
    name, variant = _variant_of(variant)
    with torch.no_grad():
        return backward_arguments(name, make_call(name, variant, dtype, seed, **sizes))


def describe_ops(forward: str, names: tuple[str, ...], public_name: Callable) -> Iterator[Op]:
    first = names[0]
    kinds = ("mean", "none", "full")
    variants = (*(f"{first} {kind}" for kind in kinds), *(f"{name} full" for name in names[1:]))
    float_like = (torch.float32,)
    accepts = {"logits": float_like, "target": (torch.int64, torch.int32)}
    bad_loss = Rejection(
        "loss",
        unknown_loss,
        RuntimeError,
        "loss must be 0 (z), 1 (taylor_softmax), 2 (spherical_softmax) or 3 (mse_onehot), got 4",
    )
    extra = () if first == "cross_entropy" else (bad_loss,)
    yield Op(
        name=forward,
        make=make_forward,
        variants=variants,
        full=f"{first} full",
        accepts=accepts | {"target_weight": float_like, "weight": float_like},
        public_name=functools.partial(public_name, ""),
        differentiable=("logits",),
        rejections=(*forward_rejections(first), *extra),
        other_sizes=OTHER_SIZES,
    )
    saved = {"grad_loss": FLOATING, "statistics": (torch.float64,), "normalizer": (torch.float64,)}
    if first == "cross_entropy":
        saved["weight"] = float_like  # of the dtype of logits, which are float32 then
    else:
        accepts = accepts | {"logits": FLOATING}
    for suffix in ("_backward", "_backward_"):
        yield Op(
            name=forward + suffix,
            make=make_backward,
            variants=variants,
            full=f"{first} full",
            accepts=accepts | saved,
            public_name=functools.partial(public_name, "_backward"),
            differentiable=(),
            rejections=(*backward_rejections(first), *extra),
            other_sizes=OTHER_SIZES,
        )


OPS = (
    *describe_ops("spherical_loss", tuple(LOSSES), _spherical_name),
    *describe_ops("cross_entropy", ("cross_entropy",), _cross_entropy_name),
    *factored_samples.OPS,
)
