"""The operators and public functions of the ternary family, as the contract wants them described.

The definitions below are written from the papers: rounding in float32, as published, and everything after it in the
dtype of the arguments, so that float64 arguments give the exact value for the same rounded numbers. They share no code
with the package; packed bytes are read by the formula for the place of a single weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import torch
from contract import ALL_LEVELS, Call, Function, Op, Rejection, upstream_gradient
from torch import Tensor

import pyops

LEVELS = ALL_LEVELS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("int8", "t2", "t5", "t2x16", "t5x16", "t2mma")
PACKED = FORMATS[1:]
GROUP = 256


# ---- packed bytes --------------------------------------------------------------------------------------------


def _blocks(a: int, b: int) -> int:
    return -(-a // b)


def packed_shape(fmt: str, n: int, k: int) -> tuple[int, ...]:
    return {
        "int8": (n, k),
        "t2": (n, _blocks(k, 4)),
        "t5": (n, _blocks(k, 5)),
        "t2x16": (_blocks(n, 16), _blocks(k, 16), 16, 4),
        "t5x16": (_blocks(n, 16), _blocks(k, 20), 16, 4),
        "t2mma": (_blocks(n, 16), _blocks(k, 128), 32, 16),
    }[fmt]


def base_of(fmt: str) -> int:
    return 3 if fmt in ("t5", "t5x16") else 4


def places(fmt: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(number of the byte, digit within it) of every weight [n, k]."""
    n, k = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    if fmt in ("t2", "t5"):
        per_byte = 4 if fmt == "t2" else 5
        return n * _blocks(columns, per_byte) + k // per_byte, k % per_byte + 0 * n
    if fmt == "t2mma":
        row, column = n % 16, k % 128
        lane = 4 * (row % 8) + column % 16 // 4
        block = n // 16 * _blocks(columns, 128) + k // 128
        return 512 * block + 16 * lane + 4 * (column // 32) + column % 4, row // 8 + 2 * (column % 32 // 16)
    width = 16 if fmt == "t2x16" else 20
    line = n // 16 * _blocks(columns, width) + k // width
    return 64 * line + 4 * (n % 16) + k % 4, k % width // 4 + 0 * n


def encoded(ternary: Tensor, fmt: str) -> Tensor:
    """Weights -1, 0, 1 in a format; padding is weight 0."""
    if fmt == "int8":
        return ternary.to(torch.int8)
    base, digits = base_of(fmt), 5 if base_of(fmt) == 3 else 4
    shape = packed_shape(fmt, *ternary.shape)
    values = torch.full(shape, sum(base**digit for digit in range(digits)), dtype=torch.int64).flatten()
    byte, digit = places(fmt, *ternary.shape)
    values.index_add_(0, byte.flatten(), (ternary.to(torch.int64) * base**digit).flatten())
    return values.to(torch.uint8).reshape(shape)


def decoded(packed: Tensor, fmt: str, rows: int, columns: int) -> Tensor:
    """The inverse, as int64."""
    if fmt == "int8":
        return packed.to(torch.int64)
    byte, digit = places(fmt, rows, columns)
    return packed.flatten()[byte].to(torch.int64) // base_of(fmt) ** digit % base_of(fmt) - 1


# ---- definitions -----------------------------------------------------------------------------------------------


def rounded_activations(x: Tensor, qmax: int = 127, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(q, step) per token; the integers as floats. A token that is not finite has step NaN."""
    values = x.detach().float()
    largest = values.abs().amax(-1, keepdim=True) if values.shape[-1] else values.new_zeros((*values.shape[:-1], 1))
    finite = largest.isfinite()
    largest = torch.where(finite, torch.maximum(largest, torch.tensor(eps, device=x.device)), 1)
    scale = torch.full_like(largest, qmax) / largest  # number / tensor would round twice
    q = (torch.where(finite, values, 0) * scale).round().clamp(-128, 127)
    return q, torch.where(finite, largest / qmax, float("nan"))


def measured(weight: Tensor, measure: str, per_row: bool) -> Tensor:
    """gamma [n] or [1] in float32, before eps."""
    flat = weight.detach().float().abs()
    flat = flat if per_row else flat.reshape(1, -1)
    count = flat.shape[1]
    if count == 0 or flat.shape[0] == 0:
        return flat.new_zeros(flat.shape[0])
    if measure == "absmean":
        return flat.double().mean(1).float()
    found = flat.sort(1).values[:, (count - 1) // 2]  # NaN and infinity are sorted to the end
    return torch.where(flat[:, :].isfinite().all(1), found, float("nan"))


def rounded_weight(
    weight: Tensor, scale: Tensor | None, measure: str, granularity: str, eps: float, eps_mode: str
) -> tuple[Tensor, Tensor]:
    """(T as floats, gamma' [n] or [1], float32); gamma' is differentiable in a given scale."""
    values = weight.detach().float()
    gamma = measured(weight, measure, granularity == "row")
    finite = gamma.isfinite()
    if scale is not None:
        gamma = torch.where(finite, scale.float().reshape(-1), float("nan"))
    gamma = torch.where(finite, gamma, float("nan"))
    least = torch.tensor(eps, dtype=torch.float32, device=weight.device)
    gamma = gamma + least if eps_mode == "add" else torch.where(gamma < least, least, gamma)
    scaled = values * (1 / gamma.detach())[:, None]
    ternary = torch.where(values.isfinite() & (scaled.abs() > 0.5), values.sign(), 0)
    return ternary, gamma


def mixed(value: Tensor, rounded: Tensor, share: float) -> Tensor:
    """value + share (rounded - value), whose gradient is that of value."""
    whole = value.detach()
    return (rounded if share == 1 else whole + share * (rounded - whole)) + (value - whole)


def bitlinear_definition(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, weight_measure="absmean", granularity="tensor", qmax=127,
    eps=1e-5, eps_mode="clamp", act_bits=8, lambda_=1.0, scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    ternary, gamma = rounded_weight(weight, scale, weight_measure, granularity, eps, eps_mode)
    ternary, gamma = ternary.to(x.dtype), gamma.to(x.dtype)[:, None]
    w = mixed(weight, ternary * gamma.detach(), lambda_)
    if scale is not None:
        w = w + lambda_ * ternary * torch.where(gamma.isfinite(), gamma - gamma.detach(), 0)
    if act_bits is not None:
        q, step = rounded_activations(x, qmax, eps)
        x = mixed(x, q.to(x.dtype) * step.to(x.dtype), lambda_)
    return torch.nn.functional.linear(x, w, bias)


def linear_packed_definition(
    x: Tensor, packed: Tensor, gamma: Tensor, bias: Tensor | None = None, *, in_features: int, fmt="t2",
    out_features: int | None = None, act="int8", qmax=127, eps=1e-5, out_dtype=None,
) -> Tensor:  # fmt: skip
    ternary = decoded(packed, fmt, packed.shape[0] if out_features is None else out_features, in_features)
    each = gamma if gamma.dim() == 0 else gamma[:, None] if gamma.dim() == 1 else gamma.repeat_interleave(GROUP, 1)
    if act is not None:
        q, step = rounded_activations(x, qmax, eps)
        x = mixed(x, q.to(x.dtype) * step.to(x.dtype), 1)
    return torch.nn.functional.linear(x, ternary.to(x.dtype) * each.to(x.dtype), bias)


# ---- calls -------------------------------------------------------------------------------------------------------

SIZES = {"rows": 5, "inputs": 37, "outputs": 19}
# The CPU's lines hold 16 rows x 16 or 20 inputs, its tiles 32 rows x 12 tokens; GPU tiles are powers of 2.
EDGES = {
    "rows": (1, 2, 3, 4, 7, 8, 11, 12, 13, 16, 17, 24, 25, 33),
    "inputs": (1, 2, 3, 4, 5, 7, 15, 16, 17, 19, 20, 21, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1021, 4097),
    "outputs": (1, 2, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 129, 257, 1021),
}
OTHER_SIZES = ({"rows": 1}, {"rows": 2, "inputs": 16, "outputs": 33})
LARGE = (
    {"rows": 64, "inputs": 517, "outputs": 260},
    {"rows": 1, "inputs": 1037, "outputs": 2051},
    {"rows": 600, "inputs": 33, "outputs": 17},
)

BITLINEAR_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows": {"granularity": "row", "bias": True},
    "full": {"granularity": "row", "bias": True, "scale": True, "qmax": 128},
    "median": {"weight_measure": "absmedian", "bias": True},
    "median of rows": {"weight_measure": "absmedian", "granularity": "row", "eps_mode": "add", "eps": 1e-3},
    "one scale": {"scale": True},
    "tokens": {"leading": True, "bias": True},
    "float activations": {"act_bits": None, "bias": True},
    "half rounded": {"lambda_": 0.5, "bias": True},
    "half rounded, scales": {"lambda_": 0.25, "granularity": "row", "scale": True, "act_bits": None},
}
LINEAR_VARIANTS: dict[str, dict[str, Any]] = {
    "t2": {},
    "rows": {"fmt": "t5", "gamma": "row", "bias": True},
    "full": {"gamma": "row", "bias": True},
    "int8": {"fmt": "int8", "qmax": 128},
    "t2x16": {"fmt": "t2x16", "gamma": "row"},
    "t5x16": {"fmt": "t5x16", "bias": True},
    "t2mma": {"fmt": "t2mma", "bias": True},
    "tokens": {"leading": True, "fmt": "t2x16", "eps": 1e-3},
    "other dtype out": {"out_dtype": torch.float16, "bias": True},
    "groups": {"gamma": "group", "bias": True},
    "groups of t2x16": {"gamma": "group", "fmt": "t2x16"},
    "float activations": {"act": None, "fmt": "t5", "bias": True},
    "float activations, groups": {"act": None, "gamma": "group"},
}
INEXACT = ("float activations", "half rounded", "groups")  # beginnings of variants whose sums are of floats


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float64)


def _ternary(random: torch.Generator, n: int, k: int) -> Tensor:
    return torch.randint(-1, 2, (n, k), generator=random, dtype=torch.int8)


def make_bitlinear(
    variant: str, dtype: torch.dtype = torch.float32, seed: int = 0, *, rows: int = SIZES["rows"],
    inputs: int = SIZES["inputs"], outputs: int = SIZES["outputs"], scale: float = 1.0, offset: float = 0.0,
) -> Call:  # fmt: skip
    options = dict(BITLINEAR_VARIANTS[variant])
    has_bias, has_scale, leading = (options.pop(name, False) for name in ("bias", "scale", "leading"))
    random = _generator(seed)
    x = (_normal(random, *((rows, 2, inputs) if leading else (rows, inputs))) * scale + offset).to(dtype)
    weight = (_normal(random, outputs, inputs) * 0.6).to(dtype)
    bias = _normal(random, outputs).to(dtype)
    gamma = torch.rand((outputs,) if options.get("granularity") == "row" else (), generator=random) + 0.25
    tensors = {"x": x, "weight": weight, "bias": bias if has_bias else None, "scale": gamma if has_scale else None}
    return Call(tensors, options)


def make_linear(
    variant: str, dtype: torch.dtype = torch.float32, seed: int = 0, *, rows: int = SIZES["rows"],
    inputs: int = SIZES["inputs"], outputs: int = SIZES["outputs"], scale: float = 1.0, offset: float = 0.0,
) -> Call:  # fmt: skip
    options = dict(LINEAR_VARIANTS[variant])
    granularity = options.pop("gamma", "tensor")
    has_bias, leading = options.pop("bias", False), options.pop("leading", False)
    random = _generator(seed)
    if granularity == "group":
        inputs = GROUP * min(inputs, 2)
    x = (_normal(random, *((rows, 2, inputs) if leading else (rows, inputs))) * scale + offset).to(dtype)
    packed = encoded(_ternary(random, outputs, inputs), options.get("fmt", "t2"))
    shape = {"tensor": (), "row": (outputs,), "group": (outputs, inputs // GROUP)}[granularity]
    gamma = torch.rand(shape, generator=random) + 0.25
    bias = _normal(random, outputs).to(dtype) if has_bias else None
    options |= {"in_features": inputs}
    if options.get("fmt", "t2") not in ("int8", "t2", "t5") or seed % 2:
        options |= {"out_features": outputs}
    return Call({"x": x, "packed": packed, "gamma": gamma, "bias": bias}, options)


def _drawn_sizes(draw: Callable, tiny: bool) -> tuple[int, int, int]:
    edges = (15, 17, 33) if tiny else (16, 33, 64, 65, 129, 257, 513)
    rows = draw(st.integers(0, 3 if tiny else 14), "rows")
    inputs = draw(st.one_of(st.integers(1, 24), st.sampled_from(edges)), "inputs")
    return rows, inputs, draw(st.one_of(st.integers(1, 24), st.sampled_from(edges)), "outputs")


def _drawn_x(draw: Callable, random: torch.Generator, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    scale, offset = draw(st.sampled_from((1e-2, 1.0, 8.0))), draw(st.sampled_from((0.0, 3.0, 300.0)))
    shape = draw(st.sampled_from(((rows, inputs), (rows, 2, inputs), (1, rows, 1, inputs))))
    return (_normal(random, *shape) * scale + offset).to(dtype)


@st.composite
def random_bitlinear(draw, tiny: bool) -> Call:
    """Any legal call of moderate magnitude."""
    rows, inputs, outputs = _drawn_sizes(draw, tiny)
    dtype = draw(st.sampled_from(DTYPES), "dtype")
    random = _generator(draw(st.integers(0, 2**31), "seed"))
    magnitude = draw(st.sampled_from((1e-3, 0.6)))
    weight = (_normal(random, outputs, inputs) * magnitude).to(dtype)
    granularity = draw(st.sampled_from(("tensor", "row")))
    shape = (outputs,) if granularity == "row" else ()
    x = _drawn_x(draw, random, rows, inputs, dtype)
    # The gradient of a scale may be one number into which all else cancels: its error in plain torch is no bar then.
    has_scale = draw(st.booleans()) and x.numel() > 0 and x.mean().abs() < 1
    tensors = {
        "x": x,
        "weight": weight,
        "bias": _normal(random, outputs).to(dtype) if draw(st.booleans()) else None,
        "scale": (torch.rand(shape, generator=random) + 0.1) * magnitude if has_scale else None,
    }
    options = {
        "weight_measure": draw(st.sampled_from(("absmean", "absmedian"))),
        "granularity": granularity,
        "qmax": draw(st.sampled_from((127, 128))),
        "eps": draw(st.sampled_from((1e-5, 1e-2))),
        "eps_mode": draw(st.sampled_from(("clamp", "add"))),
        "act_bits": draw(st.sampled_from((8, 8, 8, None))),
        "lambda_": draw(st.sampled_from((1.0, 1.0, 1.0, 0.5))),
    }
    return Call(tensors, options)


@st.composite
def random_linear(draw, tiny: bool) -> Call:
    rows, inputs, outputs = _drawn_sizes(draw, tiny)
    granularity = draw(st.sampled_from(("tensor", "row", "group")))
    inputs = GROUP * (1 + inputs % 2) if granularity == "group" else inputs
    dtype = draw(st.sampled_from(DTYPES), "dtype")
    random = _generator(draw(st.integers(0, 2**31), "seed"))
    shape = {"tensor": (), "row": (outputs,), "group": (outputs, inputs // GROUP)}[granularity]
    fmt = draw(st.sampled_from(FORMATS), "format")
    tensors = {
        "x": _drawn_x(draw, random, rows, inputs, dtype),
        "packed": encoded(_ternary(random, outputs, inputs), fmt),
        "gamma": torch.rand(shape, generator=random) + 1e-3,
        "bias": _normal(random, outputs).to(dtype) if draw(st.booleans()) else None,
    }
    options = {
        "fmt": fmt,
        "in_features": inputs,
        "out_features": outputs,
        "act": draw(st.sampled_from(("int8", "int8", "int8", None))),
        "qmax": draw(st.sampled_from((127, 128))),
        "eps": draw(st.sampled_from((1e-5, 1e-2))),
        "out_dtype": draw(st.sampled_from((None, *DTYPES))),
    }
    return Call(tensors, options)


def bitlinear_aliases() -> Iterator[tuple[str, Tensor, Callable[[Tensor], Call]]]:
    """(label, leaf, the call whose arguments share its memory)."""
    line, square = _normal(_generator(3), 60), _normal(_generator(4), 7, 7)

    def call(x: Tensor, weight: Tensor, **more: Tensor) -> Call:
        return Call({"x": x, "weight": weight, "bias": None, "scale": None, **more}, {})

    yield "x and weight are one", square, lambda t: call(t, t)
    yield "x is the transposed weight", square, lambda t: call(t.T, t)
    yield "bias is a row of the weight", square, lambda t: call(square.to(t.dtype), t, bias=t[2])
    yield "bias is a column of x", square, lambda t: call(t, square.to(t.dtype), bias=t[:, 1])
    yield "overlapping tokens", line, lambda t: call(t.as_strided((5, 6), (2, 1)), t[30:].view(5, 6))
    yield "one token for all", line, lambda t: call(t[:6].expand(4, 6), t[6:36].view(5, 6))
    yield "one row of weights for all", line, lambda t: call(t[:24].view(4, 6), t[30:36].expand(5, 6))


def linear_aliases() -> Iterator[tuple[str, Tensor, Callable[[Tensor], Call]]]:
    line, square = _normal(_generator(5), 60), _normal(_generator(6), 6, 6)
    packed, gamma = encoded(_ternary(_generator(7), 6, 6), "t2"), torch.rand(6, generator=_generator(8))

    def call(x: Tensor, bias: Tensor | None = None) -> Call:
        return Call({"x": x, "packed": packed, "gamma": gamma, "bias": bias}, {"in_features": 6})

    yield "overlapping tokens", line, lambda t: call(t.as_strided((5, 6), (2, 1)))
    yield "overlapping inputs", line, lambda t: call(t.as_strided((5, 6), (1, 2)))
    yield "one token for all", line, lambda t: call(t[:6].expand(4, 6))
    yield "bias is a token", square, lambda t: call(t, t[3])
    yield "bias is an input of all tokens", square, lambda t: call(t, t[:, 2])


# ---- functions ---------------------------------------------------------------------------------------------------


def under_autocast(call: Call, autocast_to: torch.dtype) -> tuple[Call, torch.dtype]:
    """x and bias take autocast's dtype; a weight is rounded to three values from its own."""
    changed = {name: call.tensors[name].to(autocast_to) for name in ("x", "bias") if call.tensors[name] is not None}
    return call.replace(**changed), autocast_to


def bitlinear_module(call: Call) -> tuple[torch.nn.Module, tuple[Tensor, ...]]:
    x, weight, bias, scale = call.tensors.values()
    options = dict(call.options)
    options["measure"] = options.pop("weight_measure", "absmean")
    module = pyops.nn.BitLinear(weight.shape[1], weight.shape[0], bias is not None, scale=scale, **options)
    module.weight = torch.nn.Parameter(weight.clone())
    if bias is not None:
        module.bias = torch.nn.Parameter(bias.clone())
    return module, (x,)


def packed_module(call: Call) -> tuple[torch.nn.Module, tuple[Tensor, ...]]:
    """A module stores t2 or t5; the other formats it makes for itself."""
    x, packed, gamma, bias = call.tensors.values()
    options = {name: value for name, value in call.options.items() if name not in ("fmt", "out_features", "out_dtype")}
    fmt = call.options.get("fmt", "t2")
    outputs = call.options.get("out_features", packed.shape[0])
    if fmt not in ("t2", "t5"):
        packed, fmt = encoded(decoded(packed, fmt, outputs, call.options["in_features"]), "t5"), "t5"
    made = pyops.nn.PackedBitLinear.from_packed(packed, gamma, bias, fmt=fmt, out_features=outputs, **options)
    return made, (x,)


def bitlinear_stages(call: Call, forward_on: Callable, backward_on: Callable) -> dict[str, Tensor]:
    """Outputs and gradients with the two passes on backends of their own; contexts are made by the arguments."""
    x, weight, bias, scale = call.tensors.values()
    arguments = bitlinear_operator(call)
    with torch.no_grad(), forward_on():
        arguments |= dict(zip(("packed", "gamma"), _quantized(call), strict=True))
        y, q, step = torch.ops.pyops.bitlinear(**arguments)
    gradient = upstream_gradient(y)
    results = {"output 0": y}
    with torch.no_grad(), backward_on():
        backward_input = torch.ops.pyops.ternary_linear_backward_input
        packed, gamma = arguments["packed"], arguments["gamma"]
        results["gradient of x"] = backward_input(gradient, packed, gamma, 1, x.shape[1])
        results["gradient of weight"] = torch.ops.pyops.bitlinear_backward_weight(gradient, q, step, weight.dtype)
        if bias is not None:
            results["gradient of bias"] = gradient.sum(0)
        if scale is not None:
            ternary = torch.ops.pyops.ternary_repack(packed, 1, 0, *weight.shape)
            results["gradient of scale"] = (results["gradient of weight"].float() * ternary).sum(1)
    return results


def linear_stages(call: Call, forward_on: Callable, backward_on: Callable) -> dict[str, Tensor]:
    with torch.no_grad(), forward_on():
        (y,) = call(pyops.ternary.linear_packed)
    gradient = upstream_gradient(y)
    results = {"output 0": y}
    with torch.no_grad(), backward_on():
        arguments = linear_operator(call)
        results["gradient of x"] = torch.ops.pyops.ternary_linear_backward_input(
            gradient, *(arguments[name] for name in ("packed", "gamma", "format", "in_features"))
        )
    if call.tensors["bias"] is not None:
        results["gradient of bias"] = gradient.sum(0)
    return results


def bitlinear_backward(call: Call, wanted: tuple[str, ...]) -> set[str]:
    """The operators that a backward runs."""
    if call.options.get("lambda_", 1) != 1:
        return set()
    ran = {"ternary_linear_backward_input"} if "x" in wanted else set()
    if {"weight", "scale"} & set(wanted) and call.options.get("act_bits", 8):
        ran |= {"bitlinear_backward_weight"}
    return ran | ({"ternary_repack"} if "scale" in wanted else set())


def linear_backward(call: Call, wanted: tuple[str, ...]) -> set[str]:
    return {"ternary_linear_backward_input"} if "x" in wanted else set()


# ---- operators ---------------------------------------------------------------------------------------------------


def _options_of(call: Call) -> dict[str, Any]:
    defaults = {"weight_measure": "absmean", "granularity": "tensor", "qmax": 127, "eps": 1e-5, "eps_mode": "clamp"}
    return {**defaults, "act_bits": 8, **call.options}


def quantize_weight_operator(call: Call) -> dict[str, Any]:
    """Arguments by schema name and in schema order, here and below."""
    options = _options_of(call)
    return {
        "weight": call.tensors["weight"],
        "scale": call.tensors["scale"],
        "measure": ("absmean", "absmedian").index(options["weight_measure"]),
        "per_row": options["granularity"] == "row",
        "eps": options["eps"],
        "add_eps": options["eps_mode"] == "add",
    }


def _quantized(call: Call) -> tuple[Tensor, Tensor]:
    return torch.ops.pyops.ternary_quantize_weight(**quantize_weight_operator(call))


def bitlinear_operator(call: Call) -> dict[str, Any]:
    with torch.no_grad():
        packed, gamma = _quantized(call)
    options = _options_of(call)
    return {
        "x": call.tensors["x"],
        "weight": call.tensors["weight"],
        "packed": packed,
        "gamma": gamma,
        "bias": call.tensors["bias"],
        "act_bits": options["act_bits"] or 0,
        "qmax": options["qmax"],
        "eps": options["eps"],
    }


def linear_operator(call: Call) -> dict[str, Any]:
    options = {"fmt": "t2", "act": "int8", "qmax": 127, "eps": 1e-5, "out_dtype": None, **call.options}
    return {
        **call.tensors,
        "format": FORMATS.index(options["fmt"]),
        "out_features": options.get("out_features", call.tensors["packed"].shape[0]),
        "in_features": options["in_features"],
        "act_bits": 8 if options["act"] else 0,
        "qmax": options["qmax"],
        "eps": options["eps"],
        "out_dtype": options["out_dtype"],
    }


def make_operator(of_call: Callable, make: Callable, variant: str, *args: Any, **sizes: int) -> dict[str, Any]:
    return of_call(make(variant, *args, **sizes))


def make_quantize_activation(variant: str, *args: Any, **sizes: int) -> dict[str, Any]:
    x = make_bitlinear("plain", *args, **sizes).tensors["x"]
    x = x * {"zeros": 0, "denormals": 1e-42}.get(variant, 1)
    return {"x": x, "qmax": 128 if variant == "128" else 127, "eps": 0.5 if variant == "large eps" else 1e-5}


def make_repack(
    variant: str, dtype: torch.dtype = torch.float32, seed: int = 0, *, rows: int = 0,
    inputs: int = SIZES["inputs"], outputs: int = SIZES["outputs"],
) -> dict[str, Any]:  # fmt: skip
    source, target = variant.split(" to ")
    packed = encoded(_ternary(_generator(seed), outputs + rows, inputs), source)
    formats = {"from_format": FORMATS.index(source), "to_format": FORMATS.index(target)}
    return {"source": packed, **formats, "out_features": outputs + rows, "in_features": inputs}


def make_backward_input(
    variant: str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int
) -> dict[str, Any]:
    arguments = linear_operator(make_linear(variant, dtype, seed, **sizes))
    rows = sizes.get("rows", SIZES["rows"])
    grad = _normal(_generator(seed + 100), rows, arguments["out_features"]).to(dtype)
    return {"grad": grad} | {name: arguments[name] for name in ("packed", "gamma", "format", "in_features")}


def make_backward_weight(
    variant: str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int
) -> dict[str, Any]:
    call = make_bitlinear("plain", dtype, seed, **sizes)
    q, step = rounded_activations(call.tensors["x"])
    grad = _normal(_generator(seed + 100), q.shape[0], call.tensors["weight"].shape[0]).to(dtype)
    into = {"same": dtype, "float32": torch.float32, "bfloat16": torch.bfloat16}[variant]
    return {"grad": grad, "quantized": q.to(torch.int8), "step": step.flatten(), "dtype": into}


# ---- what must be rejected -----------------------------------------------------------------------------------------

FLOATS = "be float32, bfloat16 or float16"
BY_NUMBER = "be 0 (int8), 1 (t2), 2 (t5), 3 (t2x16), 4 (t5x16) or 5 (t2mma)"
NAN = float("nan")


def option(label: str, error: type[Exception], text: str, **changed: Any) -> Rejection:
    return Rejection(label, lambda arguments: {**arguments, **changed}, error, text)


def bad(text: str, **changed: Any) -> Rejection:
    """A call that the operator rejects, for something that tensors' values do not decide."""
    return option(text, RuntimeError, text, **changed)


def with_code(argument: str, fmt: str, n: int, k: int, text: str) -> Rejection:
    """The byte of a weight holds what stands for none."""

    def put(arguments: dict[str, Any]) -> dict[str, Any]:
        bytes_of = arguments[argument].clone()
        number = int(places(fmt, SIZES["outputs"], SIZES["inputs"])[0][n, k]) if fmt != "int8" else 0
        if fmt == "int8":
            bytes_of[n, k] = 2
        else:
            bytes_of.view(-1)[number] = 255
        return {**arguments, argument: bytes_of}

    return Rejection(f"{argument} [{n}, {k}]", put, ValueError, text, by_value=True)


def quantizer_rejections() -> Iterator[Rejection]:
    yield bad("qmax must be 127 or 128, got 126", qmax=126)
    yield bad("eps must be positive, got 0", eps=0.0)
    yield bad("eps must be positive, got -1", eps=-1.0)
    yield bad("eps must be positive, got nan", eps=NAN)
    yield bad("eps must be positive, got inf", eps=float("inf"))
    yield bad("eps must be positive, got 1e-50", eps=1e-50)


def x_rejections(argument: str = "x", shape: str = "[tokens, in_features]") -> Iterator[Rejection]:
    yield bad(f"{argument} must have shape {shape}, got [37]", **{argument: torch.ones(37)})
    yield bad(f"{argument} must have shape {shape}, got []", **{argument: torch.ones(())})
    yield bad(f"{argument} must have shape {shape}, got [2, 5, 37]", **{argument: torch.ones(2, 5, 37)})
    yield bad(f"{argument} must {FLOATS}, got float64", **{argument: torch.ones(5, 37, dtype=torch.float64)})


def weights_rejections() -> Iterator[Rejection]:
    """What operators that take packed weights in t2 say of them and of gamma."""
    short = torch.zeros(19, 9, dtype=torch.uint8)
    yield bad("packed must have shape [19, 10], got [19, 9]", packed=short)
    yield bad("packed must have shape [19, 10], got [190]", packed=torch.zeros(190, dtype=torch.uint8))
    yield bad("packed must be uint8, got int8", packed=torch.zeros(19, 10, dtype=torch.int8))
    gammas = "gamma must have shape [], [19] or [19, in_features / 256], got "
    yield bad(gammas + "[18]", gamma=torch.ones(18))
    yield bad(gammas + "[19, 1]", gamma=torch.ones(19, 1))
    yield bad(gammas + "[19, 0]", gamma=torch.ones(19, 0))
    yield bad("gamma must be float32, got float64", gamma=torch.ones(19, dtype=torch.float64))


def bias_rejections() -> Iterator[Rejection]:
    yield bad("bias must have shape [19], got [18]", bias=torch.ones(18))
    yield bad("bias must have shape [19], got [19, 1]", bias=torch.ones(19, 1))
    yield bad("bias must be float32 like x, got bfloat16", bias=torch.ones(19, dtype=torch.bfloat16))


def features_rejections() -> Iterator[Rejection]:
    yield bad("in_features must be in [0, 16777216], got -1", in_features=-1)
    yield bad("in_features must be in [0, 16777216], got 16777217", in_features=16777217)


def linear_op_rejections() -> Iterator[Rejection]:
    yield from x_rejections()
    yield bad("x must have in_features = 37 columns, got [5, 36]", x=torch.ones(5, 36))
    yield from weights_rejections()
    yield from bias_rejections()
    yield from quantizer_rejections()
    yield from features_rejections()
    yield bad("out_features must be at least 0, got -1", out_features=-1)
    yield bad("packed must have shape [20, 10], got [19, 10]", out_features=20)
    yield bad("packed must have shape [2, 3, 16, 4], got [19, 10]", format=3)
    yield bad("packed must have shape [2, 2, 16, 4], got [19, 10]", format=4)
    yield bad("packed must have shape [2, 1, 32, 16], got [19, 10]", format=5)
    yield bad("packed must be int8, got uint8", format=0)
    for number in (-1, 6):
        yield bad(f"format must {BY_NUMBER}, got {number}", format=number)
    yield bad("act_bits must be 8 or 0 (not quantized), got 4", act_bits=4)
    for dtype in (torch.float64, torch.int8):
        yield bad(f"out_dtype must {FLOATS}, got {str(dtype).removeprefix('torch.')}", out_dtype=dtype)
    yield with_code("packed", "t2", 18, 36, "packed must hold the codes 0, 1 and 2 only, got 3 at [18, 36]")


def backward_input_rejections() -> Iterator[Rejection]:
    yield from x_rejections("grad", "[tokens, out_features]")
    yield from weights_rejections()
    yield from features_rejections()
    yield bad(f"format must {BY_NUMBER}, got 6", format=6)
    yield bad("packed must have shape [20, 10], got [19, 10]", grad=torch.ones(5, 20))
    yield bad("packed must have shape [19, 11], got [19, 10]", in_features=41)


def bitlinear_op_rejections() -> Iterator[Rejection]:
    yield from x_rejections()
    yield bad("x must have in_features = 37 columns, got [5, 36]", x=torch.ones(5, 36))
    yield bad("weight must have shape [out_features, in_features], got [37]", weight=torch.ones(37))
    yield bad(f"weight must {FLOATS}, got float64", weight=torch.ones(19, 37, dtype=torch.float64))
    yield bad("packed must have shape [20, 10], got [19, 10]", weight=torch.ones(20, 37))
    yield from weights_rejections()
    yield from bias_rejections()
    yield from quantizer_rejections()
    yield bad("act_bits must be 8 or 0 (not quantized), got 1", act_bits=1)


def quantize_weight_rejections() -> Iterator[Rejection]:
    yield from x_rejections("weight", "[out_features, in_features]")
    yield bad("scale must have shape [19], got []", scale=torch.ones(()))
    yield bad("scale must have shape [19], got [1]", scale=torch.ones(1))
    yield bad("scale must have shape [], got [19]", per_row=False)
    yield bad("scale must be float32, got float64", scale=torch.ones(19, dtype=torch.float64))
    yield bad("measure must be 0 (absmean) or 1 (absmedian), got 2", measure=2)
    yield bad("eps must be at least 0, got -0.5", eps=-0.5)
    yield bad("eps must be at least 0, got nan", eps=NAN)
    yield bad("eps must be at least 0, got inf", eps=float("inf"))


def repack_rejections() -> Iterator[Rejection]:
    for argument in ("from_format", "to_format"):
        for number in (-1, 6):
            yield bad(f"{argument} must {BY_NUMBER}, got {number}", **{argument: number})
    yield bad("to_format must differ from from_format, got 1", to_format=1)
    yield from features_rejections()
    yield bad("out_features must be at least 0, got -5", out_features=-5)
    yield bad("source must have shape [20, 10], got [19, 10]", out_features=20)
    yield bad("source must have shape [19, 11], got [19, 10]", in_features=41)
    yield bad("source must have shape [19, 10], got [19, 10, 1]", source=torch.zeros(19, 10, 1, dtype=torch.uint8))
    yield bad("source must be uint8, got int8", source=torch.zeros(19, 10, dtype=torch.int8))
    yield bad("source must be int8, got uint8", from_format=0)
    for n, k in ((0, 0), (7, 20), (18, 36)):
        text = f"source must hold the codes 0, 1 and 2 only, got 3 at [{n}, {k}]"
        yield with_code("source", "t2", n, k, text)
    codes = encoded(torch.ones(19, 37, dtype=torch.int8), "t5")
    codes[3, 2] = 243
    yield Rejection(
        "t5", lambda a: {**a, "source": codes, "from_format": 2, "to_format": 1}, ValueError,
        "source must hold bytes below 243 only, got 243 at [3, 10]", by_value=True,
    )  # fmt: skip
    plain = torch.zeros(19, 37, dtype=torch.int8)
    plain[4, 5] = -2
    yield Rejection(
        "int8", lambda a: {**a, "source": plain, "from_format": 0}, ValueError,
        "source must hold -1, 0 and 1 only, got -2 at [4, 5]", by_value=True,
    )  # fmt: skip


def backward_weight_rejections() -> Iterator[Rejection]:
    yield from x_rejections("grad", "[tokens, out_features]")
    yield bad("quantized must have shape [5, in_features], got [4, 37]", quantized=torch.ones(4, 37, dtype=torch.int8))
    yield bad("quantized must have shape [5, in_features], got [5]", quantized=torch.ones(5, dtype=torch.int8))
    yield bad("quantized must be int8, got uint8", quantized=torch.ones(5, 37, dtype=torch.uint8))
    yield bad("step must have shape [5], got [5, 1]", step=torch.ones(5, 1))
    yield bad("step must be float32, got float16", step=torch.ones(5, dtype=torch.float16))
    yield bad(f"dtype must {FLOATS}, got float64", dtype=torch.float64)


def tensor_rejections(required: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[Rejection]:
    """Of public functions: what is no tensor, or one without strides."""
    for argument in (*required, *optional):
        kind = "a Tensor" if argument in required else "a Tensor or None"
        yield option(f"{argument} list", TypeError, f"{argument} must be {kind}, got list", **{argument: [1.0]})
        yield Rejection(
            f"sparse {argument}",
            lambda a, argument=argument: {**a, argument: a[argument].to_sparse()},
            RuntimeError,
            f"{argument} must be a strided tensor, got another layout",
        )
    for argument in required:
        if argument != "bias":
            text = f"{argument} must be a Tensor, got NoneType"
            yield option(f"{argument} None", TypeError, text, **{argument: None})


def quantizer_option_rejections() -> Iterator[Rejection]:
    yield option("qmax", ValueError, "qmax must be one of 127, 128, got 126", qmax=126)
    yield option("qmax type", TypeError, "qmax must be one of 127, 128, got 127.0", qmax=127.0)
    for value, shown in ((0, "0"), (-1.0, "-1"), (NAN, "nan"), (float("inf"), "inf")):
        yield option(f"eps {shown}", ValueError, f"eps must be positive, got {shown}", eps=value)
    for value in ("1e-5", None, True):
        text = f"eps must be a number, got {type(value).__name__}"
        yield option(f"eps {value!r}", TypeError, text, eps=value)
    yield option("x without dimensions", RuntimeError, "x must have at least one dimension, got []", x=torch.ones(()))


def bitlinear_rejections() -> Iterator[Rejection]:
    in_measuring = "pyops::bitlinear: scale"  # of what is no tensor this function itself speaks
    for rejection in tensor_rejections(("x", "weight"), ("bias", "scale")):
        whole = rejection.text.replace("scale", in_measuring, 1) if "scale" in rejection.label else rejection.text
        yield Rejection(rejection.label, rejection.change, rejection.error, whole)
    yield from quantizer_option_rejections()
    wrong_choices = {
        "weight_measure": ("'absmean', 'absmedian'", "mean"),
        "granularity": ("'tensor', 'row'", "group"),
        "eps_mode": ("'clamp', 'add'", "max"),
    }
    for name, (allowed, value) in wrong_choices.items():
        yield option(name, ValueError, f"{name} must be one of {allowed}, got '{value}'", **{name: value})
        yield option(f"{name} type", TypeError, f"{name} must be one of {allowed}, got 1.5", **{name: 1.5})
    yield option("act_bits", ValueError, "act_bits must be one of 8, None, got 4", act_bits=4)
    yield option("act_bits type", TypeError, "act_bits must be one of 8, None, got 8.0", act_bits=8.0)
    for value, shown in ((-0.5, "-0.5"), (1.5, "1.5"), (NAN, "nan")):
        yield option(f"lambda {shown}", ValueError, f"lambda_ must be in [0, 1], got {shown}", lambda_=value)
    yield option("lambda type", TypeError, "lambda_ must be a number, got str", lambda_="1")
    yield bad("weight must have shape [out_features, in_features], got [37]", weight=torch.ones(37))
    yield bad("x must have in_features = 37 columns, got [5, 36]", x=torch.ones(5, 36))
    yield bad("x must be float32 like weight, got bfloat16", x=torch.ones(5, 37, dtype=torch.bfloat16))
    yield bad("bias must have shape [19], got [18]", bias=torch.ones(18))
    yield bad("scale must have shape [19], got []", scale=torch.ones(()))
    yield bad("scale must be float32, got float64", scale=torch.ones(19, dtype=torch.float64))


def linear_rejections() -> Iterator[Rejection]:
    yield from tensor_rejections(("x", "packed", "gamma"), ("bias",))
    yield from quantizer_option_rejections()
    names = ", ".join(FORMATS)
    yield option("format", ValueError, f"fmt must be one of {names}, got 't3'", fmt="t3")
    yield option("format type", TypeError, f"fmt must be one of {names}, got int", fmt=1)
    yield option("act", ValueError, "act must be one of 'int8', None, got 'int4'", act="int4")
    yield option("no out_features", TypeError, "out_features must be given for the layout t2x16, got None", fmt="t2x16")
    yield bad("x must have in_features = 37 columns, got [5, 36]", x=torch.ones(5, 36))
    yield bad("packed must have shape [19, 10], got [19, 9]", packed=torch.zeros(19, 9, dtype=torch.uint8))
    yield bad("gamma must have shape [], [19] or [19, in_features / 256], got [19, 1]", gamma=torch.ones(19, 1))
    yield bad("in_features must be in [0, 16777216], got -1", in_features=-1)
    yield bad(f"out_dtype must {FLOATS}, got float64", out_dtype=torch.float64)
    code = with_code("packed", "t2", 2, 3, "packed must hold the codes 0, 1 and 2 only, got 3 at [2, 0]")
    yield Rejection(code.label, code.change, pyops.FormatError, code.text)
    yield Rejection(
        "gamma requires grad",
        lambda a: {**a, "gamma": a["gamma"].clone().requires_grad_()},
        RuntimeError,
        "gamma must not require grad (it has no derivative here), got requires_grad=True",
    )


# ---- the tables ----------------------------------------------------------------------------------------------------


def exact(variants: dict[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in variants if not name.startswith(INEXACT))


COMMON: dict[str, Any] = {
    "per_row": "rows",
    "full": "full",
    "sizes": SIZES,
    "edges": EDGES,
    "few_edges": {"rows": (1, 4, 5, 17), "inputs": (1, 3, 17, 65), "outputs": (1, 17, 33)},
    "large": LARGE,
    "batch": {"x": 0},
    "autocast": under_autocast,
    "memory": {"rows": 2048, "inputs": 4, "outputs": 8192},
    "dtypes": DTYPES,
    "smooth": False,
    "second_derivative": "raises",
    "gradients_by_row": False,
    "largest": 1 / 64,  # of 37 products, and 5 in a gradient
}

FUNCTIONS = (
    Function(
        name="bitlinear",
        function=pyops.bitlinear,
        make=make_bitlinear,
        variants=tuple(BITLINEAR_VARIANTS),
        positional=("x", "weight", "bias"),
        differentiable=("x", "weight", "bias", "scale"),
        definition=bitlinear_definition,
        plain=bitlinear_definition,
        calls=random_bitlinear,
        stages=bitlinear_stages,
        module=bitlinear_module,
        mixed=("weight",),
        aliases=bitlinear_aliases,
        rejections=tuple(bitlinear_rejections()),
        bit_identical=exact(BITLINEAR_VARIANTS),
        operators=2,
        backward_operators=bitlinear_backward,
        summed_by_torch=("bias", "scale"),
        error_names={"scale": "ternary_quantize_weight"},
        **COMMON,
    ),
    Function(
        name="linear_packed",
        function=pyops.ternary.linear_packed,
        make=make_linear,
        variants=tuple(LINEAR_VARIANTS),
        positional=("x", "packed", "gamma", "bias"),
        differentiable=("x", "bias"),
        definition=linear_packed_definition,
        plain=linear_packed_definition,
        calls=random_linear,
        stages=linear_stages,
        module=packed_module,
        mixed=("bias",),
        aliases=linear_aliases,
        rejections=tuple(linear_rejections()),
        exported=False,
        sizes_in_options=("inputs",),
        bit_identical=exact(LINEAR_VARIANTS),
        operators_in_transforms=("ternary_repack",),
        backward_operators=linear_backward,
        summed_by_torch=("bias",),
        error_names={"": "ternary_linear"},
        **COMMON,
    ),
)
FUNCTIONS_BY_NAME = {function.name: function for function in FUNCTIONS}

F32, U8, I8 = (torch.float32,), (torch.uint8,), (torch.int8,)


def describe(
    name: str, make: Callable, variants: tuple[str, ...], full: str, accepts: dict[str, tuple[torch.dtype, ...]],
    rejections: Iterator[Rejection], differentiable: tuple[str, ...] = (),
) -> Op:  # fmt: skip
    return Op(
        name=name,
        make=make,
        variants=variants,
        full=full,
        accepts=accepts,
        public_name=lambda arguments: name,
        differentiable=differentiable,
        rejections=tuple(rejections),
        other_sizes=OTHER_SIZES,
        dtypes=DTYPES,
        smooth=False,
        autocast=torch.bfloat16,
    )


OPS = (
    describe(
        "ternary_quantize_weight",
        functools.partial(make_operator, quantize_weight_operator, make_bitlinear),
        ("plain", "full", "median", "median of rows", "one scale"),
        "full",
        {"weight": DTYPES, "scale": F32},
        quantize_weight_rejections(),
    ),
    describe(
        "ternary_quantize_activation",
        make_quantize_activation,
        ("127", "128", "large eps", "zeros", "denormals"),
        "127",
        {"x": DTYPES},
        (*x_rejections(), *quantizer_rejections()),
    ),
    describe(
        "ternary_repack",
        make_repack,
        ("t2 to t5", "int8 to t2", "t5 to t2mma", "t2x16 to int8", "t5x16 to t2x16", "t2mma to t5x16"),
        "t2 to t5",
        {"source": U8},
        repack_rejections(),
    ),
    describe(
        "ternary_linear",
        functools.partial(make_operator, linear_operator, make_linear),
        ("t2", "full", "int8", "t2x16", "t5x16", "t2mma", "groups", "float activations"),
        "full",
        {"x": F32, "packed": U8, "gamma": F32, "bias": F32},
        linear_op_rejections(),
        ("x", "bias"),
    ),
    describe(
        "ternary_linear_backward_input",
        make_backward_input,
        ("t2", "full", "rows", "int8", "t2x16", "t5x16", "t2mma", "groups"),
        "full",
        {"grad": DTYPES, "packed": U8, "gamma": F32},
        backward_input_rejections(),
    ),
    describe(
        "bitlinear",
        functools.partial(make_operator, bitlinear_operator, make_bitlinear),
        ("plain", "full", "median", "float activations"),
        "full",
        {"x": F32, "weight": DTYPES, "packed": U8, "gamma": F32, "bias": F32},
        bitlinear_op_rejections(),
        ("x", "weight", "gamma", "bias"),
    ),
    describe(
        "bitlinear_backward_weight",
        make_backward_weight,
        ("same", "float32", "bfloat16"),
        "same",
        {"grad": DTYPES, "quantized": I8, "step": F32},
        backward_weight_rejections(),
    ),
)
