"""The four spherical losses: what is particular to them. What they share with every function: tests/contract.py."""

from __future__ import annotations

import inspect
import itertools
import math

import numpy
import pytest
import torch
from contract import (
    FLOATING,
    assert_accurate,
    assert_same_bits,
    assert_same_results,
    check_accuracy,
    error_of,
    on_every_host_backend,
    outputs_and_gradients,
    threads,
    ulp,
    upstream_gradient,
)
from spherical.samples import FUNCTIONS_BY_NAME, LOSSES, OWN_DEFAULTS, Call, definition_of, make_call

import pyops
from pyops.spherical import reference

spherical = pytest.mark.parametrize("name", LOSSES)
CPU_LEVELS_AND_OTHERS = pytest.mark.parametrize(
    "backend",
    ["cpu:baseline", "cpu:avx2", "cpu:avx512", "cuda-emulated", "reference", "triton-interpreted"],
    indirect=True,
)
ALL = (*LOSSES, "cross_entropy")


def call_of(logits: torch.Tensor, target: torch.Tensor, **options) -> Call:
    tensors = {name: options.pop(name, None) for name in ("weight", "target_weight")}
    return Call({"logits": logits, "target": target, **tensors}, options)


def gradient_of(name: str, logits: torch.Tensor, target: torch.Tensor, **options) -> torch.Tensor:
    call = call_of(logits, target, **options)
    return outputs_and_gradients(getattr(pyops, name), call, ("logits",))["gradient of logits"]


# ---- formulas ----------------------------------------------------------------------------------------------


@spherical
def test_defaults_are_the_published_ones(name):
    parameters = inspect.signature(getattr(pyops, name)).parameters
    shared = {
        "weight": None,
        "target_weight": None,
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "reduction": "mean",
        "inplace_backward": False,
    }
    for option, default in {**shared, **OWN_DEFAULTS[name]}.items():
        assert parameters[option].default == default
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("variant", FUNCTIONS_BY_NAME["z_loss"].variants)
@spherical
def test_reference_equals_the_definition(name, variant):
    """The package's own reference, which second derivatives and transforms run, in float64."""
    if variant not in FUNCTIONS_BY_NAME[name].variants:
        variant = "none"
    call = make_call(name, variant, torch.float64)
    options = {k: v for k, v in call.options.items() if k != "out_dtype"}
    own = OWN_DEFAULTS[name] | options

    def run(logits, target, weight, target_weight, **_):
        return reference.spherical_loss(logits, target, target_weight, weight, loss=LOSSES[name], **own)

    ours = outputs_and_gradients(run, call, ("logits",))
    expected = outputs_and_gradients(definition_of(name), call, ("logits",))
    for key, value in ours.items():
        assert_accurate(value, value, expected[key], key)


@on_every_host_backend
def test_z_loss_by_hand(backend):
    """Two rows small enough for paper: o = (3, 1, 1, -1) has mean 1 and variance 2."""
    logits, target = torch.tensor([[3.0, 1.0, 1.0, -1.0]] * 2), torch.tensor([0, 3])
    z = math.sqrt(2.0)
    expected = [math.log1p(math.exp(2.0 * (1.5 - z))) / 2, math.log1p(math.exp(2.0 * (1.5 + z))) / 2]
    actual = pyops.z_loss(logits, target, a=2.0, b=1.5, eps=0.0, reduction="none")
    exact = torch.tensor(expected, dtype=torch.float64)
    assert_accurate(actual, actual, exact)


@on_every_host_backend
def test_z_loss_closed_form_of_the_gradient(backend):
    """d loss / d o_k = rho / (D sigma) (1 + z_c z_k) - rho / sigma [k = c]."""
    random = torch.Generator().manual_seed(2)
    logits, target = torch.randn(4, 9, generator=random, dtype=torch.float64), torch.tensor([0, 8, 3, 3])
    a, b = 0.7, 2.0
    mean, sigma = logits.mean(1, keepdim=True), logits.var(1, unbiased=False, keepdim=True).sqrt()
    z = (logits - mean) / sigma
    z_c = z.gather(1, target.unsqueeze(1))
    rho = torch.sigmoid(a * (b - z_c))
    expected = rho / (9 * sigma) * (1 + z_c * z)
    expected.scatter_add_(1, target.unsqueeze(1), -rho / sigma)
    actual = gradient_of("z_loss", logits, target, a=a, b=b, eps=0.0, reduction="sum") / upstream_gradient(
        torch.zeros(())
    )
    assert_accurate(actual, actual, expected)


@on_every_host_backend
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_z_loss_gradient_invariants(dtype, backend):
    """The gradient sums to 0 over classes and is orthogonal to the logits, up to the rounding of its entries."""
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    gradient = gradient_of("z_loss", logits, torch.arange(6), eps=0.0, reduction="none").double()
    rounding = 4 * ulp(dtype, gradient.abs())
    assert (gradient.sum(1).abs() <= rounding.sum(1)).all()
    along = (gradient * logits.double()).sum(1).abs()
    assert (along <= (rounding * logits.double().abs()).sum(1)).all()


