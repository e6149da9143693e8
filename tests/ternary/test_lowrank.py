"""Low-rank corrections of ternary weights: the best of their rank, exact sums, gradients, the module."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from contract import assert_accurate, assert_same_bits
from torch import nn
from torch.nn import functional

import pyops
from pyops.nn import BitLinear, PackedBitLinear
from pyops.ternary import bitlinear_lowrank, linear_packed, low_rank_compensation, quantize_weight, unpack
from pyops.ternary.reference import dequantized

N, K, RANK = 24, 40, 5
FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def weight_of(n: int = N, k: int = K, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(2)).to(dtype)


def parts(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x, packed, gamma, A, B, bias."""
    source = torch.Generator().manual_seed(5)
    packed, gamma, A, B = low_rank_compensation(weight_of(dtype=dtype), RANK)
    x = torch.randn(7, K, generator=source).to(dtype)
    return x, packed, gamma, A, B, torch.randn(N, generator=source).to(dtype)


# ---- the correction --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(N, K), (K, N), (N, N), (1, K), (N, 1)], ids=str)
def test_is_the_best_of_its_rank(shape):
    """The error that is left has the norm that the singular values say, for every rank; A and B share them evenly."""
    weight = weight_of(*shape)
    ternary, gamma = quantize_weight(weight)
    error = weight.double() - dequantized(ternary, gamma, torch.float64)
    singular = torch.linalg.svdvals(error)
    for rank in range(min(shape) + 1):
        packed, same_gamma, A, B = low_rank_compensation(weight, rank)
        assert torch.equal(unpack(packed, "t2", shape[1]), ternary)
        assert torch.equal(same_gamma, gamma)
        assert (A.shape, B.shape) == ((shape[0], rank), (rank, shape[1]))
        left = torch.linalg.matrix_norm(error - A.double() @ B.double())
        best = singular[rank:].square().sum().sqrt()
        assert abs(left - best) <= 1e-6 * singular[0]
        for factor in (A.double().T, B.double()):
            gram = factor @ factor.T
            assert torch.allclose(gram, torch.diag(singular[:rank]), atol=1e-6 * singular[0].item())


def test_of_an_error_that_is_zero():
    """Ternary weights need no correction: A and B are zeros, not NaN."""
    weight = torch.tensor([[1.0, -1.0, 1.0, 1.0], [1.0, 1.0, -1.0, 1.0]])
    _, _, A, B = low_rank_compensation(weight, 2)
    assert not (A @ B).any()


def test_of_an_error_of_lower_rank():
    """Beyond the rank of the error there is nothing but rounding: still finite, still right."""
    source = torch.Generator().manual_seed(4)
    ternary = torch.randint(-1, 2, (N, K), generator=source).double()
    sixteenths = (torch.randint(1, 8, (size,), generator=source).double() / 16 for size in (N, K))
    error = torch.outer(*sixteenths)  # the weight is exact in float32
    weight = (ternary + error).float()
    for rank in (1, 2, 8, N):
        _, _, A, B = low_rank_compensation(weight, rank, scale=torch.tensor(1.0))
        assert (A.double() @ B.double() - error).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("fmt", ["t2", "t5"])
