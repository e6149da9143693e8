"""The ops of the factored layer: their fakes, their lack of a derivative, and the torch code that serves where no
kernel does. ``pyops.nn.FactoredSphericalLinear`` calls them."""

from __future__ import annotations

import torch
from torch import Tensor

from pyops import _dispatch
from pyops._autograd import register_no_derivative, reject
from pyops.spherical import _checks, reference
from pyops.spherical import factored_reference as factored
from pyops.spherical.factored_reference import MicroBatch, Options, Partials, State
from pyops.spherical.reference import accumulation_dtype
from pyops.spherical.reference_ops import _check_range

#: Numbers of an outcome.
FACTORED, SINGULAR, SKIPPED = range(3)
_OUTCOMES = {"factored": FACTORED, "singular": SINGULAR, "skipped": SKIPPED}


# ---- fakes -------------------------------------------------------------------------------------------------------


def _check_forward(
    h, target, target_weight, weight, V, U, omega, wbar, C, bias_scale, loss, a, b, eps, label_smoothing, reduction
) -> tuple[int, int, int]:
    op = "factored_linear"
    name = _checks.spherical_name(loss)
    _checks.spherical_options(name, a, b, eps)
    rows, targets, features = _checks.factored(op, V, U, target)
    _checks.factored_features(op, h, U, rows, features - (bias_scale != 0))
    for argument, tensor, dimensions in (("omega", omega, 1), ("wbar", wbar, 1), ("C", C, 2)):
        _checks.factored_state(op, argument, tensor, U, dimensions)
    _checks.factored_smoothing(op, loss, label_smoothing, reduction)
    if target_weight is not None:
        _checks.factored_like(op, "target_weight", target_weight, U)
        _checks.target_weights(op, target_weight, target)
    if weight is not None:
        _checks.factored_class_weight(op, weight, V, U)
    return rows, targets, features


@torch.library.register_fake("pyops::factored_linear")
def _fake(
    h, target, target_weight, weight, V, U, omega, wbar, C, bias_scale, loss, a, b, eps, label_smoothing, ignore_index,
    reduction, safe_mean,
):  # fmt: skip
    rows, targets, features = _check_forward(
        h, target, target_weight, weight, V, U, omega, wbar, C, bias_scale, loss, a, b, eps, label_smoothing, reduction
    )
    wide = {"dtype": torch.float64}
    return (
        U.new_empty((rows,) if reduction == 0 else (), dtype=accumulation_dtype(h.dtype)),
        U.new_empty((rows, 2 + targets), **wide),
        U.new_empty((), **wide),
        *(U.new_empty((rows, features)) for _ in range(3)),
    )


def _check_gradient(grad_loss, target, partials, normalizer, HC, V, U, omega, wbar) -> tuple[int, int, int]:
    op = "factored_linear_gradient"
    rows, targets, features = _checks.factored(op, V, U, target)
    _checks.factored_upstream(op, grad_loss, rows, U)
    _checks.factored_rows(op, "partials", partials, rows, 2 + targets, torch.float64, U)
    _checks.factored_normalizer(op, normalizer, U)
    _checks.factored_rows(op, "HC", HC, rows, features, U.dtype, U)
    for argument, tensor in (("omega", omega), ("wbar", wbar)):
        _checks.factored_state(op, argument, tensor, U, 1)
    return rows, targets, features


@torch.library.register_fake("pyops::factored_linear_gradient")
def _fake_gradient(grad_loss, target, partials, normalizer, HC, V, U, omega, wbar):
    rows, targets, features = _check_gradient(grad_loss, target, partials, normalizer, HC, V, U, omega, wbar)
    return (
        U.new_empty((rows, features)),
        U.new_empty((rows, features)),
        U.new_empty((rows, 2 + targets), dtype=torch.float64),
    )


def _check_step(V, U, U_inv, omega, wbar, C, target, partials, H, HC, P, Z, rate, keep) -> None:
    op = "factored_linear_step"
    rows, targets, features = _checks.factored(op, V, U, target)
    state = {"U": (U, 2), "U_inv": (U_inv, 2), "omega": (omega, 1), "wbar": (wbar, 1), "C": (C, 2)}
    _checks.factored_distinct(op, "V", V)
    for argument, (tensor, dimensions) in state.items():
        _checks.factored_state(op, argument, tensor, U, dimensions)
        _checks.factored_distinct(op, argument, tensor)
    _checks.factored_rows(op, "partials", partials, rows, 2 + targets, torch.float64, U)
    for argument, tensor in (("H", H), ("HC", HC), ("P", P), ("Z", Z)):
        _checks.factored_rows(op, argument, tensor, rows, features, U.dtype, U)
    _checks.factored_rate(op, rate, keep)