@on_every_host_backend
@pytest.mark.parametrize(("factor", "offset"), [(2.0, 0.0), (0.125, 3.0), (1e3, -500.0)])
def test_z_loss_does_not_change_under_shift_and_scale(factor, offset, backend):
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    target = torch.tensor([0, 5, 19, 7, 7])
    for reduction in ("none", "mean"):
        base = pyops.z_loss(logits, target, eps=0.0, reduction=reduction)
        moved = pyops.z_loss(factor * logits + offset, target, eps=0.0, reduction=reduction)
        assert_accurate(moved, moved, base)
    gradient = gradient_of("z_loss", logits, target, eps=0.0)
    moved = gradient_of("z_loss", factor * logits + offset, target, eps=0.0) * factor
    assert_accurate(moved, moved, gradient)


@on_every_host_backend
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
def test_label_smoothing_by_the_exact_rule(smoothing, backend):
    """Targets (1 - s) onehot + s/D: for the Z-loss only a factor on z, for the softmax kinds the mean of all log
    probabilities, for the squared error the distance to the smoothed target."""
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(6), dtype=torch.float64) + 0.3
    target = torch.tensor([0, 6, 2, 2])
    smooth = torch.full((4, 7), smoothing / 7, dtype=torch.float64)
    smooth[torch.arange(4), target] += 1 - smoothing
    mean, sigma = logits.mean(1, keepdim=True), (logits.var(1, unbiased=False, keepdim=True) + 1e-12).sqrt()
    z = ((logits - mean) / sigma).gather(1, target.unsqueeze(1)).squeeze(1)
    taylor, square = 1 + logits + logits**2 / 2, logits**2 + 0.1
    expected = {
        "z_loss": torch.log1p(torch.exp(4 - (1 - smoothing) * z)),
        "taylor_softmax_loss": -(smooth * (taylor / taylor.sum(1, keepdim=True)).log()).sum(1),
        "spherical_softmax_loss": -(smooth * (square / square.sum(1, keepdim=True)).log()).sum(1),
        "mse_onehot_loss": ((logits - smooth) ** 2).sum(1),
    }
    for name, value in expected.items():
        actual = getattr(pyops, name)(logits, target, label_smoothing=smoothing, reduction="none")
        assert_accurate(actual, actual, value, name)


# ---- targets and weights (R11) -----------------------------------------------------------------------------


@pytest.mark.row("R11")
@pytest.mark.parametrize("name", ALL)
@on_every_host_backend
def test_several_targets_add_their_losses(name, backend):
    """A row with K targets has the weighted sum of K single-target losses; duplicates count each time."""
    function = getattr(pyops, name)
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    target = torch.tensor([[1, 1, 4], [0, 8, 8], [3, -100, 3], [-100, -100, 5]])
    own = torch.tensor([[0.5, 2.0, 1.0], [1.0, 0.0, 3.0], [1.5, 7.0, 1.0], [2.0, 1.0, 0.25]], dtype=torch.float64)
    weight = torch.linspace(0.5, 2.0, 9, dtype=torch.float64)
    for options in ({}, {"weight": weight}, {"weight": weight, "label_smoothing": 0.2}):
        together = function(logits, target, target_weight=own, reduction="none", **options)
        single = [own[:, j] * function(logits, target[:, j], reduction="none", **options) for j in range(3)]
        assert_accurate(together, together, sum(single), str(options))
        together = gradient_of(name, logits, target, target_weight=own, reduction="sum", **options)
        apart = [
            gradient_of(name, logits, target[:, j], target_weight=own[:, j], reduction="sum", **options)
            for j in range(3)
        ]
        assert_accurate(together, together, sum(apart), f"gradient, {options}")


@pytest.mark.row("R11")
@pytest.mark.parametrize("name", ALL)
@on_every_host_backend
def test_mean_divides_by_the_weight_that_counts(name, backend):
    """As in torch: by the sum of class weights of rows that are not ignored; for several targets per row by the mean
    class weight of those that count."""
    function = getattr(pyops, name)
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0, 1.5], dtype=torch.float64)
    target = torch.tensor([0, -100, 4, 2, 1])
    rows = function(logits, target, weight=weight, reduction="none")
    mean = function(logits, target, weight=weight)
    assert_accurate(mean, mean, rows.sum() / (1.0 + 3.0 + 0.0 + 2.0))
    several = torch.tensor([[0, 1], [-100, -100], [4, -100], [2, 3], [5, 5]])
    rows = function(logits, several, weight=weight, reduction="none")
    mean = function(logits, several, weight=weight)
    assert_accurate(mean, mean, rows.sum() / (1.5 + 3.0 + 0.25 + 1.5))
    padded = function(logits, several, weight=weight, target_weight=(several >= 0).double())
    assert_same_bits(padded, mean)


