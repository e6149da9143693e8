"""The Triton launchers of the ternary family against the ops in torch code, interpreted on the CPU.

Integers, scales and the forward agree to the last bit, float sums by the accuracy rule. The interpreter checks values,
masks and addresses, not layouts, machine code or the inline assembly, whose portable twins it runs: the first two are
for tests/triton_offline.py. On a machine with a GPU and without TRITON_INTERPRET=1 the same tests run compiled.
"""

from __future__ import annotations

import gc
import itertools
import math
import os

import pytest
import torch
from contract import assert_accurate, assert_same_bits

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import triton
import triton.language as tl
from pyops.triton_kernels.ternary import (
    _common,
    _configs,
    bitlinear,
    linear,
    quantize_activation,
    quantize_weight,
    repack,
)

import pyops
from pyops import _environment
from pyops.ternary import reference, reference_ops
from pyops.ternary._formats import FORMATS

# Interpreted lanes multiply infinities by zero and overflow before they are masked, as lanes on a GPU do.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)
FLOATING = (torch.float32, torch.bfloat16, torch.float16)
T2 = FORMATS.index("t2")
NAN, INF = math.nan, math.inf
every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=str)


# ------------------------------------------------------------------------------------------------------- helpers


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def draw_ternary(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + rows + 3 * columns)
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8, generator=generator).to(DEVICE)


def encoded(ternary: torch.Tensor, form: int) -> torch.Tensor:
    return ternary if form == 0 else reference_ops.encode(ternary, FORMATS[form])


def assert_same(actual: tuple, expected: tuple, what: str = "") -> None:
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(one, other, f"{what} output {i}")


def layouts(tensor: torch.Tensor):
    """The same values of a matrix behind other strides, padded with what would show."""
    yield "transposed", tensor.t().contiguous().t()
    poison = torch.full((2 * tensor.shape[0], 2 * tensor.shape[1] + 3), 77, dtype=tensor.dtype, device=DEVICE)
    for name, view in (
        ("padded", poison[: tensor.shape[0], 3 : 3 + tensor.shape[1]]),
        ("steps", poison[::2, 1 : 2 * tensor.shape[1] : 2]),
    ):
        view.copy_(tensor)
        yield name, view


def forward(x, packed, gamma, bias=None, act_bits=8, qmax=127, eps=1e-5, out_dtype=None, form=T2, module=linear):
    arguments = (x, packed, gamma, bias, form, packed.shape[0], x.shape[1], act_bits, qmax, eps, out_dtype)
    return module.ternary_linear(*arguments)


def check_forward(x, ternary, gamma, bias=None, **options) -> torch.Tensor:
    """The forward, which equals the op in torch code to the last bit."""
    packed = encoded(ternary, T2)
    y = forward(x, packed, gamma, bias, **options)
    assert_same_bits(y, forward(x, packed, gamma, bias, **options, module=reference_ops), f"{x.shape} {options}")
    return y


def gammas(rows: int, columns: int) -> list[torch.Tensor]:
    """One per tensor, per row, and per group where there are groups."""
    found = [torch.tensor(0.037, device=DEVICE), draw(rows).abs() + 0.1]
    return found + ([draw(rows, columns // 256).abs() + 0.1] if columns % 256 == 0 else [])


# ----------------------------------------------------------------------------------------------------- activations

# Tiles hold 512, 2048 and 8192 columns, slabs counted with their padding; the longest tile is walked.
WIDTHS = (0, 1, 7, 511, 512, 513, 2048, 2049, 8200)


@every_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_activations(width, dtype):
    qmax = (127, 128)[width % 2]
    x = draw(7, width, dtype=dtype) * 3
    if width > 4:
        x[1, width // 2], x[2, -1], x[3] = NAN, -INF, 0
        x[4] *= 1e-7
        x[5, : width // 2] = -x[5].abs().max()
    expected = reference_ops.ternary_quantize_activation(x, qmax, 1e-5)
    assert_same(quantize_activation.ternary_quantize_activation(x, qmax, 1e-5), expected)
    both = quantize_activation.quantize(x, qmax, 1e-5, natural=True, slabs=True)
    assert_same((both.values, both.step, both.sums), expected)
    by_column = both.slabs.transpose(1, 2).flatten(1)
    assert_same_bits(by_column[:, :width].contiguous(), expected[0])
    assert not by_column[:, width:].any(), "the padding of slabs is multiplied"


def test_activations_round_ties_to_even_and_saturate():
    x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -127, -2.5, 126.5]], device=DEVICE)
    q, step, total = quantize_activation.ternary_quantize_activation(x, 127, 1e-5)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -127, -2, 126]]
    assert (step.item(), total.item()) == (1.0, 126)
    q, step, _ = quantize_activation.ternary_quantize_activation(torch.tensor([[4.0, -4.0]], device=DEVICE), 128, 1e-5)
    assert q.tolist() == [[127, -128]]
    assert step.item() == 4 / 128


