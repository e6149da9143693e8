"""Quantizers of weights and activations, and the memory of quantized weights: what is particular to them. The rest:
tests/contract.py."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from contract import assert_same_bits, error_of, native, on_every_host_backend, recorded_ops, threads
from ternary.samples import DTYPES, measured, rounded_activations, rounded_weight
from torch import Tensor

import pyops
from pyops.ternary import bitlinear, forget, quantize_act, quantize_weight

NAN, INFINITY = float("nan"), float("inf")
MEASURES = ("absmean", "absmedian")


# ---- measures of a weight ------------------------------------------------------------------------------------------


def assert_gamma(weight: Tensor, measure: str, granularity: str, what: str) -> None:
    """The median is an element, so exact; the mean is the float64 one, rounded."""
    _, gamma = quantize_weight(weight, measure, granularity, eps=0)
    expected = measured(weight, measure, granularity == "row")
    if measure == "absmean":  # its sum may be taken in any order: in float64 that moves no more than a rounding
        nearest = weight.double().abs().mean(1 if granularity == "row" else (0, 1))
        half_ulp = (2.0**-24 * nearest).clamp(min=2.0**-150)
        assert ((gamma.double() - nearest).abs() <= half_ulp * (1 + 1e-6)).all(), what
    else:
        assert_same_bits(gamma, expected if granularity == "row" else expected.reshape(()), what)
        rows = weight.float().abs() if granularity == "row" else weight.float().abs().reshape(1, -1)
        assert_same_bits(gamma.reshape(-1), rows.median(1).values, f"{what}: torch's own lower median")


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_host_backend
def test_measures(measure, granularity, dtype, backend, count_cases):
    """Even and odd counts, one element, duplicates, all equal, denormals, a wide range of magnitudes."""
    random = torch.Generator().manual_seed(0)
    shapes = ((1, 1), (1, 2), (2, 1), (3, 3), (4, 6), (5, 257), (16, 64), (31, 1025))
    cases = 0
    for n, k in shapes[: 5 if backend == "triton-interpreted" else None]:
        plain = torch.randn(n, k, generator=random)
        fillings = {
            "normal": plain,
            "duplicates": (plain * 2).round() / 4,
            "all equal": torch.full((n, k), -0.3),
            "zeros": torch.zeros(n, k),
            "wide": plain * 10 ** torch.randint(-20, 20, (n, k), generator=random).float(),
            "denormals": plain * 1e-40,
            "large": plain.sign() * torch.finfo(dtype).max,
        }
        if dtype == torch.float16:
            fillings["wide"] = plain * 10 ** torch.randint(-6, 3, (n, k), generator=random).float()
        if backend == "triton-interpreted" and dtype == torch.bfloat16:
            del fillings["denormals"]  # the interpreter converts bfloat16 subnormals to other numbers
        for name, values in fillings.items():
            assert_gamma(values.to(dtype), measure, granularity, f"{n} x {k}, {name}")
            cases += 1
    count_cases(cases)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("backend", ["cpu:baseline", "cpu:avx2", "cpu:avx512"], indirect=True)
def test_measures_of_a_large_weight(number, backend):
    """Several threads share it; few distinct values put nearly all into one bin of a histogram."""
    random = torch.Generator().manual_seed(1)
    plain = torch.randn(211, 1500, generator=random)
    for weight in (plain, plain.T, plain * 1e-3 + 1, (plain * 3).round(), plain.bfloat16()):
        for measure in MEASURES:
            with threads(number):
                assert_gamma(weight, measure, "tensor", measure)
                assert_gamma(weight, measure, "row", measure)


# ---- rounding of weights -------------------------------------------------------------------------------------------


def sampled_places(n: int) -> list[int]:
    """Where the median of n weights on the CPU looks for its bracket: bracket() in quantize_weight.cpp."""
    state, parts, places = 0x9E3779B97F4A7C15, 1 << 14, []
    for part in range(parts):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        places.append(min(int((part + (state >> 11) * 2.0**-53) * (n / parts)), n - 1))
    return places


@pytest.mark.parametrize("sampled", ["larger", "smaller"])
@pytest.mark.parametrize("backend", ["cpu:baseline", "cpu:avx512"], indirect=True)
def test_median_where_the_sample_misleads(sampled, backend):
    """All sampled weights on one side of the median: the bracket misses it, and the median is exact all the same."""
    weight = torch.rand(512, 521, generator=torch.Generator().manual_seed(2))
    others = torch.ones(weight.numel(), dtype=torch.bool)
    others[sampled_places(weight.numel())] = False
    assert (~others).sum() > 2**14 * 0.9, "the places are not those of the kernel"
    weight.view(-1)[others if sampled == "smaller" else ~others] += 2
    assert_gamma(weight, "absmedian", "tensor", sampled)


@on_every_host_backend
def test_ties_of_weights_round_to_even(backend):
    """Exactly half of gamma is 0, one ulp more is 1; 1.5 is 1 by the clip, as is anything above."""
    half = torch.tensor(0.5)
    more = torch.nextafter(half, torch.tensor(1.0))
    less = torch.nextafter(half, torch.tensor(0.0))
    row = torch.stack([half, -half, more, -more, less, -less, 3 * half, -3 * half, 5 * half, 0 * half, -0.0 * half])
    expected = [0, 0, 1, -1, 0, 0, 1, -1, 1, 0, 0]
    for factor in (1.0, 2.0**-20, 2.0**20):
        ternary, gamma = quantize_weight(row[None] * factor, scale=torch.tensor(factor), eps=0)
        assert ternary[0].tolist() == expected
        assert gamma == factor


@on_every_host_backend
def test_weights_multiply_by_the_reciprocal(backend):
    """T = round(W * (1 / gamma')), the reciprocal being rounded: next to the threshold it differs from W / gamma'."""
    gamma = torch.rand(400, generator=torch.Generator().manual_seed(2)) + 0.5
    near = gamma / 2
    weight = torch.stack([near, torch.nextafter(near, near * 2), torch.nextafter(near, near * 0)], 1)
    by_reciprocal = (weight * (1 / gamma)[:, None]).abs() > 0.5
    assert not torch.equal(by_reciprocal, (weight / gamma[:, None]).abs() > 0.5), "the test tells nothing"
    ternary, _ = quantize_weight(weight, granularity="row", scale=gamma)
    assert torch.equal(ternary.bool(), by_reciprocal)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("eps_mode", ["clamp", "add"])
@on_every_host_backend
def test_eps(eps_mode, granularity, backend):
    """gamma' is what is returned and what divides."""
    weight = torch.tensor([[1e-4, -1e-4, 4e-4], [0.5, -0.25, 0.75]])
    for eps in (0.0, 1e-5, 1e-3, 2.0):
        ternary, gamma = quantize_weight(weight, "absmean", granularity, eps, eps_mode)
        expected, scale = rounded_weight(weight, None, "absmean", granularity, eps, eps_mode)
        assert_same_bits(gamma, scale if granularity == "row" else scale.reshape(()))
        assert_same_bits(ternary, expected.to(torch.int8))
    ternary, gamma = quantize_weight(weight, granularity="row", eps=1e-3)
    assert_same_bits(gamma, torch.tensor([1e-3, 0.5]))
    assert ternary.tolist() == [[0, 0, 0], [1, 0, 1]]


@on_every_host_backend
def test_a_weight_of_zeros(backend):
    for granularity in ("tensor", "row"):
        ternary, gamma = quantize_weight(torch.zeros(3, 5), granularity=granularity)
        assert not ternary.any()
        assert (gamma == torch.tensor(1e-5)).all()
    bias = torch.randn(3)
    assert_same_bits(bitlinear(torch.randn(4, 5), torch.zeros(3, 5), bias), bias.expand(4, 3))


@pytest.mark.row("R6")
@pytest.mark.parametrize("special", [NAN, INFINITY, -INFINITY], ids=str)
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("given", [False, True], ids=["measured", "given"])
@on_every_host_backend
def test_weights_that_are_not_finite(given, measure, special, backend):
    """gamma' is NaN: of the tensor, or of that row alone; so is the output."""
    weight = torch.randn(4, 9)
    weight[2, 8] = special
    x = torch.randn(3, 9)
    for granularity, bad in (("tensor", [0, 1, 2, 3]), ("row", [2])):
        scale = torch.ones(4 if granularity == "row" else ()) if given else None
        ternary, gamma = quantize_weight(weight, measure, granularity, scale=scale)
        assert ternary[2, 8] == 0
        assert gamma.isnan().expand(4).nonzero().flatten().tolist() == bad
        y = bitlinear(x, weight, weight_measure=measure, granularity=granularity, scale=scale)
        assert y.isnan().all(0).nonzero().flatten().tolist() == bad
        assert y.isnan().any(0).nonzero().flatten().tolist() == bad


# ---- activations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_host_backend
def test_ties_of_activations_round_to_even(dtype, backend):
    """127 is the largest, so the scale is 1 and halves stay halves."""
    halves = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 62.5, 63.5, 0.25, -0.0]
    q, step = quantize_act(torch.tensor([[127.0, *halves]]).to(dtype))
    assert q[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 62, 64, 0, 0]
    assert_same_bits(step, torch.ones(1, 1))


@on_every_host_backend
def test_qmax_128_saturates_at_the_top_only(backend):
    q, step = quantize_act(torch.tensor([[2.0, -2.0, 1.0], [1.0, 0.9, -0.9]]), qmax=128)
    assert q.tolist() == [[127, -128, 64], [127, 115, -115]]
    assert step.flatten().tolist() == [2 / 128, 1 / 128]


@pytest.mark.parametrize("qmax", [127, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_host_backend
def test_activations_to_the_last_bit(dtype, qmax, backend, count_cases):
    """Rows of every length up to 70 and around vectors; magnitudes from denormal to the largest of the dtype."""
    random = torch.Generator().manual_seed(3)
    lengths = (*range(71), 127, 255, 256, 257, 1023, 4099) if backend != "triton-interpreted" else (0, 1, 17, 64, 130)
    top = torch.finfo(dtype).max
    scales = [1e-30, 1e-5, 1e-2, 1.0, 300.0, min(1e30, top / 8)]
    if backend == "triton-interpreted" and dtype == torch.bfloat16:
        scales = scales[1:]
    for length in lengths:
        x = torch.randn(len(scales), length, generator=random) * torch.tensor(scales)[:, None]
        x = x.to(dtype)
        if length > 3:
            x[-1, 1], x[-1, 2] = top, -top / 2
        for eps in (1e-5, 1e-2):
            q, step = quantize_act(x, qmax, eps)
            expected_q, expected_step = rounded_activations(x, qmax, eps)
            assert_same_bits(q, expected_q.to(torch.int8), f"length {length}")
            assert_same_bits(step, expected_step, f"length {length}")
            *_, sums = torch.ops.pyops.ternary_quantize_activation(x, qmax, eps)
            assert_same_bits(sums, q.sum(1, dtype=torch.int32), f"sums of length {length}")
    count_cases(2 * len(lengths))


@pytest.mark.row("R6")
@pytest.mark.parametrize("special", [NAN, INFINITY, -INFINITY], ids=str)
@on_every_host_backend
def test_tokens_that_are_not_finite(special, backend):
    """Wherever in the row it is: SIMD maxima drop NaN."""
    lengths = (1, 7, 16, 33, 130) if backend != "triton-interpreted" else (7, 33)
    for length in lengths:
        clean = torch.randn(length, length)
        x = clean.clone()
        x.diagonal().fill_(special)
        x = torch.cat([x, clean])
        q, step = quantize_act(x)
        assert step[:length].isnan().all()
        assert not q[:length].any()
        expected = quantize_act(clean)
        assert_same_bits(q[length:], expected[0])
        assert_same_bits(step[length:], expected[1])


def test_shapes_of_activations():
    for shape in ((5,), (2, 3, 5), (0, 5), (4, 0), (1, 1, 1)):
        q, step = quantize_act(torch.randn(shape))
        assert q.shape == shape
        assert step.shape == (*shape[:-1], 1)


@pytest.mark.row("R9")
def test_bad_calls_of_quantizers():
    weight = torch.ones(3, 5)
    for call, kind, expected in (
        (lambda: quantize_weight([1.0]), TypeError, "weight: weight must be a Tensor, got list"),
        (
            lambda: quantize_weight(weight[0]),
            RuntimeError,
            "weight: weight must have shape [out_features, in_features]",
        ),
        (lambda: quantize_weight(weight.double()), RuntimeError, "weight: weight must be float32, bfloat16 or float16"),
        (lambda: quantize_weight(weight, "mean"), ValueError, "weight: measure must be one of 'absmean', 'absmedian'"),
        (lambda: quantize_weight(weight, granularity="column"), ValueError, "weight: granularity must be one of"),
        (lambda: quantize_weight(weight, eps=-1.0), ValueError, "weight: eps must be at least 0, got -1"),
        (lambda: quantize_weight(weight, eps="0"), TypeError, "weight: eps must be a number, got str"),
        (lambda: quantize_weight(weight, eps_mode=1), ValueError, "weight: eps_mode must be one of 'clamp', 'add'"),
        (lambda: quantize_weight(weight, scale=1.0), TypeError, "weight: scale must be a Tensor or None, got float"),
        (lambda: quantize_weight(weight, scale=torch.ones(3)), RuntimeError, "weight: scale must have shape [], got"),
        (lambda: quantize_act(3.0), TypeError, "activation: x must be a Tensor, got float"),
        (lambda: quantize_act(torch.ones(())), RuntimeError, "activation: x must have at least one dimension, got []"),
        (lambda: quantize_act(weight.int()), RuntimeError, "activation: x must be float32, bfloat16 or float16, got"),
        (lambda: quantize_act(weight, 100), ValueError, "activation: qmax must be one of 127, 128, got 100"),
        (lambda: quantize_act(weight, eps=0.0), ValueError, "activation: eps must be positive, got 0"),
    ):
        error, text = error_of(call)
        assert error is kind, f"{error.__name__}: {text}"
        assert text.startswith(f"pyops::ternary_quantize_{expected}"), text


@pytest.mark.row("R38")
@pytest.mark.parametrize("backend", ["cpu:baseline", "cpu:avx2", "cpu:avx512", "reference"], indirect=True)
def test_properties_of_the_quantizers(backend, count_cases):
    """The definition, to the last bit; and as rounding must: the error is at most half a step."""
    cases = 0

    @hypothesis.settings(max_examples=100)
    @hypothesis.given(
        st.tuples(st.integers(1, 12), st.integers(1, 300), st.integers(0, 2**31)),
        st.sampled_from(DTYPES), st.sampled_from(MEASURES), st.sampled_from(("tensor", "row")),
        st.sampled_from(("clamp", "add")), st.sampled_from((1e-4, 1.0, 1e3)),
    )  # fmt: skip
    def check(sizes, dtype, measure, granularity, eps_mode, magnitude) -> None:
        nonlocal cases
        cases += 1
        n, k, seed = sizes
        values = (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * magnitude).to(dtype)
        ternary, gamma = quantize_weight(values, measure, granularity, 1e-5, eps_mode)
        expected, scale = rounded_weight(values, None, measure, granularity, 1e-5, eps_mode)
        assert_same_bits(gamma, scale if granularity == "row" else scale.reshape(()))
        assert_same_bits(ternary, expected.to(torch.int8))
        q, step = quantize_act(values)
        error = (q.double() * step.double() - values.double()).abs()
        assert (error <= step.double() * (0.5 + 1e-5)).all()

    check()
    count_cases(cases)


# ---- memory of quantized weights -------------------------------------------------------------------------------------


def quantizations(weight: Tensor, **options: object) -> int:
    """How often a call quantizes the weight."""
    with recorded_ops() as ran, torch.no_grad():
        bitlinear(torch.ones(1, weight.shape[1]), weight, **options)
    return ran["ternary_quantize_weight"]


def test_a_weight_is_quantized_once():
    weight = torch.nn.Parameter(torch.randn(20, 30))
    assert [quantizations(weight) for _ in range(3)] == [1, 0, 0]
    x = torch.randn(4, 30, requires_grad=True)
    with recorded_ops() as ran:
        for _ in range(2):  # accumulation of gradients
            bitlinear(x, weight).sum().backward()
    assert ran["ternary_quantize_weight"] == 0
    assert [quantizations(weight, qmax=128), quantizations(weight, act_bits=None)] == [0, 0]


def test_other_options_quantize_anew():
    weight = torch.randn(20, 30)
    options = [{}, {"weight_measure": "absmedian"}, {"granularity": "row"}, {"eps": 1e-2}, {"eps_mode": "add"}]
    assert [quantizations(weight, **one) for one in options] == [1] * 5
    for one in options:
        forget(weight)
        fresh = bitlinear(torch.eye(30), weight, **one)
        bitlinear(torch.eye(30), weight)
        assert_same_bits(bitlinear(torch.eye(30), weight, **one), fresh, f"{one}")
    scale = torch.tensor(0.3)
    assert [quantizations(weight, scale=scale), quantizations(weight, scale=scale)] == [1, 1]


def changes() -> dict[str, object]:
    def optimizer_step(weight: Tensor) -> None:
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=1.0).step()

    def swap(weight: Tensor) -> None:
        weight.data = weight.data.flip(0) + 1

    def through_data(weight: Tensor) -> None:
        weight.data.mul_(-1)

    def through_detach(weight: Tensor) -> None:
        weight.detach().mul_(-1)

    def one_element(weight: Tensor) -> None:
        with torch.no_grad():
            weight[19, 29] = 100.0

    return {f.__name__: f for f in (optimizer_step, swap, through_data, through_detach, one_element)}


@pytest.mark.parametrize("change", changes())
def test_a_changed_weight_is_quantized_anew(change):
    """By whatever way it changes; of a write through ``.data`` there is no trace but the values."""
    weight, x = torch.nn.Parameter(torch.randn(20, 30)), torch.randn(6, 30)
    before = bitlinear(x, weight)
    changes()[change](weight)
    after = bitlinear(x, weight)
    assert_same_bits(after.detach(), bitlinear(x, weight.detach().clone()))
    assert not torch.equal(after, before)


def test_memory_holds_no_weight_alive():
    weight = torch.randn(20, 30)
    bitlinear(torch.ones(1, 30), weight)
    dead = weakref.ref(weight)
    from pyops.ternary.quantize_weight import _memory

    held = len(_memory)
    del weight
    gc.collect()
    assert dead() is None
    assert len(_memory) == held - 1


def test_memory_is_of_one_backend():
    """A backend that was asked for quantizes for itself."""
    weight = torch.randn(20, 30)
    assert quantizations(weight) == 1
    seen = []
    from pyops import _dispatch

    with _dispatch.restored({"": "cpu"}):
        seen.append(quantizations(weight))
    assert seen == [1]


def test_views_and_inference_tensors():
    """A view is a weight of its own; tensors made in inference mode have no versions and are not remembered."""
    base = torch.randn(40, 30)
    x = torch.randn(3, 30)
    for view in (base[:20], base[20:], base[::2], base.flip(0)):
        assert_same_bits(bitlinear(x, view), bitlinear(x, view.clone()))
    with torch.inference_mode():
        made = torch.randn(20, 30)
        assert [quantizations(made), quantizations(made)] == [1, 1]
        made.mul_(-1)
        assert_same_bits(bitlinear(x, made), bitlinear(x, made.clone()))


def test_evaluation_in_inference_mode_does_not_spoil_training():
    """What was remembered there serves the backward of the next step."""
    weight, x = torch.randn(8, 12, requires_grad=True), torch.randn(3, 12)
    with torch.inference_mode():
        bitlinear(x, weight)
    bitlinear(x, weight).sum().backward()
    assert weight.grad.shape == weight.shape


def test_forget():
    one, other = torch.randn(4, 6), torch.randn(4, 6)
    assert quantizations(one) + quantizations(other) == 2
    forget(one)
    assert (quantizations(one), quantizations(other)) == (1, 0)
    forget()
    assert quantizations(one) + quantizations(other) == 2


# ---- levels of the processor -----------------------------------------------------------------------------------------


def test_a_cap_gives_a_level_that_the_processor_has():
    """AVX-VNNI is no part of AVX-512: where it is missing, capping there gives AVX2."""
    described = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in described if line.startswith(("flags", "Features"))).split()
    native().force_isa("avxvnni")
    try:
        reached = native().current_isa()
    finally:
        native().force_isa(None)
    if "avx_vnni" in flags:
        assert reached == "avxvnni"
    else:
        assert reached in ("avx2", "baseline")
    assert pyops.explain("bitlinear", torch.ones(1, 2), torch.ones(3, 2)).cpu_isa is not None