@pytest.mark.row("R11")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("filling", [float("nan"), float("inf"), 1.0], ids=str)
@on_every_host_backend
def test_all_rows_ignored(name, filling, backend):
    """Mean NaN as in torch, sum 0, safe mean 0; the gradient exactly 0 whatever the logits hold."""
    function = getattr(pyops, name)
    logits = torch.full((3, 5), filling)
    for target in (torch.full((3,), -100), torch.full((3, 2), -100)):
        assert function(logits, target).isnan()
        assert function(logits, target, reduction="sum") == 0
        assert function(logits, target, safe_mean=True) == 0
        assert not function(logits, target, reduction="none").any()
        for options in ({"reduction": "sum"}, {"safe_mean": True}, {"reduction": "none"}, {}):
            gradient = gradient_of(name, logits, target, **options)
            assert_same_bits(gradient, torch.zeros(3, 5), f"{options}")


@pytest.mark.row("R11")
@pytest.mark.parametrize("name", ALL)
@on_every_host_backend
def test_ignored_rows_may_hold_anything(name, backend):
    """NaN in an ignored row stays out of the loss and out of every gradient."""
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    target = torch.tensor([2, -100, 5, -100])
    clean = call_of(logits, target, reduction="mean")
    dirty_logits = logits.clone()
    dirty_logits[1], dirty_logits[3] = float("nan"), float("inf")
    dirty = outputs_and_gradients(getattr(pyops, name), call_of(dirty_logits, target, reduction="mean"), ("logits",))
    assert_same_results(dirty, outputs_and_gradients(getattr(pyops, name), clean, ("logits",)))
    assert not dirty["gradient of logits"][[1, 3]].any()


@pytest.mark.row("R11")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("backend", ["cpu:baseline", "cpu:avx512", "reference"], indirect=True)
def test_targets_out_of_range(name, dtype, backend):
    """IndexError with value and position, before anything is computed; -100 and any other ignore_index are fine."""
    logits = torch.randn(3, 5)
    for value, shape in itertools.product((-1, 5, -101, 2**40 if dtype == torch.int64 else 2**31 - 1), ((3,), (3, 2))):
        target = torch.zeros(shape, dtype=dtype)
        target[2] = value
        position = "[2]" if len(shape) == 1 else "[2, 0]"
        text = f"pyops::{name}: target must be in [0, 5) or ignore_index -100, got {value} at position {position}"
        for wants in (False, True):
            call = call_of(logits.clone().requires_grad_(wants), target)
            assert error_of(lambda call=call: call(getattr(pyops, name))) == (IndexError, text)
        allowed = call_of(logits, target, ignore_index=value, reduction="none")(getattr(pyops, name))[0]
        assert allowed[2] == 0


@pytest.mark.row("R11")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("backend", ["cpu:baseline", "cpu:avx512", "reference", "triton-interpreted"], indirect=True)
def test_ignore_index_of_any_size(name, backend):
    """An ignore_index outside the range of int32 matches nothing in int32 targets, and is found in int64 ones."""
    function = getattr(pyops, name)
    logits, target = torch.randn(3, 5), torch.tensor([0, 4, 2], dtype=torch.int32)
    plain = function(logits, target, reduction="none")
    for ignore_index in (2**31, 2**40, -(2**40), 2**32 + 4):
        assert_same_bits(function(logits, target, ignore_index=ignore_index, reduction="none"), plain)
        wide = target.long()
        wide[1] = ignore_index
        assert function(logits, wide, ignore_index=ignore_index, reduction="none")[1] == 0


@pytest.mark.row("R11")
@pytest.mark.parametrize("name", ALL)
def test_targets_out_of_range_where_they_do_not_count(name):
    """A target weight of 0 does not excuse an index that is out of range: the check sees indices alone."""
    target = torch.tensor([[0, 9], [1, 0]])
    call = call_of(torch.randn(2, 5), target, target_weight=torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    kind, text = error_of(lambda: call(getattr(pyops, name)))
    assert kind is IndexError
    assert text.endswith("got 9 at position [0, 1]")


# ---- rows of equal logits, one class (R16) -------------------------------------------------------------------


@pytest.mark.row("R16", "R7")
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1000.0])
@on_every_host_backend
def test_z_loss_of_equal_logits(value, dtype, backend):
    """z is 0: the loss is softplus(a b)/a; with eps = 0 the gradient is 0, with eps it is that of the formula."""
    a, b, classes = 2.0, 1.5, 6
    logits, target = torch.full((3, classes), value, dtype=dtype), torch.tensor([0, 5, 2])
    expected = torch.full((3,), math.log1p(math.exp(a * b)) / a, dtype=torch.float64)
    for eps in (0.0, 1e-12, 1e-3):
        loss = pyops.z_loss(logits, target, a=a, b=b, eps=eps, reduction="none")
        assert_accurate(loss, loss, expected, f"eps {eps}")
        gradient = gradient_of("z_loss", logits, target, a=a, b=b, eps=eps, reduction="sum")
        rho = upstream_gradient(torch.zeros(())).item() / (1 + math.exp(-a * b))
        exact = torch.full((3, classes), rho / classes, dtype=torch.float64)
        exact[torch.arange(3), target] -= rho
        exact *= 0 if eps == 0 else eps**-0.5
        assert_accurate(gradient, exact.to(dtype), exact, f"gradient, eps {eps}")