@pytest.mark.parametrize("eps", [1e-5, 1e-45, 1e30])
def test_activations_at_the_ends_of_float32(eps):
    x = torch.tensor([[3.4e38, -1.0, 1e38], [1e-45, 0, -1e-45], [1e-38, 3e-39, 0]], device=DEVICE)
    expected = reference_ops.ternary_quantize_activation(x, 127, eps)
    assert_same(quantize_activation.ternary_quantize_activation(x, 127, eps), expected)


# --------------------------------------------------------------------------------------------------------- weights


@every_dtype
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("measure", [0, 1], ids=["mean", "median"])
def test_weights(measure, per_row, dtype):
    """Sizes around one part and one step of 2048 weights; a weight that is not finite; both ways to add eps."""
    for (rows, columns), bad, add_eps in zip(
        ((1, 1), (2, 2), (3, 7), (5, 2100), (1, 2049), (9, 64), (4, 33)),
        (None, None, NAN, None, None, -INF, None),
        itertools.cycle((False, True)),
        strict=False,
    ):
        weight = draw(rows, columns, dtype=dtype) * 0.05
        if bad is not None:
            weight[rows // 2, -1] = bad
        arguments = (weight, None, measure, per_row, 1e-3, add_eps)
        expected = reference_ops.ternary_quantize_weight(*arguments)
        assert_same(quantize_weight.ternary_quantize_weight(*arguments), expected, f"{rows}x{columns}")


@pytest.mark.parametrize("measure", [0, 1], ids=["mean", "median"])
def test_weights_with_a_given_scale(measure):
    weight = draw(5, 130) * 0.3
    weight[1, 3] = NAN
    for per_row, scale in ((False, torch.tensor(0.2)), (True, torch.tensor([0.2, 0.3, 0.0, -0.1, INF]))):
        for add_eps in (False, True):
            arguments = (weight, scale.to(DEVICE), measure, per_row, 1e-5, add_eps)
            expected = reference_ops.ternary_quantize_weight(*arguments)
            assert_same(quantize_weight.ternary_quantize_weight(*arguments), expected)


def test_weights_at_half_of_gamma_round_to_zero():
    weight = torch.tensor([[0.5, -0.5, 0.5000001, -0.5000001, 2.0, -0.0]], device=DEVICE)
    packed, gamma = quantize_weight.ternary_quantize_weight(
        weight, torch.tensor(1.0, device=DEVICE), 0, False, 0.0, False
    )
    assert gamma.item() == 1
    assert reference_ops.decode(packed, "t2", 1, 6).tolist() == [[1, 1, 2, 0, 2, 1]]
    assert packed.tolist() == [[0b00100101, 0b01010110]], "padding must be code 1"


@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
def test_median_is_the_lower_one_and_exact(per_row):
    """Of few and of many, of equal magnitudes, of those that differ in the last bit, of subnormal ones."""
    near = torch.nextafter(torch.ones(1), torch.full((1,), 2.0)).item()
    for row in ([4.0, -1.0, 3.0, 2.0], [near, 1.0, 1.0], [near, near, 1.0], [1e-45, -3e-45, 0.0], [-2.5] * 9,
                list(range(4097)), [3e38, 1e-38, 1.0, 1e30]):  # fmt: skip
        weight = torch.tensor([row], device=DEVICE, dtype=torch.float32)
        _, gamma = quantize_weight.ternary_quantize_weight(weight, None, 1, per_row, 0.0, False)
        assert gamma.item() == sorted(torch.tensor(row).abs().tolist())[(len(row) - 1) // 2]


# ----------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    "pair", list(itertools.permutations(range(6), 2)), ids=lambda p: f"{FORMATS[p[0]]}-{FORMATS[p[1]]}"
)
def test_repack(pair):
    rows, columns = 17 if pair[1] in (0, 3, 4, 5) else 9, 133
    ternary = draw_ternary(rows, columns)
    source = encoded(ternary, pair[0])
    result = repack.ternary_repack(source, *pair, rows, columns)
    assert_same_bits(result, encoded(ternary, pair[1]))


def test_repack_of_long_rows():
    ternary = draw_ternary(2, 4500)
    assert_same_bits(repack.ternary_repack(ternary, 0, T2, 2, 4500), encoded(ternary, T2))
    packed = encoded(ternary, T2)
    assert_same_bits(repack.ternary_repack(packed.t().contiguous().t(), T2, 0, 2, 4500), ternary)


def _message(op, *arguments) -> str | None:
    try:
        op(*arguments)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("form", range(6), ids=FORMATS)
def test_codes_without_a_weight(form):
    """The same error as of the op in torch code, byte for byte; what lies in the padding does not count."""
    rows, columns = (3, 37) if form < 3 else (17, 137)
    packed = encoded(draw_ternary(rows, columns), form)
    flat = packed.reshape(packed.shape[0], -1)
    gamma, said = torch.ones((), device=DEVICE), set()
    for row, column in ((0, 0), (-1, 5), (-1, -1)):
        broken = flat.clone()
        broken[row, column] = 5 if form == 0 else 255
        broken = broken.reshape(packed.shape)
        arguments = (broken, form, (form + 1) % 6, rows, columns)
        expected = _message(reference_ops.ternary_repack, *arguments)
        assert _message(repack.ternary_repack, *arguments) == expected
        said.add(expected)
        if form in (T2, FORMATS.index("t5")):
            arguments = (draw(1, columns), broken, gamma, None, form, rows, columns, 8, 127, 1e-5, None)
            wanted = _message(reference_ops.ternary_linear, *arguments)
            assert _message(linear.ternary_linear, *arguments) == wanted is not None
            arguments = (draw(1, rows), broken, gamma, form, columns)
            wanted = _message(reference_ops.ternary_linear_backward_input, *arguments)
            assert _message(linear.ternary_linear_backward_input, *arguments) == wanted is not None
    assert any(said)
    assert (None in said) == (form > 2), "the last bytes of a padded layout"


def test_padding_of_t2_may_be_anything():
    packed = encoded(draw_ternary(3, 6), T2)
    x = draw(5, 6)
    expected = forward(x, packed, torch.ones((), device=DEVICE))
    for byte in range(3):
        packed[byte, 1] |= 0xF0
    assert_same_bits(forward(x, packed, torch.ones((), device=DEVICE)), expected)


def test_weights_are_asked_about_once(monkeypatch):
    """A question waits for the device: one for each tensor until it changes, none for what the kernels packed."""
    asked = []
    original = _common.reject_invalid

    def counted(*arguments):
        asked.append(arguments[1:3])
        original(*arguments)

    monkeypatch.setattr(_common, "reject_invalid", counted)
    x, gamma = draw(2, 8), torch.ones((), device=DEVICE)
    packed, _ = quantize_weight.ternary_quantize_weight(draw(3, 8), None, 0, False, 1e-5, False)
    forward(x, packed, gamma)
    linear.ternary_linear_backward_input(draw(2, 3), packed, gamma, T2, 8)
    assert asked == []
    other = packed.clone()
    for _ in range(3):
        forward(x, other, gamma)
    assert asked == [("ternary_linear", "packed")]
    other[0, 0] = 255
    for _ in range(2):
        with pytest.raises(ValueError, match=r"got 3 at \[0, 0\]"):
            forward(x, other, gamma)
    assert len(asked) == 3
    remembered = len(_common._checked)
    del packed, other
    gc.collect()
    assert len(_common._checked) < remembered


# ----------------------------------------------------------------------------------------------------------- forward

# Few tokens with and without whole words of weights; one tile and more of each kind; rows cut into parts.
SHAPES = ((1, 5, 64), (2, 40, 1040), (3, 33, 2064), (4, 5, 37), (5, 70, 100), (17, 65, 257), (33, 9, 2064), (6, 1, 3))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_forward(shape):
    tokens, rows, columns = shape
    turn = SHAPES.index(shape)
    ternary = draw_ternary(rows, columns)
    for i, gamma in enumerate(gammas(rows, columns)[:2]):
        dtype = FLOATING[(turn + i) % 3]
        x = draw(tokens, columns, dtype=dtype)
        bias = draw(rows, dtype=dtype, seed=1) if (turn + i) % 2 else None
        check_forward(x, ternary, gamma, bias, qmax=(127, 128)[i], out_dtype=FLOATING[turn % 3] if i else None)


def test_forward_where_tokens_are_not_finite():
    x = draw(6, 64)
    x[1, 0], x[3, 63], x[4] = NAN, INF, 0
    y = check_forward(x, draw_ternary(9, 64), torch.tensor(0.5, device=DEVICE), draw(9))
    assert y.isnan().all(1).tolist() == [False, True, False, True, False, False]
    assert_same_bits(y[4], draw(9), "a token of zeros leaves the bias")


@pytest.mark.parametrize("tokens", [1, 5])
def test_sums_do_not_saturate(tokens):
    """T = 1 and q = 127 throughout: exactly 127 K."""
    columns = 20000
    ternary = torch.ones((3, columns), dtype=torch.int8, device=DEVICE)
    x = torch.full((tokens, columns), 127.0, device=DEVICE)
    y = forward(x, encoded(ternary, T2), torch.ones((), device=DEVICE))
    assert (y == 127 * columns).all()


def test_every_tile_gives_the_same_bits():
    """All shipped tiles, rows whole and cut into parts, and the kernel of few tokens."""
    rows, columns = 70, 1040
    ternary, gamma = draw_ternary(rows, columns), draw(rows).abs()
    packed, x, bias = encoded(ternary, T2), draw(4, columns), draw(rows)
    expected = reference_ops.ternary_linear(x, packed, gamma, bias, T2, rows, columns, 8, 127, 1e-5, None)
    q = quantize_activation.quantize(x, 127, 1e-5, natural=False, slabs=True)
    for tile in sorted({tile for table in _configs.BY_ARCHITECTURE.values() for row in table.values() for tile in row}):
        y = torch.full_like(expected, NAN)
        linear._multiply_tiles(packed, q, gamma, bias, y, tile)
        assert_same_bits(y, expected, f"{tile}")
    y = torch.full_like(expected, NAN)
    linear._multiply_few(packed, q, gamma, bias, y)
    assert_same_bits(y, expected, "few tokens")


def test_rows_are_cut_into_parts(monkeypatch):
    """Which sizes reach the kernel that adds parts, so that the tests above cover both ways."""
    parts = []
    finish = linear._finish
    monkeypatch.setattr(linear, "_finish", lambda sums, *rest: (parts.append(sums.shape[0]), finish(sums, *rest)))
    for tokens, columns in ((1, 1040), (4, 3088), (33, 2064), (5, 100)):
        forward(draw(tokens, columns), encoded(draw_ternary(3, columns), T2), torch.ones((), device=DEVICE))
    assert parts == [2, 4, 2]


@pytest.mark.parametrize("form", range(6), ids=FORMATS)
def test_forward_and_gradient_of_every_format(form):
    rows, columns = 17, 140
    ternary, gamma = draw_ternary(rows, columns), draw(rows).abs()
    packed, x, grad = encoded(ternary, form), draw(3, columns), draw(3, rows)
    arguments = (x, packed, gamma, None, form, rows, columns, 8, 127, 1e-5, None)
    assert_same_bits(linear.ternary_linear(*arguments), reference_ops.ternary_linear(*arguments))
    dx = linear.ternary_linear_backward_input(grad, packed, gamma, form, columns)
    t2 = linear.ternary_linear_backward_input(grad, encoded(ternary, T2), gamma, T2, columns)
    assert_same_bits(dx, t2)


def exact_product(x, ternary, gamma, bias=None, qmax=None):
    y = reference.linear(x.double(), ternary, gamma.double(), None, qmax=qmax, eps=1e-5)
    return y if bias is None else y + bias.double()


@every_dtype
@pytest.mark.parametrize("granularity", [0, 1, 2], ids=["tensor", "row", "group"])
def test_forward_of_activations_as_they_are(granularity, dtype):
    for tokens, rows, columns in ((3, 5, 256), (65, 66, 512)):
        gamma = gammas(rows, columns)[granularity]
        ternary, x, bias = draw_ternary(rows, columns), draw(tokens, columns, dtype=dtype), draw(rows, dtype=dtype)
        y = forward(x, encoded(ternary, T2), gamma, bias, act_bits=0)
        plain = torch.nn.functional.linear(x, reference.dequantized(ternary, gamma, dtype), bias)
        assert_accurate(y, plain, exact_product(x, ternary, gamma, bias))


def test_forward_of_activations_as_they_are_whatever_the_width():
    for columns in (1, 6, 129, 515):
        ternary, x, gamma = draw_ternary(5, columns), draw(2, columns), torch.tensor(0.3, device=DEVICE)
        y = forward(x, encoded(ternary, T2), gamma, act_bits=0)
        assert_accurate(y, x @ (ternary * gamma).T, exact_product(x, ternary, gamma))


@every_dtype
def test_forward_with_a_gamma_per_group(dtype):
    for tokens, rows, columns in ((2, 5, 256), (65, 67, 1024)):
        gamma = gammas(rows, columns)[2]
        ternary, x, bias = draw_ternary(rows, columns), draw(tokens, columns, dtype=dtype), draw(rows, dtype=dtype)
        y = forward(x, encoded(ternary, T2), gamma, bias, out_dtype=torch.float32)
        q, step = reference.quantize_activation(x)
        exact = (q.double() * step.double()) @ reference.dequantized(ternary, gamma, torch.float64).T + bias.double()
        plain = (q * step) @ reference.dequantized(ternary, gamma, torch.float32).T + bias.float()
        assert_accurate(y, plain, exact)


@pytest.mark.parametrize("kind", ["rounded", "groups", "as they are", "as they are, groups"])
def test_a_token_does_not_depend_on_its_batch(kind):
    columns = 512
    gamma = gammas(9, columns)[2 if "groups" in kind else 1]
    packed, x = encoded(draw_ternary(9, columns), T2), draw(70, columns)
    options = {"act_bits": 0 if "as they are" in kind else 8}
    whole = forward(x, packed, gamma, **options)
    for part in (slice(0, 1), slice(3, 7), slice(10, 50)):
        assert_same_bits(forward(x[part], packed, gamma, **options), whole[part], f"{part}")


# --------------------------------------------------------------------------------------------------------- gradients


@every_dtype
@pytest.mark.parametrize("granularity", [0, 1, 2], ids=["tensor", "row", "group"])
def test_gradient_of_x(granularity, dtype):
    for tokens, rows, columns in ((3, 5, 256), (66, 65, 512)):
        gamma = gammas(rows, columns)[granularity]
        ternary, grad = draw_ternary(rows, columns), draw(tokens, rows, dtype=dtype)
        dx = linear.ternary_linear_backward_input(grad, encoded(ternary, T2), gamma, T2, columns)
        exact = grad.double() @ reference.dequantized(ternary, gamma, torch.float64)
        assert dx.dtype == dtype
        assert_accurate(dx, grad @ reference.dequantized(ternary, gamma, dtype), exact)


@every_dtype
@pytest.mark.parametrize("out_dtype", FLOATING, ids=str)
def test_gradient_of_weight(dtype, out_dtype):
    for tokens, rows, columns in ((1, 3, 5), (40, 130, 131)):
        grad, x = draw(tokens, rows, dtype=dtype), draw(tokens, columns, dtype=dtype)
        q, step, _ = reference_ops.ternary_quantize_activation(x, 127, 1e-5)
        dw = bitlinear.bitlinear_backward_weight(grad, q, step, out_dtype)
        exact = (grad.double() * step.double()[:, None]).T @ q.double()
        plain = reference_ops.bitlinear_backward_weight(grad, q, step, out_dtype)
        assert dw.dtype == out_dtype
        assert_accurate(dw, plain, exact)


def test_gradients_of_integers_are_exact():
    """Sums that float32 holds: nothing may be lost to the pieces of the gradient, whatever its significand."""
    ternary, q = draw_ternary(40, 70), torch.randint(-128, 128, (9, 70), dtype=torch.int8, device=DEVICE)
    grad = torch.randint(-(2**12), 2**12, (9, 40), device=DEVICE).float()
    dx = linear.ternary_linear_backward_input(grad, encoded(ternary, T2), torch.ones((), device=DEVICE), T2, 70)
    assert torch.equal(dx, grad @ ternary.float())
    dw = bitlinear.bitlinear_backward_weight(grad, q, torch.ones(9, device=DEVICE), torch.float32)
    assert torch.equal(dw.double(), grad.double().T @ q.double())


@every_dtype
@pytest.mark.parametrize("granularity", [0, 1], ids=["tensor", "row"])
def test_gradients_that_are_not_finite(granularity, dtype):
    ternary, gamma = draw_ternary(5, 12), gammas(5, 12)[granularity]
    grad = draw(4, 5, dtype=dtype)
    grad[0, 1], grad[1, 2], grad[2, 0] = INF, NAN, -INF
    dx = linear.ternary_linear_backward_input(grad, encoded(ternary, T2), gamma, T2, 12)
    expected = reference_ops.ternary_linear_backward_input(grad, encoded(ternary, T2), gamma, T2, 12)
    assert torch.equal(dx.isnan(), expected.isnan())
    assert torch.equal(dx[dx.isinf()], expected[expected.isinf()])
    q, step = torch.ones((4, 3), dtype=torch.int8, device=DEVICE), torch.ones(4, device=DEVICE)
    dw = bitlinear.bitlinear_backward_weight(grad, q, step, dtype)
    assert_same_bits(dw.isnan(), reference_ops.bitlinear_backward_weight(grad, q, step, dtype).isnan())
    assert (dw[1] == INF).all()
    step[3] = NAN
    assert bitlinear.bitlinear_backward_weight(grad, q, step, dtype).isnan().all()


@triton.jit
def _store_pieces(values, pieces, COUNT: tl.constexpr):
    lane = tl.arange(0, COUNT)
    value = tl.load(values + lane)
    for i in tl.static_range(3):
        piece = _common.leading_piece(value)
        tl.store(pieces + i * COUNT + lane, piece)
        value = _common.remainder(value, piece)


def test_three_pieces_are_all_of_a_float32():
    """Down to the smallest number of bfloat16."""
    exact = [3.4028234663852886e38, 1.1754945e-38, 1e-45, -0.1, 16777215.0, 1 / 3, INF, -INF, NAN, 0.0]
    values = torch.tensor(exact + draw(54).tolist(), device=DEVICE)
    values.view(torch.int32)[-1] = 0x7F800001  # a NaN that is told from infinity by its last bit alone
    pieces = torch.empty(3, 64, device=DEVICE)
    _store_pieces[(1,)](values, pieces, COUNT=64)
    assert_same_bits(pieces.bfloat16().float(), pieces, "bfloat16 holds a piece")
    total, finite = pieces.double().sum(0), values.isfinite()
    assert ((total - values.double())[finite].abs() < 2.0**-133).all()
    assert torch.equal(total[3:6], values.double()[3:6])
    assert_same_bits(total[~finite].float(), values[~finite])


# -------------------------------------------------------------------------------------------------- training op


@every_dtype
@pytest.mark.parametrize("act_bits", [8, 0])
def test_bitlinear(act_bits, dtype):
    x, weight, bias = draw(5, 70, dtype=dtype), draw(9, 70, dtype=dtype), draw(9, dtype=dtype)
    x[2, 3] = NAN
    packed, gamma = reference_ops.ternary_quantize_weight(weight, None, 0, True, 1e-5, False)
    arguments = (x, weight, packed, gamma, bias, act_bits, 127, 1e-5)
    ours, expected = bitlinear.bitlinear(*arguments), reference_ops.bitlinear(*arguments)
    if act_bits:
        assert_same(ours, expected)
        return
    assert_same(ours[1:], expected[1:])
    ternary = reference_ops.decode(packed, "t2", 9, 70) - 1
    plain = torch.nn.functional.linear(x, reference.dequantized(ternary, gamma, dtype), bias)
    assert_accurate(ours[0], plain, exact_product(x, ternary, gamma, bias))


# ------------------------------------------------------------------------------------------------ layouts, no elements


@pytest.mark.parametrize("tokens", [3, 6])
def test_layouts(tokens):
    """Strides of every argument; results do not depend on them."""
    x, weight, grad = draw(tokens, 64), draw(9, 64), draw(tokens, 9)
    packed, _ = quantize_weight.ternary_quantize_weight(weight, None, 0, False, 1e-5, False)
    wide = draw(2, 18).abs()
    gamma, bias = wide[0, ::2], wide[1, 1::2]
    q, step, _ = quantize_activation.ternary_quantize_activation(x, 127, 1e-5)
    y = forward(x, packed, gamma.contiguous(), bias.contiguous())
    dx = linear.ternary_linear_backward_input(grad, packed, gamma.contiguous(), T2, 64)
    dw = bitlinear.bitlinear_backward_weight(grad, q, step, torch.float32)
    for name, view in layouts(x):
        assert_same_bits(forward(view, packed, gamma, bias), y, name)
        assert_same_bits(quantize_activation.ternary_quantize_activation(view, 127, 1e-5)[0], q, name)
    for name, view in layouts(packed):
        assert_same_bits(forward(x, view, gamma, bias), y, name)
        assert_same_bits(linear.ternary_linear_backward_input(grad, view, gamma, T2, 64), dx, name)
    for name, view in layouts(weight):
        assert_same_bits(quantize_weight.ternary_quantize_weight(view, None, 0, False, 1e-5, False)[0], packed, name)
    for name, view in layouts(grad):
        assert_same_bits(linear.ternary_linear_backward_input(view, packed, gamma, T2, 64), dx, name)
        assert_same_bits(bitlinear.bitlinear_backward_weight(view, q, step, torch.float32), dw, name)
    for name, view in layouts(q):
        steps = step.repeat_interleave(2)[::2]
        assert_same_bits(bitlinear.bitlinear_backward_weight(grad, view, steps, torch.float32), dw, name)
    expanded = grad[:, :1].expand(tokens, 9)
    assert_same_bits(
        linear.ternary_linear_backward_input(expanded, packed, gamma, T2, 64),
        linear.ternary_linear_backward_input(expanded.contiguous(), packed, gamma, T2, 64),
    )
    offset = torch.empty(packed.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view_as(packed).copy_(packed)
    assert_same_bits(forward(x, offset, gamma, bias), y, "bytes off a word")


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 0), (0, 0, 0)], ids=str)
def test_no_elements(shape):
    tokens, rows, columns = shape
    x, weight, grad, bias = draw(tokens, columns), draw(rows, columns), draw(tokens, rows), draw(rows)
    for measure, per_row in itertools.product((0, 1), (False, True)):
        arguments = (weight, None, measure, per_row, 1e-5, False)
        expected = reference_ops.ternary_quantize_weight(*arguments)
        assert_same(quantize_weight.ternary_quantize_weight(*arguments), expected)
    packed = expected[0]
    for gamma, act_bits in itertools.product(gammas(rows, columns), (8, 0)):
        check_forward(x, weight.sign().to(torch.int8), gamma, bias, act_bits=act_bits)
        arguments = (x, weight, packed, gamma, bias, act_bits, 127, 1e-5)
        assert_same(bitlinear.bitlinear(*arguments), reference_ops.bitlinear(*arguments))
        dx = linear.ternary_linear_backward_input(grad, packed, gamma, T2, columns)
        assert_same_bits(dx, torch.zeros(tokens, columns, device=DEVICE))
    q, step, _ = quantize_activation.ternary_quantize_activation(x, 127, 1e-5)
    dw = bitlinear.bitlinear_backward_weight(grad, q, step, torch.float32)
    assert_same_bits(dw, torch.zeros(rows, columns, device=DEVICE))
    ternary = draw_ternary(rows, columns)
    assert_same_bits(repack.ternary_repack(encoded(ternary, T2), T2, 2, rows, columns), encoded(ternary, 2))