def test_options_reach_the_quantizer(dtype, fmt):
    options = {"measure": "absmedian", "granularity": "row", "eps": 1e-3, "eps_mode": "add"}
    weight = weight_of(dtype=dtype)
    ternary, gamma = quantize_weight(weight, **options)
    packed, found, A, B = low_rank_compensation(weight, 3, fmt=fmt, **options)
    assert torch.equal(unpack(packed, fmt, K), ternary)
    assert torch.equal(found, gamma)
    assert A.dtype == B.dtype == dtype
    _, given, _, _ = low_rank_compensation(weight, 3, scale=torch.tensor(0.5))
    assert given.item() == 0.5


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda w: low_rank_compensation(w, 25), ValueError, r"rank must be in \[0, 24\], got 25"),
        (lambda w: low_rank_compensation(w, -1), ValueError, r"rank must be in \[0, 24\], got -1"),
        (lambda w: low_rank_compensation(w, 2.0), TypeError, "rank must be a whole number, got float"),
        (
            lambda w: low_rank_compensation(w[0], 1),
            RuntimeError,
            r"weight must have shape \[out_features, in_features\]",
        ),
        (lambda w: low_rank_compensation(w / 0, 1), ValueError, "weight must be finite, got"),
        (lambda w: low_rank_compensation(w, 1, fmt="t2x16"), ValueError, "fmt must be one of t2, t5"),
        (lambda w: low_rank_compensation(w, 1, measure="max"), ValueError, "measure must be one of"),
        (lambda w: low_rank_compensation(w.double(), 1), RuntimeError, "weight must be float32, bfloat16 or float16"),
        (lambda w: low_rank_compensation([1.0], 1), TypeError, "weight must be a Tensor"),
    ],
)
def test_bad_calls_of_the_compensation(call, error, text):
    with pytest.raises(error, match=f"^pyops::.*{text}"):
        call(weight_of())


# ---- the function ----------------------------------------------------------------------------------------------


def definition(x, packed, gamma, A, B, bias, alpha, act) -> torch.Tensor:
    """In the dtype of x, straight through the rounding of x."""
    weight = dequantized(unpack(packed, "t2", K), gamma, x.dtype)
    rounded = x
    if act is not None:
        q, step = pyops.ternary.quantize_act(x.float())
        rounded = x + (q.to(x.dtype) * step.to(x.dtype) - x).detach()
    y = functional.linear(rounded, weight, bias)
    return y + alpha * functional.linear(functional.linear(x, B), A)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("act", ["int8", None])
