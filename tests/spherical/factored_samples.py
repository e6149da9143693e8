"""The operators of the factored layer, as the contract's tests need them described."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from contract import FLOATING, Op, Rejection
from torch import Tensor

import pyops  # noqa: F401  (loads the operators)
from pyops.spherical import factored_reference as factored

SIZES = {"rows": 5, "features": 6, "classes": 11, "targets": 2}
OTHER_SIZES = ({"rows": 9}, {"rows": 1, "targets": 1}, {"rows": 0}, {"features": 1}, {"targets": 0}, {"classes": 1})
Arguments = dict[str, Any]


def make_state(classes: int, features: int, dtype: torch.dtype, random: torch.Generator) -> factored.State:
    """W = V U + 1 omega^T with statistics that are its own."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    U = torch.eye(features, dtype=torch.float64) + 0.1 * normal(features, features)
    parts = (normal(classes, features), U, torch.linalg.inv(U), 0.1 * normal(features), U[0].clone(), U.clone())
    state = factored.State(*(part.to(dtype) for part in parts))
    factored.restat(state)
    return state


def make_forward(variant: str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> Arguments:
    rows, features, classes, targets = (SIZES | sizes).values()
    random = torch.Generator().manual_seed(seed)
    bias_scale = 0.5 if "bias" in variant else 0.0
    state = make_state(classes, features + bool(bias_scale), dtype, random)
    full = variant == "full"
    return {
        "h": torch.randn(rows, features, dtype=torch.float64, generator=random).to(dtype),
        "target": torch.randint(0, classes, (rows, targets), generator=random),
        "target_weight": torch.rand(rows, targets, dtype=torch.float64, generator=random).to(dtype) if full else None,
        "weight": torch.rand(classes, dtype=torch.float64, generator=random).to(dtype) if full else None,
        "V": state.V,
        "U": state.U,
        "omega": state.omega,
        "wbar": state.wbar,
        "C": state.C,
        "bias_scale": bias_scale,
        "loss": 3 if "mse" in variant else 0,
        "a": 1.0,
        "b": 2.0,
        "eps": 1e-12,
        "label_smoothing": 0.1,
        "ignore_index": -100,
        "reduction": 0 if "none" in variant else 1,
        "safe_mean": True,  # NaN would not equal itself
    }


def forward(arguments: Arguments) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return torch.ops.pyops.factored_linear(*arguments.values())


def make_gradient(variant: str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> Arguments:
    arguments = make_forward(variant, dtype, seed, **sizes)
    loss, partials, normalizer, _, HC, _ = forward(arguments)
    state = {name: arguments[name] for name in ("V", "U", "omega", "wbar")}
    upstream = torch.linspace(0.5, 1.5, max(loss.numel(), 1)).reshape(loss.shape)
    saved = {"target": arguments["target"], "partials": partials, "normalizer": normalizer, "HC": HC}
    return {"grad_loss": upstream.to(dtype), **saved, **state}


def make_step(variant: str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> Arguments:
    arguments = make_forward(variant, dtype, seed, **sizes)
    _, _, _, H, HC, P = forward(arguments)
    with torch.no_grad():
        _, Z, scaled = torch.ops.pyops.factored_linear_gradient(*make_gradient(variant, dtype, seed, **sizes).values())
    return {
        "V": arguments["V"],
        "U": arguments["U"],
        "U_inv": torch.linalg.inv(arguments["U"].double()).to(dtype),
        **{name: arguments[name] for name in ("omega", "wbar", "C", "target")},
        **{"partials": scaled, "H": H, "HC": HC, "P": P, "Z": Z},
        **{"rate": 0.1, "keep": 0.9, "shift_invariant": arguments["loss"] == 0},
    }


def changed(**given: Any) -> Callable[[Arguments], Arguments]:
    """A call with other arguments: values, or functions of what they replace."""
    return lambda a: a | {name: value(a[name]) if callable(value) else value for name, value in given.items()}


def with_target(position: tuple[int, int], value: int) -> Callable[[Tensor], Tensor]:
    def change(target: Tensor) -> Tensor:
        target = target.clone()
        target[position] = value
        return target

    return change


STATE = (
    Rejection("U not square", changed(U=lambda t: t[:4]), RuntimeError, "U must be square, got [4, 6]"),
    Rejection(
        "V too narrow", changed(V=lambda t: t[:, :5]), RuntimeError, "V must have shape [classes, 6], got [11, 5]"
    ),
    Rejection("omega long", changed(omega=torch.zeros(7)), RuntimeError, "omega must have shape [6], got [7]"),
    Rejection("wbar a matrix", changed(wbar=torch.zeros(6, 6)), RuntimeError, "wbar must have shape [6], got [6, 6]"),
    Rejection(
        "target of floats",
        changed(target=lambda t: t.float()),
        RuntimeError,
        "target must be int64 or int32, got float32",
    ),
    Rejection(
        "target of three dimensions",
        changed(target=lambda t: t.unsqueeze(0)),
        RuntimeError,
        "target must have shape [rows] or [rows, targets per row], got [1, 5, 2]",
    ),
)
ROWS = Rejection("HC short", changed(HC=lambda t: t[1:]), RuntimeError, "HC must have shape [5, 6], got [4, 6]")
PARTIALS = Rejection(
    "partials of another width",
    changed(partials=lambda t: t[:, 1:]),
    RuntimeError,
    "partials must have shape [5, 4], got [5, 3]",
)
GRADIENT_AT_NOTHING = Rejection(
    "a gradient at a class that is not there",
    changed(target=with_target((1, 1), 11)),
    IndexError,
    "target must be in [0, 11) where it has a gradient, got 11 at position [1, 1]",
    by_value=True,
)
FORWARD_REJECTIONS = (
    *STATE,
    Rejection(
        "target out of range",
        changed(target=with_target((2, 0), 11)),
        IndexError,
        "target must be in [0, 11) or ignore_index -100, got 11 at position [2, 0]",
        by_value=True,
    ),
    Rejection("h wide", changed(h=torch.zeros(5, 7)), RuntimeError, "h must have shape [5, 6], got [5, 7]"),
    Rejection("h without its bias", changed(bias_scale=1.0), RuntimeError, "h must have shape [5, 5], got [5, 6]"),
    Rejection("C a vector", changed(C=torch.zeros(6)), RuntimeError, "C must have shape [6, 6], got [6]"),
    Rejection("weight short", changed(weight=torch.zeros(3)), RuntimeError, "weight must have shape [11], got [3]"),
    Rejection(
        "target_weight short",
        changed(target_weight=torch.zeros(5, 1)),
        RuntimeError,
        "target_weight must have the shape of target, [5, 2], got [5, 1]",
    ),
    Rejection(
        "reduction", changed(reduction=3), RuntimeError, "reduction must be 0 (none), 1 (mean) or 2 (sum), got 3"
    ),
    Rejection("smoothing", changed(label_smoothing=1.5), RuntimeError, "label_smoothing must be in [0, 1], got 1.5"),
    Rejection(
        "smoothing that needs all logits",
        changed(loss=1),
        RuntimeError,
        "label_smoothing must be 0 for this loss, which would need all logits, got 0.1",
    ),
)
GRADIENT_REJECTIONS = (
    *STATE,
    ROWS,
    PARTIALS,
    GRADIENT_AT_NOTHING,
    Rejection(
        "grad_loss of another length",
        changed(grad_loss=torch.ones(4)),
        RuntimeError,
        "grad_loss must have shape [] or [5], got [4]",
    ),
    Rejection(
        "two normalizers",
        changed(normalizer=torch.ones(2, dtype=torch.float64)),
        RuntimeError,
        "normalizer must be one float64 number, got float64 [2]",
    ),
)
STEP_REJECTIONS = (
    *STATE,
    ROWS,
    PARTIALS,
    GRADIENT_AT_NOTHING,
    Rejection("rate", changed(rate=-1.0), RuntimeError, "rate must be finite and at least 0, got -1"),
    Rejection("keep", changed(keep=0.0), RuntimeError, "keep must be in (0, 1], got 0"),
)

_INDICES, _FLOAT32, _FLOAT64 = (torch.int64, torch.int32), (torch.float32,), (torch.float64,)
_STATE = {"V": (torch.float32, torch.float64), **dict.fromkeys(("U", "omega", "wbar"), _FLOAT32)}


def describe(name: str, make: Callable, accepts: dict, rejections: tuple[Rejection, ...]) -> Op:
    return Op(
        name=name,
        make=make,
        variants=("mean", "none bias", "mse bias", "full"),
        full="full",
        accepts={"target": _INDICES, **_STATE, **accepts},
        public_name=lambda arguments: name.removesuffix("_"),
        differentiable=(),
        rejections=rejections,
        other_sizes=OTHER_SIZES,
        dtypes=(torch.float32, torch.float64),
    )


OPS = (
    describe(
        "factored_linear",
        make_forward,
        {"h": FLOATING, **dict.fromkeys(("target_weight", "weight", "C"), _FLOAT32)},
        FORWARD_REJECTIONS,
    ),
    describe(
        "factored_linear_gradient",
        make_gradient,
        {"grad_loss": FLOATING, **dict.fromkeys(("partials", "normalizer"), _FLOAT64), "HC": _FLOAT32},
        GRADIENT_REJECTIONS,
    ),
    describe(
        "factored_linear_step_",
        make_step,
        {"partials": _FLOAT64, **dict.fromkeys(("U_inv", "C", "H", "HC", "P", "Z"), _FLOAT32)},
        STEP_REJECTIONS,
    ),
)