# ------------------------------------------------------------------------------------------------------------ support


def test_reasons_against(monkeypatch):
    x = torch.ones(2, 3, device="meta")
    modules = (quantize_activation, quantize_weight, repack, linear, bitlinear)
    for module in modules:
        assert module.reasons_against("any", x.to(DEVICE) if DEVICE == "cuda" else torch.ones(2, 3)) == []
        assert "meta" in module.reasons_against("any", x)[0]
    monkeypatch.setattr(_common.INTERPRETED, "value", False)
    for module in modules:
        assert "TRITON_INTERPRET" in module.reasons_against("any", torch.ones(2, 3))[0]


@pytest.mark.routed
def test_the_dispatcher_finds_every_op():
    x, weight = draw(3, 32), draw(5, 32)
    one, ternary = torch.ones((), device=DEVICE), draw_ternary(5, 32)
    calls = {
        "ternary_quantize_weight": (weight, None, 1, True, 1e-5, False),
        "ternary_quantize_activation": (x, 127, 1e-5),
        "ternary_repack": (ternary, 0, 4, 5, 32),
        "ternary_linear": (x, encoded(ternary, 5), one, None, 5, 5, 32, 8, 127, 1e-5, None),
        "ternary_linear_backward_input": (draw(3, 5), encoded(ternary, 2), one, 2, 32),
        "bitlinear": (x, weight, encoded(ternary, 1), one, None, 8, 127, 1e-5),
        "bitlinear_backward_weight": (draw(3, 5), draw_ternary(3, 32), one.expand(3), torch.float32),
    }
    results = []
    for backend in ("triton", "reference"):
        with pyops.use_backend(backend):
            results.append({name: getattr(torch.ops.pyops, name)(*arguments) for name, arguments in calls.items()})
    for name, ours in results[0].items():
        torch.testing.assert_close(ours, results[1][name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("architecture", [70, 80, 86, 90, 100, 120])
def test_there_is_a_tile_for_every_number_of_tokens(architecture):
    for tokens in (1, 16, 17, 64, 65, 128, 129, 1 << 40):
        for tile in _configs.configs(architecture, tokens):
            assert tile.rows % 16 == 0
            assert _common.SLAB_STEP % tile.bytes == 0, "a step would leave the padding of the slabs"
            assert tile.tokens < 2 * triton.next_power_of_2(tokens) or tile.tokens == 16


def test_tiles_are_timed_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(_configs, "_found", {})
    device, ran = torch.device("cpu"), []
    candidates = _configs.configs(90, 100)

    def time(call):
        call()
        return -len(ran)  # the last one is the quickest

    def choose(tokens):
        return _configs.choose(device, tokens, 64, 64, ran.append, time)

    assert choose(100) == candidates[0]
    assert ran == []
    monkeypatch.setitem(_environment.values, "PYOPS_AUTOTUNE", "1")
    assert choose(100) == candidates[-1]
    assert choose(128) == candidates[-1], "the same power of two"
    assert ran == list(candidates)
    assert choose(200) == ran[-1] != candidates[-1]