@pytest.mark.row("R16")
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("targets", [1, 3])
@on_every_host_backend
def test_one_class(targets, smoothing, dtype, backend):
    """With D = 1 there is nothing to choose: probabilities are 1, z is 0, and all gradients but the squared error's
    vanish."""
    logits = torch.tensor([[-2.0], [0.0], [0.7]], dtype=dtype)
    target = torch.zeros(3, targets, dtype=torch.int64)
    expected = {
        "z_loss": torch.full((3,), math.log1p(math.exp(4.0)), dtype=torch.float64),
        "taylor_softmax_loss": torch.zeros(3),
        "spherical_softmax_loss": torch.zeros(3),
        "mse_onehot_loss": (logits.double() - 1).square().squeeze(1),
        "cross_entropy": torch.zeros(3),
    }
    for name, value in expected.items():
        loss = getattr(pyops, name)(logits, target, label_smoothing=smoothing, reduction="none")
        assert_accurate(loss, loss, targets * value.double(), name)
        if name != "mse_onehot_loss":
            gradient = gradient_of(name, logits, target, label_smoothing=smoothing, reduction="sum")
            assert_accurate(gradient, gradient, torch.zeros(3, 1, dtype=torch.float64), f"gradient of {name}")


@pytest.mark.row("R16")
@pytest.mark.parametrize("name", ALL)
@on_every_host_backend
def test_two_classes_and_repeated_rows(name, backend):
    random = torch.Generator().manual_seed(10)
    row = torch.randn(1, 2, generator=random)
    call = call_of(row.repeat(6, 1), torch.tensor([0, 1, 0, 1, 0, 1]), reduction="none")
    losses = outputs_and_gradients(getattr(pyops, name), call, ("logits",))["output 0"]
    assert_same_bits(losses, losses[:2].repeat(3))
    check_accuracy(FUNCTIONS_BY_NAME[name], call)