def test_value_and_gradients(dtype, act):
    """Against the formula in float64, for x, A, B and bias; plain torch sets the bar."""
    x, packed, gamma, A, B, bias = parts(dtype)
    upstream = torch.randn(7, N, generator=torch.Generator().manual_seed(8)).to(dtype)

    def run(wanted: torch.dtype, function) -> list[torch.Tensor]:
        leaves = [tensor.detach().to(wanted).requires_grad_() for tensor in (x, A, B, bias)]
        y = function(leaves[0], packed, gamma, *leaves[1:])
        y.backward(upstream.to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    def formula(x, packed, gamma, A, B, bias):
        return definition(x, packed, gamma, A, B, bias, 0.7, act)

    ours = run(dtype, lambda *args: bitlinear_lowrank(*args, in_features=K, act=act, alpha=0.7))
    names = ("value", "x", "A", "B", "bias")
    for name, one, plain, exact in zip(names, ours, run(dtype, formula), run(torch.float64, formula), strict=True):
        assert_accurate(one, plain, exact, name)


def test_without_correction_it_is_the_packed_product():
    x, packed, gamma, A, B, bias = parts()
    expected = linear_packed(x, packed, gamma, bias, in_features=K)
    assert_same_bits(bitlinear_lowrank(x, packed, gamma, A, B, bias, in_features=K, alpha=0.0), expected)
    options = {"qmax": 128, "eps": 5.0, "fmt": "t5", "in_features": K, "out_features": N}
    repacked = pyops.ternary.repack(packed, "t2", "t5", N, K)
    other = linear_packed(x, repacked, gamma, bias, **options)
    assert not torch.equal(other, expected)
    assert_same_bits(bitlinear_lowrank(x, repacked, gamma, A, B, bias, alpha=0.0, **options), other)
    empty = bitlinear_lowrank(x, packed, gamma, A[:, :0], B[:0], bias, in_features=K)
    assert_same_bits(empty, expected)


@pytest.mark.parametrize("shape", [(K,), (2, 3, K), (0, K)], ids=str)
def test_leading_dimensions(shape):
    _, packed, gamma, A, B, bias = parts()
    x = torch.randn(shape)
    y = bitlinear_lowrank(x, packed, gamma, A, B, bias, in_features=K)
    assert y.shape == (*shape[:-1], N)
    flat = bitlinear_lowrank(x.reshape(-1, K), packed, gamma, A, B, bias, in_features=K)
    assert torch.allclose(y.reshape(-1, N), flat, rtol=1e-5, atol=1e-5)


@pytest.mark.row("R6")
def test_only_the_rows_of_bad_tokens_are_bad():
    x, packed, gamma, A, B, bias = parts()
    good = bitlinear_lowrank(x, packed, gamma, A, B, bias, in_features=K)
    x[2, 3], x[4, 0] = float("nan"), float("inf")
    bad = bitlinear_lowrank(x, packed, gamma, A, B, bias, in_features=K)
    assert bad[[2, 4]].isnan().all()
    others = [0, 1, 3, 5, 6]
    assert_same_bits(bad[others], good[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_out_dtype(dtype):
    x, packed, gamma, A, B, bias = parts()
    with torch.autocast("cpu", dtype):
        y = bitlinear_lowrank(x, packed, gamma, A, B, bias, in_features=K)
    narrow = [tensor.to(dtype) for tensor in (x, A, B, bias)]
    expected = bitlinear_lowrank(narrow[0], packed, gamma, *narrow[1:], in_features=K)
    assert_same_bits(y, expected)
    wide = bitlinear_lowrank(narrow[0], packed, gamma, *narrow[1:], in_features=K, out_dtype=torch.float32)
    assert_same_bits(wide.to(dtype), expected)
    x, A, B, bias = narrow
    ternary_part = linear_packed(x, packed, gamma, bias, in_features=K, out_dtype=torch.float32)
    assert_same_bits(wide, ternary_part + functional.linear(functional.linear(x, B), A).float())  # rounded once


@pytest.mark.row("R9")
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: {"A": p["A"][:-1]}, r"A must have shape \[24, 5\], got \[23, 5\]"),
        (lambda p: {"B": p["B"][:, :-1]}, r"B must have shape \[5, 40\], got \[5, 39\]"),
        (lambda p: {"B": p["B"][:-1]}, r"B must have shape \[5, 40\], got \[4, 40\]"),
        (lambda p: {"A": p["A"][0]}, r"A must have shape \[24, 0\], got \[5\]"),
        (lambda p: {"A": p["A"].double()}, "A must be float32 like x, got float64"),
        (lambda p: {"B": p["B"].bfloat16()}, "B must be float32 like x, got bfloat16"),
        (lambda p: {"A": p["A"].to("meta")}, "A must be on the device of x"),
        (lambda p: {"out_dtype": torch.int32}, "out_dtype must be float32, bfloat16 or float16, got int32"),
    ],
)
def test_bad_calls(change, text):
    names = ("x", "packed", "gamma", "A", "B", "bias")
    given = dict(zip(names, parts(), strict=True))
    with pytest.raises(RuntimeError, match=f"^pyops::bitlinear_lowrank: {text}"):
        bitlinear_lowrank(**(given | change(given)), in_features=K)
    with pytest.raises(TypeError, match=r"^pyops::bitlinear_lowrank: B must be a Tensor"):
        bitlinear_lowrank(**(given | {"B": None}), in_features=K)


@pytest.mark.row("R24")
def test_compiled_whole():
    torch._dynamo.reset()
    given = parts()

    def function(*args):
        return bitlinear_lowrank(*args, in_features=K)

    run = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(*given), function(*given))


# ---- the module ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["t2", "t5"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_packing_with_a_correction(fmt, dtype):
    """The layer computes the function; its error against the float layer falls as the rank grows."""
    torch.manual_seed(0)
    layer = BitLinear(K, N, act_bits=None, dtype=dtype)
    linear, x = layer.to_linear(), torch.randn(64, K).to(dtype)
    errors = []
    for rank in (0, 6, 12, 24):
        packed = layer.pack(fmt, lorc_rank=rank)
        errors.append((packed(x) - linear(x)).float().norm().item())
        if rank == 0:
            assert packed.lowrank_A is None
            continue
        assert packed.lowrank_A.shape == (N, rank)
        assert packed.lowrank_A.dtype == dtype
        assert not packed.lowrank_A.requires_grad
        y = bitlinear_lowrank(
            x, packed.weight_packed, packed.weight_gamma, packed.lowrank_A, packed.lowrank_B, packed.bias, fmt=fmt,
            in_features=K, act=None,
        )  # fmt: skip
        assert_accurate(packed(x), y, y.double())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.03 * errors[0]


