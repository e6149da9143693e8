"""Packed layouts and products of the ternary family: what is particular to them. The rest: tests/contract.py."""

from __future__ import annotations

import itertools
import threading

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from contract import (
    ON_CPU,
    assert_accurate,
    assert_same_bits,
    error_of,
    on_every_host_backend,
    outputs_and_gradients,
    threads,
    upstream_gradient,
)
from ternary.samples import (
    DTYPES,
    FORMATS,
    PACKED,
    bitlinear_definition,
    encoded,
    make_bitlinear,
    make_linear,
    packed_shape,
    places,
    rounded_activations,
)
from torch import Tensor

import pyops
from pyops.ternary import bitlinear, linear_packed, pack, quantize_act, quantize_weight, repack, unpack

on_cpu_levels = pytest.mark.parametrize("backend", ON_CPU, indirect=True)


def random_ternary(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randint(-1, 2, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def exact_product(x: Tensor, ternary: Tensor, gamma: Tensor, bias: Tensor | None = None, qmax: int = 127) -> Tensor:
    """float32(acc) * (step * gamma) + bias with sums of integers, then the cast to the dtype of x."""
    q, step = rounded_activations(x, qmax)
    y = (q.long() @ ternary.long().T).float() * (step * gamma)
    return (y if bias is None else y + bias.float()).to(x.dtype)


# ---- layouts -----------------------------------------------------------------------------------------------------


def weights(n: int, k: int, *entries: tuple[int, int, int]) -> Tensor:
    ternary = torch.zeros(n, k, dtype=torch.int8)
    for row, column, value in entries:
        ternary[row, column] = value
    return ternary


# Bytes worked out by hand from the drawing in the specification: all other bytes hold weights 0 (codes 1).
BY_HAND = {
    "t2": (weights(2, 5, (0, 0, 1), (0, 2, -1), (0, 3, 1), (0, 4, 1)), {0: 134, 1: 86}),
    "t2, last field": (weights(1, 4, (0, 3, -1)), {0: 21}),
    "t5": (weights(2, 6, (0, 0, 1), (0, 2, -1), (0, 3, 1), (0, 4, 1), (1, 5, -1)), {0: 221, 3: 120}),
    "t2x16": (weights(17, 18, (16, 17, 1), (3, 10, -1)), {193: 86, 14: 69}),
    "t5x16": (weights(17, 25, (16, 22, 1), (5, 19, -1)), {194: 122, 23: 40}),
    "t2mma": (weights(20, 140, (9, 43, 1), (16, 135, 1), (2, 60, -1)), {103: 89, 1555: 86, 180: 69}),
}


@pytest.mark.parametrize("case", BY_HAND)
@on_every_host_backend
def test_bytes_worked_out_by_hand(case, backend):
    ternary, expected = BY_HAND[case]
    fmt = case.partition(",")[0]
    packed = pack(ternary, fmt)
    assert packed.dtype == torch.uint8
    assert tuple(packed.shape) == packed_shape(fmt, *ternary.shape)
    zero = 121 if fmt.startswith("t5") else 85
    assert {i: v for i, v in enumerate(packed.flatten().tolist()) if v != zero} == expected
    assert_same_bits(unpack(packed, fmt, ternary.shape[1], ternary.shape[0]), ternary)


@pytest.mark.parametrize("fmt", PACKED)
def test_every_weight_has_a_place_of_its_own(fmt):
    """No two weights share bits: what the other tests take for the layout is one."""
    for n, k in ((1, 1), (16, 128), (33, 141)):
        byte, digit = places(fmt, n, k)
        assert len(set(zip(byte.flatten().tolist(), digit.flatten().tolist(), strict=True))) == n * k
        assert int(byte.max()) < torch.Size(packed_shape(fmt, n, k)).numel()


@pytest.mark.parametrize("backend", ["cpu:baseline", "cpu:avx2", "cpu:avx512"], indirect=True)
def test_packing_of_every_size_up_to_70(backend, count_cases):
    """There and back for N, K = 1 ... 70 in every format (at lower levels N around lines); of each eleventh the
    bytes."""
    whole, lines = random_ternary(70, 70), (1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 70)
    rows = range(1, 71) if backend == "cpu:avx512" else lines
    for n, k in itertools.product(rows, range(1, 71)):
        ternary = whole[:n, :k]
        for fmt in PACKED:
            packed = pack(ternary, fmt)
            assert torch.equal(unpack(packed, fmt, k, n), ternary), (n, k, fmt)
            if (70 * n + k) % 11 == 0:
                assert torch.equal(packed, encoded(ternary, fmt)), (n, k, fmt)
    count_cases(len(rows) * 70 * len(PACKED))


@pytest.mark.parametrize(("source", "target"), itertools.permutations(FORMATS, 2))
@on_every_host_backend
def test_repack_between_all_formats(source, target, backend, count_cases):
    sizes = [(1, 1), (16, 20), (17, 21), (15, 19), (33, 129)] if backend != "triton-interpreted" else [(17, 21)]
    for n, k in sizes:
        ternary = random_ternary(n, k, n + k)
        assert_same_bits(repack(encoded(ternary, source), source, target, n, k), encoded(ternary, target))
    count_cases(len(sizes))


@pytest.mark.row("R13")
@pytest.mark.parametrize("fmt", FORMATS)
@on_every_host_backend
def test_bytes_that_stand_for_no_weight(fmt, backend, count_cases):
    """Wherever they are, unpacking names the first; with one anywhere nothing is returned and nothing changed."""
    n, k = 18, 45
    good = encoded(random_ternary(n, k), fmt)
    byte, digit = places(fmt, n, k) if fmt != "int8" else (torch.arange(n * k).reshape(n, k), None)
    cases = [(0, 0), (3, 7), (n - 1, k - 1)]
    for row, column in cases:
        bad = good.clone()
        at = int(byte[row, column])
        bad.view(-1)[at] = 77 if fmt == "int8" else 243 if "5" in fmt else int(good.view(-1)[at]) | 3 << 2 * int(
            digit[row, column]
        )  # fmt: skip
        kept = bad.clone()
        kind, text = error_of(lambda bad=bad: repack(bad, fmt, "int8" if fmt != "int8" else "t2", n, k))
        assert kind is pyops.FormatError, f"{kind.__name__}: {text}"
        assert text.startswith("pyops::ternary_repack: source must hold "), text
        if "5" not in fmt:
            assert text.endswith(f"got {77 if fmt == 'int8' else 3} at [{row}, {column}]"), text
        assert_same_bits(bad, kept)
    count_cases(len(cases))


@pytest.mark.row("R13")
@pytest.mark.parametrize("fmt", ["int8", "t2", "t5"])
@on_every_host_backend
def test_products_reject_codes_of_canonical_formats(fmt, backend):
    for n, k in ((5, 23), (37, 1451)):
        good = encoded(random_ternary(n, k), fmt)
        for place in (0, good.numel() // 2, good.numel() - 1):
            bad = good.clone()
            bad.view(-1)[place] = 2 if fmt == "int8" else 255
            for tokens in (1, 2, 3, 7, 20):
                x = torch.ones(tokens, k)
                kind, text = error_of(lambda x=x, bad=bad, k=k: linear_packed(x, bad, torch.tensor(1.0), fmt=fmt,
                                                                              in_features=k))  # fmt: skip
                assert kind is pyops.FormatError, f"{kind.__name__}: {text}"
                assert text.startswith("pyops::ternary_linear: packed must hold "), text


@pytest.mark.row("R13")
@on_every_host_backend
def test_what_lies_behind_the_last_weight_does_not_matter(backend):
    n, k = 37, 1451
    good = encoded(random_ternary(n, k), "t2")
    other = good.clone()
    other[:, -1] |= 0b11000000
    for tokens in (1, 2, 3, 7, 20):
        x = torch.randn(tokens, k)
        assert_same_bits(*(linear_packed(x, p, torch.tensor(1.0), in_features=k) for p in (good, other)))


@pytest.mark.row("R13")
def test_bad_calls_of_pack_and_unpack():
    ternary = random_ternary(3, 9)
    for call, kind, expected in (
        (lambda: pack(ternary, "t3"), ValueError, "fmt must be one of t2, t5, t2x16, t5x16, t2mma, got 't3'"),
        (lambda: pack(ternary, "int8"), ValueError, "fmt must be one of t2, t5, t2x16, t5x16, t2mma, got 'int8'"),
        (lambda: pack(ternary, 2), TypeError, "fmt must be one of t2, t5, t2x16, t5x16, t2mma, got int"),
        (lambda: pack([[1]], "t2"), TypeError, "T must be a Tensor, got list"),
        (lambda: pack(ternary[0], "t2"), RuntimeError, "T must have shape [out_features, in_features], got [9]"),
        (lambda: pack(ternary.float(), "t2"), RuntimeError, "source must be int8, got float32"),
        (lambda: pack(ternary * 2, "t2"), pyops.FormatError, "source must hold -1, 0 and 1 only, got "),
        (lambda: unpack(ternary, "t2", 9), RuntimeError, "source must be uint8, got int8"),
        (lambda: unpack(pack(ternary), "t2", 13), RuntimeError, "source must have shape [3, 4], got [3, 3]"),
        (lambda: unpack(pack(ternary), "t2", 8), RuntimeError, "source must have shape [3, 2], got [3, 3]"),
        (lambda: unpack(pack(ternary)[0], "t2", 9), RuntimeError, "packed must have two dimensions, got [3]"),
        (lambda: unpack(pack(ternary, "t2mma"), "t2mma", 9), TypeError, "out_features must be given for the layout"),
        (lambda: unpack(pack(ternary), "t2", 1 << 62), RuntimeError, "in_features must be in [0, 16777216], got "),
        (lambda: repack(pack(ternary), "t2", "t5", 1 << 62, 9), RuntimeError, "source must have shape ["),
    ):
        error, text = error_of(call)
        assert error is kind, f"{error.__name__}: {text}"
        assert text.startswith(f"pyops::ternary_repack: {expected}"), text


# ---- products, to the last bit -----------------------------------------------------------------------------------


@pytest.mark.row("R44", "R45", "R47")
@pytest.mark.parametrize("fmt", FORMATS)
@on_cpu_levels
def test_same_bits_for_every_number_of_tokens_and_threads(fmt, backend, count_cases):
    """M = 1 ... 40 with one thread, and the sizes at which tiles change with 2, 3 and 4: the exact sum of integers, so
    that a token's result does not depend on its batch."""
    cases = 0
    for dtype, (n, k) in itertools.product(DTYPES[:2], ((131, 203), (16, 1040), (1, 7))):
        x = torch.randn(40, k, generator=torch.Generator().manual_seed(k)).to(dtype)
        ternary, gamma = random_ternary(n, k), torch.rand(n) + 0.1
        bias = torch.randn(n).to(dtype)
        packed = encoded(ternary, fmt)
        expected = exact_product(x, ternary, gamma, bias)
        for number, rows in ((1, range(41)), (2, (1, 3, 4, 12, 25)), (3, (1, 5, 40)), (4, (1, 2, 13, 40))):
            with threads(number):
                for m in rows:
                    y = linear_packed(x[:m], packed, gamma, bias, fmt=fmt, in_features=k, out_features=n)
                    assert_same_bits(y, expected[:m], f"{m} x {n} x {k}, {number} threads")
                    cases += 1
    count_cases(cases)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@on_every_host_backend
def test_training_and_packed_forward_have_the_same_bits(granularity, backend):
    """Of one weight, in every format."""
    call = make_bitlinear("rows" if granularity == "row" else "median")
    x, weight, bias = (call.tensors[name] for name in ("x", "weight", "bias"))
    y = bitlinear(x, weight, bias, granularity=granularity)
    ternary, gamma = quantize_weight(weight, granularity=granularity)
    assert_same_bits(y, exact_product(x, ternary, gamma, bias))
    for fmt in PACKED:
        packed = pack(ternary, fmt)
        options = {"fmt": fmt, "in_features": 37, "out_features": 19}
        assert_same_bits(linear_packed(x, packed, gamma, bias, **options), y, fmt)


LENGTHS = (1, 64, 65, 256, 1023, 4097, 20000)


@pytest.mark.parametrize("fmt", FORMATS)
@on_cpu_levels
def test_no_accumulator_saturates(fmt, backend, count_cases):
    """Rows of weights 1 and of weights -1, and all activations at the end of their range: exactly 127 K, or -128 K."""
    signs = torch.tensor([1, -1, 1], dtype=torch.int8)
    cases = [*itertools.product(LENGTHS, (1, 2, 5, 13)), (131109, 1), (131109, 5)]
    for k, rows in cases:
        packed = encoded(signs[:, None].expand(3, k), fmt)
        for qmax, value, q in ((127, 1.0, 127), (127, -1.0, -127), (128, -1.0, -128), (128, 1.0, 127)):
            x = torch.full((rows, k), value)
            y = linear_packed(x, packed, torch.tensor(float(qmax)), fmt=fmt, in_features=k, out_features=3, qmax=qmax)
            assert torch.equal(y, (signs * float(q * k)).expand(rows, 3)), (k, rows, qmax, value, y[0, 0])
    count_cases(4 * len(cases))


@pytest.mark.parametrize("fmt", ["t2", "t5", "t2x16", "t5x16"])
@on_cpu_levels
def test_longest_sum(fmt, backend):
    """At the most in_features there may be, -128 in each: the int32 sum is its least number."""
    k = 1 << 24
    packed, x = pack(torch.ones(1, k, dtype=torch.int8), fmt), torch.full((1, k), -1.0, dtype=torch.bfloat16)
    options = {"fmt": fmt, "in_features": k, "out_features": 1, "qmax": 128, "out_dtype": torch.float32}
    y = linear_packed(x, packed, torch.tensor(128.0), **options)
    assert y.item() == -(2.0**31)


@pytest.mark.row("R6")
@pytest.mark.parametrize("fmt", FORMATS)
@on_every_host_backend
def test_odd_tokens_do_not_touch_others(fmt, backend):
    """A token of zeros gives the bias exactly, as does one too small; one with a NaN or an infinity gives NaN; every
    other token what it gives alone."""
    ternary = random_ternary(19, 37)
    packed, gamma, bias = encoded(ternary, fmt), torch.rand(19) + 0.1, torch.randn(19)
    options = {"fmt": fmt, "in_features": 37, "out_features": 19}
    x = torch.randn(9, 37)
    clean = linear_packed(x, packed, gamma, bias, **options)
    x[0], x[2], x[8] = 0.0, -0.0, 1e-30
    x[1, 36], x[3, 0], x[5, 20] = float("nan"), float("inf"), -float("inf")
    y = linear_packed(x, packed, gamma, bias, **options)
    assert_same_bits(y[[0, 2, 8]], bias.expand(3, 19))
    assert y[[1, 3, 5]].isnan().all()
    assert_same_bits(y[[4, 6, 7]], clean[[4, 6, 7]])
    for row in (1, 4):  # alone
        assert_same_bits(linear_packed(x[row], packed, gamma, bias, **options), y[row])


@on_every_host_backend
def test_scales_multiply_in_one_order(backend):
    """fp32(acc) * (step * gamma), then + bias, each rounded once: written out with numbers whose other orders, and a
    fused sum, differ."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 50, generator=generator)
    ternary, gamma = random_ternary(8, 50), torch.rand(8, generator=generator) + 0.1
    bias = torch.randn(8, generator=generator)
    expected = exact_product(x, ternary, gamma, bias)
    q, step = rounded_activations(x)
    acc = (q.long() @ ternary.long().T).float()
    fused = (acc.double() * (step * gamma).double() + bias.double()).float()
    for other in ((acc * step) * gamma + bias, (acc * gamma) * step + bias, fused):
        assert not torch.equal(other, expected), "the test tells nothing"
    assert_same_bits(linear_packed(x, encoded(ternary, "t2"), gamma, bias, in_features=50), expected)


@on_every_host_backend
def test_groups_of_256(backend):
    """step * sum over groups of fp32(acc) gamma: tolerance of the specification, 1e-6 of the sum of magnitudes."""
    call = make_linear("groups", inputs=3, rows=7)
    x, packed, gamma, bias = call.tensors.values()
    ternary = unpack(packed, "t2", x.shape[1])
    q, step = rounded_activations(x)
    sums = torch.einsum("mgk,ngk->mng", q.double().unflatten(1, (2, 256)), ternary.double().unflatten(1, (2, 256)))
    terms = sums * gamma.double() * step.double()[:, :, None]
    error = (call(linear_packed)[0].double() - terms.sum(2) - bias.double()).abs()
    assert (error <= 1e-6 * (terms.abs().sum(2) + bias.double().abs())).all()


# ---- gradients by the closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@on_every_host_backend
def test_gradients_by_closed_forms(granularity, dtype, backend):
    """With (q, T) frozen: dx = (g gamma) @ T, dW = (step g)^T @ q, db = sum g, dgamma = sum dW T."""
    shape = (19,) if granularity == "row" else ()
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.3
    call = make_bitlinear("rows", dtype).replace(scale=scale, granularity=granularity)
    wanted = ("x", "weight", "bias", "scale")
    ours = outputs_and_gradients(bitlinear, call, wanted)
    wide = dtype if dtype == torch.float32 else torch.float32
    ternary, _ = quantize_weight(call.tensors["weight"], granularity=granularity, scale=scale)
    q, step = quantize_act(call.tensors["x"])

    def closed(real: torch.dtype) -> dict[str, Tensor]:
        g, t, gamma = upstream_gradient(ours["output 0"]).to(real), ternary.to(real), scale.to(real)
        dw = (g * step.to(real)).T @ q.to(real)
        rows = (dw * t).sum(1)
        return {
            "gradient of x": (g * gamma) @ t,
            "gradient of weight": dw,
            "gradient of bias": g.sum(0),
            "gradient of scale": rows if granularity == "row" else rows.sum(),
        }

    plain, exact = closed(wide), closed(torch.float64)
    for name, expected in exact.items():
        assert_accurate(ours[name], plain[name].to(ours[name].dtype), expected, name)


@pytest.mark.parametrize("act_bits", [8, None])
@pytest.mark.parametrize("backend", ["cpu:baseline", "cpu:avx2", "cpu:avx512"], indirect=True)
def test_outputs_taller_than_one_task(act_bits, backend):
    """Above 1,020 rows packed panels are used again; whole numbers make every sum exact."""
    random = torch.Generator().manual_seed(5)

    def integers(largest, *shape):
        return torch.randint(-largest, largest + 1, shape, generator=random).float()

    x, weight, grad = integers(126, 1024, 300), integers(1, 1100, 300), integers(3, 1024, 1100)
    x[:, 17] = 127  # a step of 1
    x.requires_grad_()
    weight.requires_grad_()
    y = bitlinear(x, weight, scale=torch.ones(()), act_bits=act_bits)
    y.backward(grad)
    wide_x, wide_weight, wide_grad = (t.detach().double() for t in (x, weight, grad))
    assert_same_bits(y.detach(), (wide_x @ wide_weight.T).float())
    assert_same_bits(x.grad, (wide_grad @ wide_weight).float())
    assert_same_bits(weight.grad, (wide_grad.T @ wide_x).float())


@on_every_host_backend
def test_clipped_activations_have_a_gradient(backend):
    """qmax 128 clips the largest to 127; the gradient passes through nevertheless."""
    x = torch.tensor([[1.0, -1.0, 0.25]], requires_grad=True)
    weight = torch.tensor([[1.0, 1.0, -1.0]])
    y = bitlinear(x, weight, qmax=128)
    assert_same_bits(y.detach(), torch.tensor([[(127.0 - 128 - 32) / 128]]))
    y.sum().backward()
    assert_same_bits(x.grad, torch.tensor([[1.0, 1.0, -1.0]]))


@on_every_host_backend
def test_scale_below_eps_has_no_gradient(backend):
    """gamma' = max(gamma, eps) is eps there; added eps leaves it one."""
    x, weight = torch.randn(4, 6), torch.randn(3, 6)
    scale = torch.tensor([1e-7, 0.5, -1.0], requires_grad=True)
    options = {"granularity": "row", "scale": scale}
    bitlinear(x, weight, **options).sum().backward()
    assert scale.grad[0] == 0
    assert scale.grad[1] != 0
    assert scale.grad[2] == 0
    scale.grad = None
    bitlinear(x, weight, eps_mode="add", **options).sum().backward()
    assert (scale.grad != 0).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@on_every_host_backend
def test_share_of_rounding(share, backend):
    """lambda_ 0 is the float layer, 1 the rounded one, between them the product of the mixtures."""
    call = make_bitlinear("half rounded", rows=16).replace(lambda_=share)
    wanted = ("x", "weight", "bias")
    ours = outputs_and_gradients(bitlinear, call, wanted)
    if share == 0:
        x, weight, bias = (call.tensors[name] for name in wanted)
        plain = torch.nn.functional.linear(x, weight, bias)
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        assert_accurate(ours["output 0"], plain, exact)
    if share == 1:
        assert_same_bits(ours["output 0"], bitlinear(**call.tensors))
    plain = outputs_and_gradients(bitlinear_definition, call, wanted)
    for name, expected in outputs_and_gradients(bitlinear_definition, call.to(torch.float64), wanted).items():
        assert_accurate(ours[name], plain[name], expected, name)


def test_saved_for_backward_is_small():
    """One byte per activation, a quarter of a byte per weight, a float per token: 0.3 of what float32 takes."""
    x = torch.randn(256, 512, requires_grad=True)
    weight = torch.randn(384, 512, requires_grad=True)
    saved: dict[int, int] = {}

    def pack_hook(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        bitlinear(x, weight)
    assert sum(saved.values()) <= x.numel() + 4 * 256 + weight.numel() // 4 + 4
    assert sum(saved.values()) <= 0.3 * (x.nbytes + weight.nbytes)


# ---- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.row("R28")
def test_eight_threads_share_one_weight(count_cases):
    """Training and packed calls at once, half of them while others change weights of their own."""
    weight, x = torch.randn(67, 131), torch.randn(13, 131)
    ternary, gamma = quantize_weight(weight)
    packed = pack(ternary, "t5")
    expected = bitlinear(x, weight)
    assert_same_bits(expected, exact_product(x, ternary, gamma))
    problems: list[str] = []

    def work(number: int) -> None:
        own = torch.randn(67, 131)
        for turn in range(150):
            leaf = x.clone().requires_grad_()
            for y in (
                bitlinear(leaf, weight, granularity="tensor"),
                linear_packed(x[: 1 + turn % 13], packed, gamma, fmt="t5", in_features=131),
            ):
                if not torch.equal(y, expected[: y.shape[0]]):
                    problems.append(f"thread {number}, turn {turn}")
                    return
            if number % 2:
                own += 1
                bitlinear(x, own)
            if number == 7 and turn % 10 == 0:
                pyops.ternary.forget()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert problems == []
    count_cases(8 * 150)


# ---- properties ----------------------------------------------------------------------------------------------------


@st.composite
def products(draw) -> tuple[Tensor, Tensor, Tensor]:
    """(x, ternary, gamma)."""
    m, n, k = draw(st.integers(1, 20), "m"), draw(st.integers(1, 40), "n"), draw(st.integers(1, 150), "k")
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31), "seed"))
    x = torch.randn(m, k, generator=random) * draw(st.sampled_from((1e-3, 1.0, 1e4)))
    ternary = torch.randint(-1, 2, (n, k), generator=random, dtype=torch.int8)
    return x, ternary, torch.rand(n, generator=random) + 0.1


def product(x: Tensor, ternary: Tensor, gamma: Tensor, fmt: str = "t2x16") -> Tensor:
    n, k = ternary.shape
    return linear_packed(x, pack(ternary, fmt), gamma, fmt=fmt, in_features=k, out_features=n)


@pytest.mark.row("R38")
@on_cpu_levels
def test_properties_of_the_product(backend, count_cases):
    """To the last bit: rows, tokens and inputs may be permuted; inputs of weight 0 beside others change nothing, nor
    do zero inputs; a sign or a power of 2 in x, T or gamma comes out in y."""
    cases = 0

    @hypothesis.settings(max_examples=60)
    @hypothesis.given(products(), st.sampled_from(PACKED), st.data())
    def check(given, fmt, data) -> None:
        nonlocal cases
        cases += 1
        x, ternary, gamma = given
        y = product(x, ternary, gamma, fmt)
        shuffle = torch.Generator().manual_seed(data.draw(st.integers(0, 1000), "order"))
        tokens, rows, inputs = (torch.randperm(size, generator=shuffle) for size in (*x.shape, ternary.shape[0]))
        assert_same_bits(product(x[tokens], ternary, gamma, fmt), y[tokens], "tokens")
        assert_same_bits(product(x[:, rows], ternary[:, rows], gamma, fmt), y, "inputs")
        assert_same_bits(product(x, ternary[inputs], gamma[inputs], fmt), y[:, inputs], "rows")
        more = data.draw(st.integers(1, 70), "padding")
        zeros = torch.zeros(ternary.shape[0], more, dtype=torch.int8)
        padded = torch.cat([x, x[:, :1].expand(-1, more)], 1)
        assert_same_bits(product(padded, torch.cat([ternary, zeros], 1), gamma, fmt), y, "weights 0")
        assert torch.equal(product(x, -ternary, gamma, fmt), -y)
        assert torch.equal(product(-x, ternary, gamma, fmt), -y)
        for factor in (0.25, 64.0):
            assert_same_bits(product(x * factor, ternary, gamma, fmt), y * factor, "a power of 2 in x")
            assert_same_bits(product(x, ternary, gamma * factor, fmt), y * factor, "a power of 2 in gamma")

    check()
    count_cases(cases)
