"""Softmax cross-entropy with its regulariser: what is particular to it. The rest: tests/contract.py."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from contract import (
    FLOATING,
    assert_accurate,
    assert_same_bits,
    assert_same_specials,
    check_accuracy,
    on_every_host_backend,
    outputs_and_gradients,
    upstream_gradient,
)
from spherical.samples import FUNCTIONS_BY_NAME, Call, make_call

import pyops
from pyops.spherical import reference

ALL = FUNCTIONS_BY_NAME["cross_entropy"]
INFINITY = float("inf")
CPU = pytest.mark.parametrize("backend", ["cpu:baseline", "cpu:avx2", "cpu:avx512", "reference"], indirect=True)


def call_of(logits: torch.Tensor, target: torch.Tensor, **options) -> Call:
    tensors = {name: options.pop(name, None) for name in ("weight", "target_weight")}
    return Call({"logits": logits, "target": target, **tensors}, options)


COMBINATIONS = list(itertools.product((False, True), (0.0, 0.1), (-100, 3, -1), ("none", "mean", "sum")))


@pytest.mark.row("R11")
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@on_every_host_backend
def test_equals_torch_in_every_combination(dtype, backend, count_cases):
    """Value and gradient against torch.nn.functional.cross_entropy: class weight x label smoothing x ignore_index x
    reduction, with int64 and int32 targets in turn."""
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 11, generator=random, dtype=torch.float64).to(dtype)
    weight = torch.rand(11, generator=random).to(dtype)
    for number, (weighted, smoothing, ignore_index, reduction) in enumerate(COMBINATIONS):
        narrow = bool(number % 2)
        target = torch.tensor([0, 3, 10, ignore_index, 3, 5, 7])
        options = {"label_smoothing": smoothing, "ignore_index": ignore_index, "reduction": reduction}
        call = call_of(logits, target, weight=weight if weighted else None, **options)
        what = f"{weighted=} {options} {narrow=}"
        ours = outputs_and_gradients(
            pyops.cross_entropy, call.replace(target=target.int() if narrow else target), ("logits",)
        )
        working = call if dtype in (torch.float32, torch.float64) else call.to(torch.float32)
        plain = outputs_and_gradients(torch_cross_entropy, working, ("logits",))
        exact = outputs_and_gradients(torch_cross_entropy, call.to(torch.float64), ("logits",))
        for name, value in ours.items():
            assert_accurate(value, plain[name].to(value.dtype), exact[name], f"{what} {name}")
    count_cases(len(COMBINATIONS))


def torch_cross_entropy(logits, target, weight, target_weight, **options) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, target, weight, **options)


@pytest.mark.parametrize("variant", ALL.variants)
def test_reference_equals_the_definition(variant):
    """The package's own reference, which second derivatives and transforms run, in float64."""
    call = make_call("cross_entropy", variant, torch.float64)
    options = {k: v for k, v in call.options.items() if k not in ("out_dtype", "return_z_loss")}

    def run(logits, target, weight, target_weight, **_):
        loss, z_term = reference.cross_entropy(logits, target, target_weight, weight, **options)
        return (loss, z_term.detach()) if call.options.get("return_z_loss") else loss

    ours = outputs_and_gradients(run, call, ("logits",))
    expected = outputs_and_gradients(ALL.definition, call, ("logits",))
    for name, value in ours.items():
        assert_accurate(value, value, expected[name], name)


# ---- the regulariser ---------------------------------------------------------------------------------------


@on_every_host_backend
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_regulariser_is_returned_separately(reduction, backend):
    """loss = cross-entropy + scale lse^2; the second output is that term, without a gradient of its own. Its mean is
    over rows that count, not over class weights."""
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    target, weight = torch.tensor([0, -100, 3, 7, 3]), torch.linspace(0.5, 3, 8, dtype=torch.float64)
    lse = torch.where(target == -100, 0, logits.logsumexp(1).square() * 0.03)
    expected = {"none": lse, "mean": lse.sum() / 4, "sum": lse.sum()}[reduction]
    options = {"weight": weight, "reduction": reduction}
    loss, z_term = pyops.cross_entropy(logits, target, lse_square_scale=0.03, return_z_loss=True, **options)
    assert_accurate(z_term, z_term, expected, "term")
    plain = torch.nn.functional.cross_entropy(logits, target, **options)
    assert_accurate(loss, loss, plain + expected, "loss")
    alone = pyops.cross_entropy(logits, target, lse_square_scale=0.03, **options)
    assert_same_bits(alone, loss)
    leaf = logits.clone().requires_grad_()
    loss, z_term = pyops.cross_entropy(leaf, target, lse_square_scale=0.03, return_z_loss=True, **options)
    assert loss.requires_grad
    assert not z_term.requires_grad