@pytest.mark.row("R7")
@on_every_host_backend
def test_spherical_softmax_without_eps(backend):
    """With eps = 0 a target logit of 0 has infinite loss, with smoothing any logit of 0 has; others are finite."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 2.0], [1.0, 3.0, 2.0]])
    target = torch.tensor([0, 0, 0])
    plain = pyops.spherical_softmax_loss(logits, target, eps=0.0, reduction="none")
    assert plain[0] == float("inf")
    assert_accurate(plain[1:], plain[1:], torch.tensor([math.log(5.0), math.log(14.0)], dtype=torch.float64))
    smooth = pyops.spherical_softmax_loss(logits, target, eps=0.0, label_smoothing=0.1, reduction="none")
    assert smooth.tolist()[:2] == [float("inf")] * 2
    assert smooth[2].isfinite()


# ---- precision (R8) ------------------------------------------------------------------------------------------


@pytest.mark.row("R8")
@spherical
@pytest.mark.parametrize("offset", [1e3, -1e3, 1e4])
@pytest.mark.parametrize("classes", [10, 4097, 50257])
@pytest.mark.parametrize("backend", ["cpu:baseline", "cpu:avx2", "cpu:avx512", "reference"], indirect=True)
def test_offset_of_the_logits_costs_no_accuracy(name, offset, classes, backend):
    """Unit-normal float32 logits far from 0: the loss within 1e-6 of float64, the gradient by the accuracy rule."""
    call = make_call(name, "none", rows=4, classes=classes, offset=offset, seed=classes)
    loss = call(getattr(pyops, name))[0].double()
    exact = call.to(torch.float64)(definition_of(name))[0]
    assert ((loss - exact).abs() <= 1e-6 * exact.abs()).all(), ((loss - exact) / exact).abs().max()
    check_accuracy(FUNCTIONS_BY_NAME[name], call)


@pytest.mark.row("R8")
@pytest.mark.parametrize("drift", ["rising", "falling", "step", "one outlier"])
@spherical
@CPU_LEVELS_AND_OTHERS
def test_mean_that_drifts_along_a_row(name, drift, backend):
    """Blocks of a row with different means: the shift of one block is wrong for the next."""
    classes = 3 * 4096 + 11
    position = torch.linspace(0, 1, classes, dtype=torch.float64)
    row = {
        "rising": 2000 * position,
        "falling": -2000 * position,
        "step": 1000 * (position > 0.4),
        "one outlier": 1e4 * (torch.arange(classes) == 5000),
    }[drift]
    noise = torch.randn(2, classes, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    check_accuracy(
        FUNCTIONS_BY_NAME[name], call_of((row + noise).float(), torch.tensor([17, classes - 1]), reduction="none")
    )


@pytest.mark.row("R7", "R8")
@pytest.mark.parametrize("scale", [1e20, 1e30, 1e-20, 1e-30, 1e-40])
@spherical
@CPU_LEVELS_AND_OTHERS
def test_huge_and_subnormal_logits(name, scale, backend):
    """Squares leave the range of float32; whatever is finite in the formula is finite and accurate."""
    check_accuracy(FUNCTIONS_BY_NAME[name], make_call(name, "none", rows=3, classes=4100, scale=scale))


@pytest.mark.row("R8")
@CPU_LEVELS_AND_OTHERS
def test_margins_of_thousands(backend):
    """a (b - z) reaches thousands: softplus and sigmoid neither overflow nor lose their small side."""
    logits = torch.zeros(2, 10_000)
    logits[:, 0] = 1.0  # z of class 0 is sqrt(9999)
    for a, b in ((30.0, 0.0), (30.0, 200.0), (0.01, 0.0), (1.0, 1e4), (1.0, -1e4)):
        call = call_of(logits, torch.tensor([0, 1]), a=a, b=b, reduction="none")
        check_accuracy(FUNCTIONS_BY_NAME["z_loss"], call, f"{a=} {b=}")


@pytest.mark.row("R8", "R21")
def test_margins_of_thousands_under_transforms():
    """The composite code that transforms and second derivatives run is as safe as the kernels."""
    logits = torch.zeros(2, 10_000)
    logits[:, 0] = 1.0
    target = torch.tensor([0, 1])
    for a, b in ((30.0, 200.0), (1.0, 1e4)):
        call = call_of(logits, target, a=a, b=b, reduction="none")
        plain = outputs_and_gradients(definition_of("z_loss"), call, ("logits",))
        exact = outputs_and_gradients(definition_of("z_loss"), call.to(torch.float64), ("logits",))
        output, pullback = torch.func.vjp(lambda value, call=call: call.replace(logits=value)(pyops.z_loss)[0], logits)
        assert_accurate(output, plain["output 0"], exact["output 0"], f"{a=} {b=}")
        gradient = pullback(upstream_gradient(output))[0]
        assert_accurate(gradient, plain["gradient of logits"], exact["gradient of logits"], f"{a=} {b=}, gradient")


@pytest.mark.row("R8")
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-5])
@CPU_LEVELS_AND_OTHERS
def test_squared_error_close_to_its_minimum(noise, backend):
    """A converged model: logits near the one-hot target, where q - 2 o_c + 1 cancels."""
    target = torch.arange(8)
    logits = torch.nn.functional.one_hot(target, 40) + noise * torch.randn(8, 40)
    check_accuracy(FUNCTIONS_BY_NAME["mse_onehot_loss"], call_of(logits.float(), target, reduction="none"))


@pytest.mark.row("R8")
@pytest.mark.parametrize("backend", ["cpu:baseline", "cpu:avx2", "cpu:avx512", "reference"], indirect=True)
def test_gradients_are_rounded_to_nearest_even(backend):
    """The squared error of a row of mean 0 has the gradient 2 o g exactly, which lies halfway between two numbers of
    the dtype for half of these logits."""
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        half = torch.arange(1, 129).double().to(dtype)
        logits = torch.cat([half, -half]).repeat(2).unsqueeze(0).requires_grad_()
        target = torch.tensor([3])
        upstream = 1 + 2.0**-bits
        loss = pyops.mse_onehot_loss(logits, target, reduction="sum", out_dtype=torch.float64)
        loss.backward(torch.tensor(upstream, dtype=torch.float64))
        exact = 2 * logits.detach().double()
        exact[0, 3] -= 2
        assert_same_bits(logits.grad, (exact * upstream).float().to(dtype), str(dtype))


@pytest.mark.row("R44")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("backend", ["cpu:baseline", "cpu:avx2", "cpu:avx512"], indirect=True)
def test_one_long_row_shared_by_threads(name, backend, count_cases):
    """D = 3 * 32768 + 5: targets in every stretch and at its borders, right and the same bits on 1 to 5 threads."""
    classes = 3 * 32768 + 5
    borders = torch.tensor([[0, 32767, 32768, 65535, 65536, 98303, 98304, classes - 1]])
    logits = torch.randn(1, classes, generator=torch.Generator().manual_seed(12))
    call = call_of(logits, borders, reduction="sum", label_smoothing=0.1)
    with threads(1):
        expected = outputs_and_gradients(getattr(pyops, name), call, ("logits",))
    for number in (2, 3, 5):
        with threads(number):
            assert_same_results(outputs_and_gradients(getattr(pyops, name), call, ("logits",)), expected)
    check_accuracy(FUNCTIONS_BY_NAME[name], call)
    count_cases(4)


# ---- more than 2^31 elements (R5) ------------------------------------------------------------------------------


@pytest.mark.row("R5")
@pytest.mark.parametrize("name", ALL)
def test_rows_more_than_two_to_the_31_elements_apart(name, tmp_path):
    """Logits, targets and their weights lie more than 2^31 elements into files that are nearly all hole."""
    apart, classes = 2**31 + 64, 70
    random = torch.Generator().manual_seed(13)

    def far(values: torch.Tensor, file: str) -> torch.Tensor:
        elements = apart + values.shape[1]
        whole = torch.from_file(str(tmp_path / file), shared=True, size=elements, dtype=values.dtype)
        view = whole.as_strided(values.shape, (apart, 1))
        view.copy_(values)
        return view

    logits = torch.randn(2, classes, generator=random).bfloat16()
    target = torch.tensor([[3, 69], [69, 0]])
    own = torch.tensor([[1.0, 2.0], [0.5, 1.0]]).bfloat16()
    call = call_of(far(logits, "logits"), far(target, "target"), target_weight=far(own, "weight"), reduction="none")
    expected = outputs_and_gradients(getattr(pyops, name), call.map(torch.Tensor.contiguous), ("logits",))
    assert_same_results(outputs_and_gradients(getattr(pyops, name), call, ("logits",)), expected)
    base = call.tensors["logits"].detach().requires_grad_()
    output = call.replace(logits=base.view_as(base), inplace_backward=True)(getattr(pyops, name))[0]
    output.backward(upstream_gradient(output))
    assert_same_bits(call.tensors["logits"].contiguous(), expected["gradient of logits"], "written in place")


@pytest.mark.row("R5")
@pytest.mark.parametrize("name", ["z_loss", "cross_entropy"])
def test_more_than_two_to_the_31_logits_in_one_memory(name):
    """Rows that share memory: 2^31 elements to go through without having them."""
    classes, rows = 2**17, 2**14 + 3
    logits = torch.randn(1, classes, generator=torch.Generator().manual_seed(14)).bfloat16()
    target = torch.arange(rows) % 5
    wanted = [0, 1, rows // 2, rows - 2, rows - 1]
    losses = getattr(pyops, name)(logits.expand(rows, classes), target, reduction="none")
    few = getattr(pyops, name)(logits.expand(len(wanted), classes), target[wanted], reduction="none")
    assert_same_bits(losses[wanted], few)


@pytest.mark.slow
@pytest.mark.row("R5")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_more_than_two_to_the_31_logits_and_gradients(name, inplace):
    """4 GiB of logits and, out of place, as much of gradient; first, last and boundary rows."""
    classes, rows = 2**16 + 3, 2**15 + 1
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16)
    wanted = [0, 1, (2**31 - 1) // classes, (2**31 - 1) // classes + 1, rows - 2, rows - 1]
    for row in wanted:
        logits[row] = torch.randn(classes, generator=torch.Generator().manual_seed(row)).bfloat16()
    target = (torch.arange(rows) * 7919) % classes
    few = gradient_of(name, logits[wanted], target[wanted], reduction="sum")
    leaf = logits.requires_grad_()
    loss = getattr(pyops, name)(leaf.view_as(leaf), target, reduction="sum", inplace_backward=inplace)
    loss.backward(upstream_gradient(loss.detach()))
    assert_same_bits(leaf.grad[wanted], few)
    assert leaf.grad.count_nonzero() > 0


# ---- writing the gradient over the logits ----------------------------------------------------------------------


def in_place_gradient(name: str, logits: torch.Tensor, call: Call) -> torch.Tensor:
    """The gradient as autograd sees it, from a backward that may overwrite `logits`."""
    leaf = logits.detach().requires_grad_()
    output = call.replace(logits=leaf.view_as(leaf), inplace_backward=True)(getattr(pyops, name))[0]
    output.backward(upstream_gradient(output))
    return leaf.grad


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("variant", ["mean", "none", "full", "safe", "weighted"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@on_every_host_backend
def test_in_place_backward_equals_out_of_place(name, variant, dtype, backend):
    call = make_call(name, variant, dtype)
    expected = outputs_and_gradients(getattr(pyops, name), call, ("logits",))["gradient of logits"]
    logits = call.tensors["logits"].clone()
    assert_same_bits(in_place_gradient(name, logits, call), expected, "gradient")
    assert_same_bits(logits, expected, "memory of the logits")


@pytest.mark.row("R1")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("backend", ["cpu:baseline", "cpu:avx512", "reference", "triton-interpreted"], indirect=True)
def test_in_place_backward_of_strided_logits(name, backend):
    """Transposed, padded and every-second views are written where they lie, and nothing else is."""
    call = make_call(name, "full", rows=4, classes=9)
    expected = outputs_and_gradients(getattr(pyops, name), call, ("logits",))["gradient of logits"]
    for make in (
        lambda: torch.full((4, 20), 7.0)[:, 5:14],
        lambda: torch.full((9, 4), 7.0).t(),
        lambda: torch.full((4, 18), 7.0)[:, ::2],
        lambda: torch.full((8, 9), 7.0)[1::2],
    ):
        view = make()
        view.copy_(call.tensors["logits"])
        whole = view.as_strided((view.untyped_storage().nbytes() // 4,), (1,), 0)
        outside = torch.ones_like(whole, dtype=torch.bool)
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        assert_same_bits(in_place_gradient(name, view, call), expected)
        assert_same_bits(view.contiguous(), expected, "memory of the logits")
        assert (whole[outside] == 7.0).all(), "wrote outside of the view"


@pytest.mark.parametrize("name", ALL)
def test_in_place_backward_on_a_leaf_or_overlapping_rows_is_an_error(name):
    function, target = getattr(pyops, name), torch.tensor([0, 1, 2])
    leaf = torch.randn(3, 5, requires_grad=True)
    kind, text = error_of(lambda: function(leaf, target, inplace_backward=True))
    assert kind is RuntimeError
    assert text.startswith(f"pyops::{name}: logits must not be a leaf with inplace_backward=True")
    assert not function(leaf.detach(), target, inplace_backward=True).requires_grad
    line = torch.randn(20, requires_grad=True)
    for view in (line.view_as(line).as_strided((3, 5), (2, 1)), line[:5].view(1, 5).expand(3, 5)):
        loss = function(view, target, inplace_backward=True)
        kind, text = error_of(loss.backward)
        assert kind is RuntimeError
        assert "logits must not overlap in memory" in text, text


@pytest.mark.row("R18")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("use", ["operation that saved its result", "another loss", "backward twice"])
def test_in_place_backward_does_not_corrupt_what_others_saved(name, use):
    """Whoever else needs the logits gets an error from the version counter or the right gradient, never a wrong one."""
    target = torch.tensor([0, 1, 2, 3])
    values = torch.randn(4, 5, generator=torch.Generator().manual_seed(15))

    def gradient(inplace: bool) -> torch.Tensor:
        leaf = values.clone().requires_grad_()
        logits = leaf.exp() if use == "operation that saved its result" else leaf * 1
        other = (logits * logits).sum() if use == "another loss" else 0
        loss = getattr(pyops, name)(logits, target, inplace_backward=inplace) + other
        if use == "backward twice":
            loss.backward(retain_graph=True)
        loss.backward()
        return leaf.grad

    expected = gradient(False)
    try:
        actual = gradient(True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017  (either outcome is right)
    else:
        assert_accurate(actual, expected, expected.double())


@pytest.mark.parametrize("name", ALL)
def test_in_place_backward_with_create_graph_leaves_the_logits(name):
    """A gradient that will be differentiated again is computed out of place."""
    call = make_call(name, "full", torch.float64)
    leaf = call.tensors["logits"].clone().requires_grad_()
    logits = leaf * 1
    loss = call.replace(logits=logits, inplace_backward=True)(getattr(pyops, name))[0]
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert_same_bits(logits.detach(), call.tensors["logits"])
    second = torch.autograd.grad(gradient.square().sum(), leaf)[0]
    other = call.tensors["logits"].clone().requires_grad_()
    expected = torch.autograd.grad(call.replace(logits=other)(definition_of(name))[0], other, create_graph=True)[0]
    assert_accurate(second, second, torch.autograd.grad(expected.square().sum(), other)[0])


# ---- what the operator returns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("variant", ["mean", "sum", "full", "safe", "weighted"])
@on_every_host_backend
def test_normalizer_is_what_the_mean_divides_by(name, variant, backend):
    """loss(sum) / normalizer = loss(mean), and the statistics of ignored rows are 0."""
    from spherical.samples import forward_operator, operator_arguments

    call = make_call(name, variant)
    outputs = forward_operator(name)(**operator_arguments(name, call))
    statistics, normalizer = outputs[-2:]
    total = call.replace(reduction="sum", out_dtype=torch.float64)(getattr(pyops, name))[0]
    loss = call.replace(out_dtype=torch.float64)(getattr(pyops, name))[0]
    divided = total / normalizer.flatten()[0]
    assert_accurate(loss, divided, divided, working=torch.float32)
    target = call.tensors["target"]
    ignored = (target == -100).reshape(target.shape[0], -1).all(1)
    assert not statistics[ignored].any()
    assert statistics[~ignored].isfinite().all()


@pytest.mark.row("R6", "R11")
@CPU_LEVELS_AND_OTHERS
def test_a_class_of_weight_zero_adds_nothing_whatever_its_logit(backend):
    """Its loss is infinite here: times 0 it must not be NaN, neither in the loss nor in the gradient."""
    logits = torch.tensor([[0.5, 0.0, 2.0, -1.0, 0.25], [0.0, 1.0, 0.0, 3.0, 0.5]])
    weight = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0])
    both = {"logits": logits, "target": torch.tensor([[1, 3], [3, 1]]), "weight": weight, "target_weight": None}
    alone = {**both, "target": torch.tensor([3, 3])}
    results = [
        outputs_and_gradients(
            pyops.spherical_softmax_loss, Call(tensors, {"eps": 0.0, "reduction": "sum"}), ("logits",)
        )
        for tensors in (both, alone)
    ]
    logits[1, 1] = 0.0
    both["logits"] = alone["logits"] = logits
    results += [
        outputs_and_gradients(
            pyops.spherical_softmax_loss, Call(tensors, {"eps": 0.0, "reduction": "sum"}), ("logits",)
        )
        for tensors in (both, alone)
    ]
    for together, single in (results[:2], results[2:]):
        assert together["output 0"].isfinite()
        for name, value in together.items():
            torch.testing.assert_close(value, single[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.row("R8")
@CPU_LEVELS_AND_OTHERS
def test_an_offset_does_not_reach_the_small_gradients(backend):
    """Logits around 1e4 in float32, whose mean has no float32 neighbour closer than 5e-4: the gradients of the other
    classes, far smaller than that of the target, are still right to five digits of the largest of them."""
    logits = (1e4 + torch.randn(4, 300, generator=torch.Generator().manual_seed(3))).float()
    target = torch.tensor([0, 7, 150, 299])
    call = call_of(logits, target, reduction="sum")
    ours = outputs_and_gradients(pyops.z_loss, call, ("logits",))["gradient of logits"].double()
    exact = outputs_and_gradients(definition_of("z_loss"), call.to(torch.float64), ("logits",))["gradient of logits"]
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, target.unsqueeze(1), False)
    error = (ours - exact).abs()[others].max() / exact[others].abs().max()
    assert error < 1e-5, error


@pytest.mark.row("R6")
@on_every_host_backend
@pytest.mark.parametrize("places", [(0, 1), (0, -1), (-1, 0)], ids=["together", "far apart", "the other way round"])
def test_both_infinities_in_a_row(places, backend):
    """The squared error is infinite and not NaN, whichever parts of a row are merged; so are its gradients there."""
    logits = torch.randn(1, 9000, generator=torch.Generator().manual_seed(8))
    logits[0, places[0]], logits[0, places[1]] = float("inf"), -float("inf")
    leaf = logits.requires_grad_()
    loss = pyops.mse_onehot_loss(leaf, torch.tensor([2]))
    loss.backward()
    assert loss == float("inf")
    assert (leaf.grad[0, places[0]], leaf.grad[0, places[1]]) == (float("inf"), -float("inf"))
    assert leaf.grad.isfinite().sum() == 8998


def by_long_double(loss: str, logits: torch.Tensor, target: torch.Tensor, eps: float, smoothing: float) -> torch.Tensor:
    """The gradient of the summed loss, where squares of the logits overflow."""
    o = logits.double().numpy().astype(numpy.longdouble)
    u, e = (1 + o, 1) if loss == "taylor_softmax" else (o, eps)
    half = 2 if loss == "taylor_softmax" else 1
    n = (u * u + e) / half
    share = numpy.full(o.shape, smoothing / o.shape[1], numpy.longdouble)
    share[numpy.arange(len(o)), target.numpy()] += 1 - numpy.longdouble(smoothing)
    gradient = 2 * u / half / n.sum(1, keepdims=True) - share * 2 * u / (u * u + e)
    return torch.from_numpy(gradient.astype(numpy.float64))


@pytest.mark.row("R7")
@on_every_host_backend
@pytest.mark.parametrize("loss", ["taylor_softmax", "spherical_softmax"])
def test_smoothing_with_a_logit_whose_square_overflows(loss, backend):
    """Beside ordinary ones, as the target and not: d log n(o) / d o is 2 / o there and not that elsewhere."""
    logits = torch.randn(3, 37, generator=torch.Generator().manual_seed(9))
    logits[:, 5] = 3e25
    logits[2, 7] = -3e25
    target = torch.tensor([5, 11, 7])
    leaf = logits.requires_grad_()
    options = {"eps": 0.3} if loss == "spherical_softmax" else {}
    function = getattr(pyops, f"{loss}_loss")
    function(leaf, target, label_smoothing=0.25, reduction="sum", **options).backward()
    exact = by_long_double(loss, leaf.detach(), target, 0.3, 0.25)
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item())


@pytest.mark.row("R4")
@pytest.mark.parametrize("backend", ["cpu:baseline", "cpu:avx2", "cpu:avx512"], indirect=True)
@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_of_few_logits_are_right_to_the_last_digit(loss, classes, backend):
    """Their terms cancel: in float32 the gradient of z_loss at three logits had errors of 1.7e-5 of the largest."""
    random = torch.Generator().manual_seed(10)
    logits = torch.randn(400, classes, generator=random)
    target = torch.randint(0, classes, (400,), generator=random)
    gradients = []
    for values in (logits, logits.double()):
        leaf = values.requires_grad_()
        getattr(pyops, loss)(leaf, target, reduction="sum").backward()
        gradients.append(leaf.grad.double())
    error = (gradients[0] - gradients[1]).abs().amax(1)
    assert (error <= 1e-7 * gradients[1].abs().amax(1)).all()