def test_state_and_copies():
    torch.manual_seed(0)
    packed, x = BitLinear(K, N).pack(lorc_rank=3), torch.randn(4, K)
    state = packed.state_dict()
    assert set(state) == {
        "weight_packed", "weight_gamma", "bias", "weight_header", "lowrank_A", "lowrank_B",
    }  # fmt: skip
    for assign in (False, True):
        other = PackedBitLinear(K, N, lorc_rank=3)
        other.load_state_dict(state, assign=assign)
        assert_same_bits(other(x), packed(x))
    assert_same_bits(copy.deepcopy(packed)(x), packed(x))
    half = copy.deepcopy(packed).half()
    assert (half.lowrank_A.dtype, half.weight_gamma.dtype) == (torch.float16, torch.float32)
    assert half(x.half()).dtype == torch.float16
    for wrong in (PackedBitLinear(K, N), PackedBitLinear(K, N, lorc_rank=2)):
        before = wrong.weight_packed.clone()
        with pytest.raises(pyops.FormatError, match="lowrank_A must"):
            wrong.load_state_dict(state)
        assert torch.equal(wrong.weight_packed, before)
    assert "rank=3" in repr(packed)
    dense = packed.to_linear().weight
    ternary = unpack(packed.weight_packed, "t2", K)
    expected = (
        dequantized(ternary, packed.weight_gamma, torch.float64) + packed.lowrank_A.double() @ packed.lowrank_B.double()
    )
    assert_accurate(dense.detach(), expected.float(), expected.detach())


def test_alpha():
    packed, gamma, A, B = low_rank_compensation(weight_of(), RANK)
    x = torch.randn(4, K)
    layer = PackedBitLinear.from_packed(
        packed, gamma, fmt="t2", in_features=K, out_features=N, lowrank=(A, B), alpha=0.25
    )
    assert_same_bits(layer(x), bitlinear_lowrank(x, packed, gamma, A, B, in_features=K, alpha=0.25))
    assert "alpha=0.25" in repr(layer)


def test_adapters_train_on_frozen_weights():
    """Only A and B change; the loss falls as theirs alone can make it."""
    torch.manual_seed(0)
    packed, gamma, A, B = low_rank_compensation(weight_of(), 4)
    factors = [nn.Parameter(torch.zeros_like(A)), nn.Parameter(torch.randn_like(B) * 0.1)]
    layer = PackedBitLinear.from_packed(
        packed, gamma, torch.zeros(N), fmt="t2", in_features=K, out_features=N, lowrank=tuple(factors)
    )
    assert layer.lowrank_A is factors[0]
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    x = torch.randn(128, K)
    target = functional.linear(x, weight_of())
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(200):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    best = (bitlinear_lowrank(x, packed, gamma, A, B, in_features=K) - target).square().mean().item()
    assert losses[-1] < 0.9 * losses[0]
    assert losses[-1] < 1.2 * best
    for name, tensor in layer.named_buffers():
        assert_same_bits(tensor, before[name], name)
    PackedBitLinear(K, N, lorc_rank=4).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("way", ["convert", "pack"])
def test_models(way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 8)).eval()
    x = torch.randn(16, K)
    dense, errors = model(x), []
    for rank in (0, 4, 8):
        ours = copy.deepcopy(model)
        if way == "convert":
            pyops.convert(ours, PackedBitLinear, lorc_rank=rank)
        else:
            pyops.convert(ours, BitLinear)
            pyops.pack(ours, lorc_rank=rank)
        errors.append((ours(x) - dense).norm().item())
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    with pytest.raises(ValueError, match=r"layer 2: pyops::low_rank_compensation: rank must be in \[0, 8\], got 9"):
        pyops.convert(model, PackedBitLinear, include="2", lorc_rank=9)