@torch.library.register_fake("pyops::factored_linear_step_")
def _fake_step(V, U, U_inv, omega, wbar, C, target, partials, H, HC, P, Z, rate, keep, shift_invariant):
    _check_step(V, U, U_inv, omega, wbar, C, target, partials, H, HC, P, Z, rate, keep)
    return U.new_empty((3,), dtype=torch.float64)


for _name in ("factored_linear", "factored_linear_gradient", "factored_linear_step_"):
    register_no_derivative(_name, "use pyops.nn.FactoredSphericalLinear, whose loss has")


# ---- in torch code -----------------------------------------------------------------------------------------------


def factored_linear(
    h, target, target_weight, weight, V, U, omega, wbar, C, bias_scale, loss, a, b, eps, label_smoothing, ignore_index,
    reduction, safe_mean,
):  # fmt: skip
    _check_forward(
        h, target, target_weight, weight, V, U, omega, wbar, C, bias_scale, loss, a, b, eps, label_smoothing, reduction
    )
    _check_range("factored_linear", target, V.shape[0], ignore_index)
    options = Options(
        reference.SPHERICAL_LOSSES[loss], a, b, eps, label_smoothing, ignore_index, reference.REDUCTIONS[reduction],
        safe_mean,
    )  # fmt: skip
    wide = h.to(U.dtype)
    if bias_scale:
        wide = torch.nn.functional.pad(wide, (0, 1), value=bias_scale)
    targets = factored.targets_of(target, target_weight, weight, ignore_index, U.dtype)
    found = factored.forward(State(V, U, U, omega, wbar, C), wide, targets, options)
    beta, shift, g = found.partials
    partials = torch.cat([beta.unsqueeze(1), shift.unsqueeze(1), g], 1).double()
    loss_dtype = accumulation_dtype(h.dtype)
    return found.loss.to(loss_dtype), partials, found.normalizer.double(), found.h, found.HC, found.P


def _check_gradient_range(op: str, target: Tensor, partials: Tensor, classes: int) -> None:
    shaped = target.reshape(partials[:, 2:].shape)
    bad = (partials[:, 2:] != 0) & ((shaped < 0) | (shaped >= classes))
    if not target.is_cuda and bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        position = [row, column] if target.dim() == 2 else [row]
        rule = f"be in [0, {classes}) where it has a gradient"
        reject(op, "target", rule, f"{int(shaped[row, column])} at position {position}", IndexError)


def factored_linear_gradient(grad_loss, target, partials, normalizer, HC, V, U, omega, wbar):
    _check_gradient(grad_loss, target, partials, normalizer, HC, V, U, omega, wbar)
    _check_gradient_range("factored_linear_gradient", target, partials, V.shape[0])
    scale = (grad_loss.double() / normalizer).expand(partials.shape[0]).unsqueeze(1)
    counts = (partials != 0).any(1, keepdim=True)
    scaled = torch.where(counts, partials * scale, torch.zeros_like(partials))
    index, parts = MicroBatch(target, scaled, HC, HC, HC, HC).read()
    state = State(V, U, U, omega, wbar, U)
    Z = factored.target_part(state, index, parts)
    return factored.input_gradient(state, HC, Partials(*parts), Z), Z, scaled


def factored_linear_step(V, U, U_inv, omega, wbar, C, target, partials, H, HC, P, Z, rate, keep, shift_invariant):
    _check_step(V, U, U_inv, omega, wbar, C, target, partials, H, HC, P, Z, rate, keep)
    _check_gradient_range("factored_linear_step", target, partials, V.shape[0])
    state = State(V, U, U_inv, omega, wbar, C)
    outcome = factored.step(state, MicroBatch(target, partials, H, HC, P, Z), rate, keep, shift_invariant)
    norms = torch.stack([torch.linalg.norm(U.double()), torch.linalg.norm(U_inv.double())])
    return torch.cat([norms.new_tensor([_OUTCOMES[outcome]]), norms])


_dispatch.register(
    "spherical",
    "spherical.factored_linear",
    missing=("cuda", "triton"),
    factored_linear=factored_linear,
    factored_linear_gradient=factored_linear_gradient,
    factored_linear_step_=factored_linear_step,
)