@on_every_host_backend
def test_regulariser_of_scale_zero_is_nothing(backend):
    """Not added: logits whose lse^2 overflows have the plain loss; the term is 0."""
    logits, target = torch.tensor([[3e38, 1e38, 0.0], [1.0, 2.0, 3.0]]), torch.tensor([0, 2])
    loss, z_term = pyops.cross_entropy(logits, target, return_z_loss=True, reduction="none")
    assert_accurate(loss, loss, torch.nn.functional.cross_entropy(logits.double(), target, reduction="none"))
    assert_same_bits(z_term, torch.zeros(2))
    for wants in (False, True):
        plain = pyops.cross_entropy(logits.requires_grad_(wants), target, reduction="none")
        assert_same_bits(plain.detach(), loss)


@on_every_host_backend
def test_regulariser_gradient_by_hand(backend):
    """(1 + 2 scale lse) softmax - onehot."""
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    target, scale = torch.tensor([0, 5, 2]), 0.2
    expected = (1 + 2 * scale * logits.logsumexp(1, keepdim=True)) * logits.softmax(1)
    expected[torch.arange(3), target] -= 1
    call = call_of(logits, target, lse_square_scale=scale, reduction="sum")
    actual = outputs_and_gradients(pyops.cross_entropy, call, ("logits",))["gradient of logits"]
    assert_accurate(actual, actual, expected * upstream_gradient(torch.zeros(())))


def test_regulariser_is_detached_under_transforms_and_compile():
    """d loss / d logits does not change with return_z_loss, whichever path computes it."""
    logits, target = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 5, 2])

    def both(value: torch.Tensor) -> torch.Tensor:
        loss, z_term = pyops.cross_entropy(value, target, lse_square_scale=0.1, return_z_loss=True)
        return loss + 3 * z_term

    leaf = logits.clone().requires_grad_()
    expected = torch.autograd.grad(both(leaf), leaf)[0]
    assert_accurate(torch.func.grad(both)(logits), expected, expected, "torch.func")
    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert_accurate(torch.autograd.grad(compiled(leaf), leaf)[0], expected, expected, "compile")


# ---- masked classes and extremes -------------------------------------------------------------------------------


