"""The operators of the factored layer: C++ at every instruction-set level and torch code against the same in float64,
whatever the shape; what a step must leave alone; threads."""

from __future__ import annotations

import contract
import pytest
import torch
from spherical.factored_samples import make_forward, make_gradient, make_step
from torch import Tensor

LEVELS = [*(f"cpu:{level}" for level in contract.LEVELS), "reference"]
on_every_level = pytest.mark.parametrize("backend", LEVELS, indirect=True)
STATE = ("V", "U", "U_inv", "omega", "wbar", "C")

# rows, features, classes, targets per row: fewer rows than features, as many, more; around tiles, panels and blocks
SHAPES = {
    "one row": (1, 3, 5, 1),
    "few": (7, 33, 50, 2),
    "as many rows as features": (24, 24, 40, 1),
    "one row more": (25, 24, 9, 3),
    "more rows than features": (100, 17, 30, 4),
    "several panels": (70, 97, 300, 1),
    "a depth of two blocks": (40, 300, 60, 1),
    "rows of two blocks": (300, 61, 80, 2),
    "columns of two blocks": (3, 1050, 12, 1),
}


def run(name: str, arguments: dict) -> tuple[Tensor, ...]:
    with torch.no_grad():
        result = getattr(torch.ops.pyops, name)(*contract.fresh(arguments).values())
    return result if isinstance(result, tuple) else (result,)


def stepped(arguments: dict) -> dict[str, Tensor]:
    """The state after a step, and its outcome."""
    changed = contract.fresh(arguments)
    with torch.no_grad():
        outcome = torch.ops.pyops.factored_linear_step_(*changed.values())
    return {name: changed[name] for name in STATE} | {"outcome": outcome}


def doubled(arguments: dict) -> dict:
    return {name: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for name, a in arguments.items()}


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)) if exact.numel() else 0.0


MAKE = {"factored_linear": make_forward, "factored_linear_gradient": make_gradient}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("variant", ["full", "mse bias"])
@on_every_level
def test_errors_are_those_of_torch(backend, shape, dtype, variant):
    """Against the torch code in float64: at most twice the error of the torch code in the same dtype, of which some
    roundings of the largest number are let pass."""
    import pyops

    sizes = dict(zip(("rows", "features", "classes", "targets"), shape, strict=True))
    slack = (64 + sizes["features"] / 4) * torch.finfo(dtype).eps
    for name in (*MAKE, "step"):
        arguments = (MAKE.get(name) or make_step)(variant, dtype, **sizes)
        if name == "step":
            arguments |= {"rate": 0.01, "keep": 0.99}
        call = stepped if name == "step" else lambda a, name=name: dict(enumerate(run(name, a)))
        actual = call(arguments)
        with pyops.use_backend("reference"):
            exact, plain = call(doubled(arguments)), call(arguments)
        for key, value in actual.items():
            assert error(value, exact[key]) <= 2 * error(plain[key], exact[key]) + slack, f"{name}, {key}"


@pytest.mark.parametrize("shape", [(20, 30, 40, 2), (50, 30, 40, 2)], ids=["rows", "features"])
@on_every_level
def test_what_is_not_finite_changes_nothing(backend, shape):
    sizes = dict(zip(("rows", "features", "classes", "targets"), shape, strict=True))
    good = make_step("full", torch.float64, **sizes)
    for name in ("partials", "H", "Z"):
        bad = contract.fresh(good)
        bad[name][3, 1] = float("nan")
        after = stepped(bad)
        assert after["outcome"][0] == 2, name
        for part in STATE:
            assert torch.equal(after[part], good[part]), f"{name}: {part}"


@pytest.mark.parametrize("features", [4, 1])
@on_every_level
def test_a_singular_step_changes_nothing(backend, features):
    """One row h with beta = 1 / (rate |h|^2): I - rate H^T B H annihilates it."""
    arguments = make_step("mse", torch.float64, rows=1, features=features, targets=1)
    arguments["partials"][0, 0] = 1 / (arguments["rate"] * float(arguments["H"].square().sum()))
    after = stepped(arguments)
    assert after["outcome"][0] == 1
    for part in STATE:
        assert torch.equal(after[part], arguments[part]), part


@pytest.mark.parametrize("shape", [(90, 130, 200, 2), (260, 130, 200, 1)], ids=["rows", "features"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_threads_do_not_change_a_bit(shape, dtype):
    sizes = dict(zip(("rows", "features", "classes", "targets"), shape, strict=True))
    step = make_step("full", dtype, **sizes)
    calls = {name: make("full", dtype, **sizes) for name, make in MAKE.items()}
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append([*(t for name, a in calls.items() for t in run(name, a)), *stepped(step).values()])
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            assert torch.equal(left, right)


def test_a_step_moves_only_rows_of_targets_and_keeps_symmetry():
    arguments = make_step("full", torch.float32, rows=9, features=20, classes=500, targets=3)
    arguments["partials"][4, 2:] = 0
    after = stepped(arguments)
    moved = (after["V"] != arguments["V"]).any(1).nonzero().flatten().tolist()
    counts = arguments["partials"][:, 2:] != 0
    assert moved == sorted(set(arguments["target"][counts].tolist()))
    assert torch.equal(after["C"], after["C"].T)


def test_memory_of_unusual_size_is_given_back():
    """A step of many rows, and small ones after it, in a thread whose workspace has grown."""
    small = make_step("full", torch.float64)
    expected = stepped(small)
    stepped(make_step("full", torch.float64, rows=6000, features=600, classes=5, targets=1))
    for name, value in stepped(small).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", ["cuda", "triton"])
def test_a_backend_without_kernels_is_refused(kind):
    import pyops

    with pyops.use_backend(kind), pytest.raises(RuntimeError, match=f"the op has no {kind} kernel"):
        run("factored_linear", make_forward("mean"))