@pytest.mark.row("R6")
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("classes", [5, 70, 4100])
@on_every_host_backend
def test_minus_infinity_masks_a_class(classes, dtype, backend):
    """A class of -inf has probability and gradient 0; as a target it has infinite loss; a row of nothing else is NaN.
    All as in torch."""
    if backend == "triton-interpreted" and classes > 100:
        classes = 130
    logits = torch.randn(5, classes, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    logits[0, 1] = logits[1, 2] = -INFINITY
    logits[2, : classes - 1] = -INFINITY
    logits[3, 1:] = -INFINITY
    logits[4, :] = -INFINITY
    target = torch.tensor([0, 2, classes - 1, 0, 0])
    for smoothing in (0.0, 0.1):
        call = call_of(logits, target, reduction="none", label_smoothing=smoothing)
        ours = outputs_and_gradients(pyops.cross_entropy, call, ("logits",))
        exact = outputs_and_gradients(torch_cross_entropy, call.to(torch.float64), ("logits",))
        plain = outputs_and_gradients(
            torch_cross_entropy, call.to(torch.float32 if dtype.itemsize == 2 else dtype), ("logits",)
        )
        if smoothing:
            assert_same_specials(ours["output 0"], exact["output 0"], "loss")
            continue
        for name, value in ours.items():
            assert_accurate(value, plain[name].to(value.dtype), exact[name], name)


@pytest.mark.row("R6")
@CPU
def test_masked_stretches_of_a_long_row(backend):
    """Whole blocks of -inf before, between and after finite ones; the shift has nothing to go by at first."""
    classes = 5 * 4096 + 3
    for finite in ([classes - 1], [4096], [4095, 4096], [0, classes - 1], list(range(9000, 9100))):
        logits = torch.full((1, classes), -INFINITY)
        logits[0, finite] = torch.randn(len(finite)) - 50
        check_accuracy(ALL, call_of(logits, torch.tensor([finite[0]]), reduction="none"), f"{finite[:3]}")


@pytest.mark.row("R8")
@pytest.mark.parametrize("step", [1.0, 20.0, 59.0, 61.0, 80.0, 100.0, -61.0, 1e4, 1e30])
@CPU
def test_maximum_that_moves_along_a_row(step, backend):
    """Each block of 4096 lies higher (or lower) than the one before: by less and by more than the headroom that the
    running shift has before its exponentials overflow."""
    classes = 4 * 4096 + 5
    block = torch.arange(classes) // 4096
    noise = torch.randn(2, classes, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    logits = (noise + step * block).float()
    check_accuracy(ALL, call_of(logits, torch.tensor([0, classes - 1]), reduction="none", label_smoothing=0.1))
    check_accuracy(ALL, call_of(logits, torch.tensor([0, classes - 1]), reduction="none", lse_square_scale=1e-4))


@pytest.mark.row("R8")
@pytest.mark.parametrize("offset", [1e3, -1e3, 1e4, -1e4])
@pytest.mark.parametrize("classes", [10, 4097, 50257])
@CPU
def test_offset_of_the_logits_costs_no_accuracy(offset, classes, backend):
    """Unit-normal float32 logits far from 0, with and without smoothing and weights."""
    for variant in ("none", "weighted", "all"):
        call = make_call("cross_entropy", variant, rows=4, classes=classes, offset=offset, seed=classes)
        if variant == "all":  # the regulariser is of the order of the offset squared: not the loss to look at here
            call = call.replace(lse_square_scale=0.0)
        check_accuracy(ALL, call, variant)


@pytest.mark.row("R7", "R8")
@pytest.mark.parametrize("scale", [1e20, 1e30, 1e38, 1e-20, 1e-40])
@CPU
def test_huge_and_subnormal_logits(scale, backend):
    check_accuracy(ALL, make_call("cross_entropy", "none", rows=3, classes=4100, scale=scale))


@pytest.mark.row("R8")
@CPU
def test_confident_rows(backend):
    """lse - o_c cancels: the loss of a confident row is tiny, the others' is large."""
    for gap in (5.0, 20.0, 40.0, 87.0, 100.0):
        logits = torch.zeros(2, 33)
        logits[:, 4] = gap
        check_accuracy(ALL, call_of(logits, torch.tensor([4, 5]), reduction="none"), f"gap {gap}")


@pytest.mark.row("R7")
@CPU
def test_equal_logits(backend):
    for value, dtype in itertools.product((0.0, -7.0, 1e4), FLOATING):
        logits, target = torch.full((2, 50), value, dtype=dtype), torch.tensor([0, 49])
        loss = pyops.cross_entropy(logits, target, reduction="none")
        assert_accurate(loss, loss, torch.full((2,), math.log(50), dtype=torch.float64), f"{value} {dtype}")
        check_accuracy(ALL, call_of(logits, target), f"{value} {dtype}")


@on_every_host_backend
@pytest.mark.parametrize("high", [2.5e38, INFINITY], ids=["finite", "infinite"])
def test_a_rise_that_overflows(high, backend):
    """Late in a long row, from logits so low that the difference is infinite: the softmax is 1 there; of an infinite
    logit it is NaN."""
    logits = torch.full((1, 9000), -2.5e38)
    logits[0, 8500] = high
    leaf = logits.requires_grad_()
    loss = pyops.cross_entropy(leaf, torch.tensor([8500]))
    loss.backward()
    if high == INFINITY:
        assert loss.isnan()
        return
    assert loss == 0
    assert not leaf.grad.any()


@pytest.mark.parametrize("backend", ["cpu:baseline", "cpu:avx2", "cpu:avx512"], indirect=True)
def test_exponentials_are_right_to_three_units_in_the_last_place(backend):
    """The softmax of one logit below another, over the range where it counts."""
    x = torch.linspace(-25, 0, 40001)
    logits = torch.full((len(x), 6), -INFINITY)
    logits[:, 0], logits[:, 1] = 0, x
    leaf = logits.requires_grad_()
    pyops.cross_entropy(leaf, torch.zeros(len(x), dtype=torch.int64), reduction="sum").backward()
    exact = torch.sigmoid(x.double())
    error = leaf.grad[:, 1].double() / exact - 1
    assert error.abs().max() <= 2.8e-7
    assert error.abs().mean() <= 1.0e-7
