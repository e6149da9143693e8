"""The CUDA kernels of the ternary family, emulated, against the ops in torch code.

Integers, scales and the forward on 8-bit activations agree to the last bit, float sums by the accuracy rule. Run by
``make emulate``, a second time under the checker; there the large shapes are left out, and schedules vary.
"""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch
from contract import assert_accurate, assert_same_bits

from pyops import _emulation
from pyops.ternary import reference, reference_ops
from pyops.ternary._formats import FORMATS, GROUP

pytestmark = pytest.mark.parametrize("backend", ["cuda-emulated"], indirect=True)

CHECKED = os.environ.get("PYOPS_CUDA_EMU") == "check"
FLOATING = (torch.float32, torch.bfloat16, torch.float16)
INT8, T2, T2MMA = (FORMATS.index(name) for name in ("int8", "t2", "t2mma"))
NAN, INF = math.nan, math.inf
EPS = 1e-5
every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=str)
unchecked = pytest.mark.skipif(CHECKED, reason="large; the checker sees the same code on smaller shapes")


# ---- helpers -----------------------------------------------------------------------------------------------


def run(name: str, *args):
    result = getattr(torch.ops.pyops, name)(*args)
    return result if isinstance(result, tuple) else (result,)


def expected(name: str, *args):
    result = getattr(reference_ops, name)(*args)
    return result if isinstance(result, tuple) else (result,)


def check_bits(name: str, *args, what: object = "") -> None:
    for i, (one, other) in enumerate(zip(run(name, *args), expected(name, *args), strict=True)):
        assert one.is_contiguous()
        assert_same_bits(one, other, f"{name} output {i} {what}")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def draw_ternary(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + rows + 3 * columns)
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8, generator=generator)


def encoded(ternary: torch.Tensor, form: int = T2MMA) -> torch.Tensor:
    return ternary if form == INT8 else reference_ops.encode(ternary, FORMATS[form])


def draw_gamma(granularity: str, rows: int, columns: int) -> torch.Tensor:
    shape = {"tensor": (), "row": (rows,), "group": (rows, columns // GROUP)}[granularity]
    return draw(*shape, seed=rows).abs() + 0.1


def linear_args(x, ternary, gamma, bias=None, *, form=T2MMA, act_bits=8, qmax=127, out_dtype=None):
    packed = encoded(ternary, form)
    return x, packed, gamma, bias, form, *ternary.shape, act_bits, qmax, EPS, out_dtype


def outcome(function, args: tuple) -> str | list:
    """The message of the ValueError, or what comes back: broken bytes in the padding are read by nobody."""
    try:
        return function(*args).tolist()
    except ValueError as error:
        return str(error)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element further: on no 16-byte boundary."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    view = memory[1:].view(tensor.shape)
    view.copy_(tensor)
    return view


def layouts(matrix: torch.Tensor):
    """The same values of a matrix behind other strides."""
    wide = torch.full((matrix.shape[0], matrix.shape[1] + 5), 77, dtype=matrix.dtype)
    wide[:, 3:-2] = matrix
    steps = torch.full((2 * matrix.shape[0], 2 * matrix.shape[1]), 77, dtype=matrix.dtype)
    steps[::2, ::2] = matrix
    return {
        "transposed": matrix.t().contiguous().t(),
        "rows of a wider one": wide[:, 3:-2],
        "every second": steps[::2, ::2],
        "misaligned": shifted(matrix),
    }


# ---- quantizers --------------------------------------------------------------------------------------------

# Around a vector of eight, around what a warp reads at once, and a row that does not fit a block's registers.
TOKEN_WIDTHS = (1, 2, 7, 8, 9, 16, 31, 64, 255, 256, 257, 511, 513, 1030)


@every_dtype
@pytest.mark.parametrize("qmax", [127, 128])
def test_quantize_activation(backend, dtype, qmax):
    for width in TOKEN_WIDTHS:
        check_bits("ternary_quantize_activation", draw(3, width, dtype=dtype), qmax, EPS, what=width)
    for shape in ((0, 5), (3, 0), (0, 0)):
        check_bits("ternary_quantize_activation", draw(*shape, dtype=dtype), qmax, EPS, what=shape)


@every_dtype
def test_quantize_activation_of_a_row_beyond_the_registers(backend, dtype):
    x = draw(1, 16384 + 24, dtype=dtype)
    x[0, -1] = 9.0  # the largest lies in what is read a second time
    check_bits("ternary_quantize_activation", x, 127, EPS)


@every_dtype
def test_quantize_activation_special_values(backend, dtype):
    x = draw(9, 40, dtype=dtype)
    x[0, 3], x[1, 39], x[2, 0] = NAN, INF, -INF
    x[3], x[4] = 0, torch.finfo(dtype).max
    x[5] = torch.finfo(dtype).smallest_normal / 4
    x[6] = torch.arange(40) - 20.5  # halves: ties to even
    x[6, 0] = 127
    x[7, 5] = -0.0
    for eps in (EPS, 2.0**-149, 1e30):
        check_bits("ternary_quantize_activation", x, 127, eps, what=eps)


@every_dtype
def test_quantize_activation_layouts(backend, dtype):
    x = draw(4, 72, dtype=dtype)
    for name, view in layouts(x).items():
        check_bits("ternary_quantize_activation", view, 128, EPS, what=name)
    check_bits("ternary_quantize_activation", x[:1].expand(3, -1), 127, EPS, what="expanded")


WEIGHT_SHAPES = ((0, 5), (3, 0), (1, 1), (1, 4), (5, 7), (4, 16), (9, 33), (3, 300), (17, 64))


@every_dtype
@pytest.mark.parametrize("measure", [0, 1], ids=reference.MEASURES)
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
def test_quantize_weight(backend, dtype, measure, per_row):
    for shape, add in itertools.product(WEIGHT_SHAPES, (False, True)):
        weight = draw(*shape, dtype=dtype)
        check_bits("ternary_quantize_weight", weight, None, measure, per_row, EPS, add, what=shape)


@pytest.mark.parametrize("measure", [0, 1], ids=reference.MEASURES)
def test_quantize_weight_in_several_parts(backend, measure):
    weight = draw(37, 1000) * torch.logspace(-3, 3, 37)[:, None]  # three blocks, ranks in all of them
    check_bits("ternary_quantize_weight", weight, None, measure, False, EPS, False)


@pytest.mark.parametrize("measure", [0, 1], ids=reference.MEASURES)
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
def test_quantize_weight_special_values(backend, measure, per_row):
    for value in (NAN, INF, -INF):
        weight = draw(4, 24)
        weight[2, 23] = value
        check_bits("ternary_quantize_weight", weight, None, measure, per_row, EPS, False, what=value)
    ties = torch.tensor([[0.5, -0.5, 1.5, 0.25], [1.0, -1.0, 1.0, 1.0]])
    for weight in (torch.zeros(3, 9), torch.full((3, 9), -0.75), ties, ties * 2.0**-140):
        for eps in (EPS, 0.0):
            check_bits("ternary_quantize_weight", weight, None, measure, per_row, eps, False, what=(weight, eps))


@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
def test_quantize_weight_with_a_scale(backend, per_row):
    weight = draw(5, 30, dtype=torch.bfloat16)
    scale = torch.tensor([0.5, 0.0, -1.0, NAN, INF]) if per_row else torch.tensor(0.8)
    for add, measure in itertools.product((False, True), (0, 1)):
        check_bits("ternary_quantize_weight", weight, scale, measure, per_row, EPS, add)
    weight[1, 1] = NAN
    check_bits("ternary_quantize_weight", weight, scale, 0, per_row, EPS, False)


# ---- formats -----------------------------------------------------------------------------------------------

PAIRS = tuple(itertools.permutations(range(len(FORMATS)), 2))
MATRIX_SHAPES = ((0, 5), (3, 0), (1, 1), (5, 7), (15, 127), (16, 128), (17, 129), (33, 260))


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda form: FORMATS[form])
def test_repack(backend, source, target):
    for shape in MATRIX_SHAPES:
        ternary = draw_ternary(*shape)
        got = torch.ops.pyops.ternary_repack(encoded(ternary, source), source, target, *shape)
        assert_same_bits(got, encoded(ternary, target), f"{shape}")


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda form: FORMATS[form])
def test_repack_names_the_first_invalid_code(backend, source, target):
    shape = (18, 131)
    broken = (
        (2, -2, -128, 127) if source == INT8 else (243, 255) if "t5" in FORMATS[source] else (0x57, 0x5D, 0x75, 0xD5)
    )
    for seed, value in enumerate(broken):
        packed = encoded(draw_ternary(*shape), source).clone()
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(0, packed.numel(), (3,), generator=generator)
        packed.view(-1)[places] = value
        args = packed, source, target, *shape
        assert outcome(torch.ops.pyops.ternary_repack, args) == outcome(reference_ops.ternary_repack, args)


@pytest.mark.parametrize("target", [form for form in range(len(FORMATS)) if form != T2], ids=lambda form: FORMATS[form])
def test_repack_reads_no_padding(backend, target):
    """Whatever stands behind in_features in the last byte of a row."""
    for columns in (129, 130, 131):
        ternary = draw_ternary(18, columns)
        packed = encoded(ternary, T2).clone()
        packed[:, -1] |= 0xFF << 2 * (columns % 4) & 0xFF
        got = torch.ops.pyops.ternary_repack(packed, T2, target, 18, columns)
        assert_same_bits(got, encoded(ternary, target), f"{columns}")


def test_repack_of_misaligned_bytes(backend):
    ternary = draw_ternary(18, 256)
    check_bits("ternary_repack", shifted(encoded(ternary, T2)), T2, T2MMA, 18, 256)


# ---- the product on 8-bit activations ----------------------------------------------------------------------


def test_linear_for_every_number_of_tokens_and_rows(backend):
    """1 to 40 of both, against each other; in_features around a chunk."""
    for tokens in range(1, 41):
        rows, columns = tokens * 7 % 40 + 1, (96, 127, 128, 129, 257)[tokens % 5]
        x, ternary = draw(tokens, columns), draw_ternary(rows, columns)
        gamma = draw_gamma(("tensor", "row")[tokens % 2], rows, columns)
        bias = draw(rows) if tokens % 3 else None
        check_bits("ternary_linear", *linear_args(x, ternary, gamma, bias), what=(tokens, rows, columns))


# Rows and tokens around the tiles; enough rows that in_features are not split, and then more of these than are asked
# for ahead: (tokens, out_features, in_features).
TILE_EDGES = (
    (1, 15, 1023), (1, 17, 4700), (2, 16, 1025), (3, 33, 300), (4, 17, 4700), (1, 2033, 4700), (2, 2033, 4200),
    (8, 16, 5000), (8, 17, 130), (9, 15, 128), (16, 17, 5000), (16, 33, 65),
    (8, 1041, 6000), (40, 2100, 2600),
    (17, 63, 2600), (32, 64, 513), (33, 65, 512), (31, 130, 2100), (65, 63, 100),
)  # fmt: skip


@pytest.mark.parametrize("shape", TILE_EDGES, ids=str)
def test_linear_at_tile_edges(backend, shape):
    tokens, rows, columns = shape
    x, ternary = draw(tokens, columns), draw_ternary(rows, columns)
    check_bits("ternary_linear", *linear_args(x, ternary, draw_gamma("row", rows, columns), draw(rows)))


# Enough tiles that the large ones are chosen: 12 x 11 and more of 128 x 128, of 128 x 64.
@unchecked
@pytest.mark.parametrize("shape", [(1281, 1409, 640), (650, 1537, 1100)], ids=str)
def test_linear_of_many_tokens(backend, shape):
    tokens, rows, columns = shape
    x, ternary = draw(tokens, columns), draw_ternary(rows, columns)
    check_bits("ternary_linear", *linear_args(x, ternary, torch.tensor(0.7)))


@pytest.mark.parametrize("shape", [(1281, 1409, 16), (650, 1537, 200)], ids=str)
def test_linear_of_many_tokens_and_few_columns(backend, shape):
    tokens, rows, columns = shape
    x, ternary = draw(tokens, columns), draw_ternary(rows, columns)
    if CHECKED:
        _emulation.sample(20)  # of the blocks, the last among them: for the checker alone
    try:
        got = run("ternary_linear", *linear_args(x, ternary, torch.tensor(0.7)))
    finally:
        if CHECKED:
            _emulation.sample(0)
    if not CHECKED:
        assert_same_bits(got[0], expected("ternary_linear", *linear_args(x, ternary, torch.tensor(0.7)))[0], "y")


@every_dtype
@pytest.mark.parametrize("tokens", [1, 3, 7, 12, 20])
def test_linear_dtypes(backend, dtype, tokens):
    rows, columns = 21, 140
    x, ternary = draw(tokens, columns, dtype=dtype), draw_ternary(rows, columns)
    for out_dtype, bias in ((None, draw(rows, dtype=dtype)), *((other, None) for other in FLOATING)):
        args = linear_args(x, ternary, torch.tensor(0.37), bias, qmax=128, out_dtype=out_dtype)
        check_bits("ternary_linear", *args, what=out_dtype)


@pytest.mark.parametrize("form", range(len(FORMATS)), ids=FORMATS)
@pytest.mark.parametrize("tokens", [1, 6])
def test_linear_formats(backend, form, tokens):
    x, ternary = draw(tokens, 135), draw_ternary(19, 135)
    check_bits("ternary_linear", *linear_args(x, ternary, torch.tensor(1.5), form=form))
    broken = encoded(ternary, form).clone()
    broken.view(-1)[3] = 5 if form == INT8 else 255
    if form == T2MMA:
        return  # checked when it was made
    with pytest.raises(ValueError, match=r"pyops::ternary_linear: packed must hold .* at \["):
        run("ternary_linear", x, broken, torch.tensor(1.5), None, form, 19, 135, 8, 127, EPS, None)


def test_linear_empty(backend):
    for tokens, rows, columns in ((0, 3, 4), (2, 0, 4), (1, 3, 0), (2, 3, 0), (9, 3, 0), (0, 0, 0)):
        x, ternary = draw(tokens, columns), draw_ternary(rows, columns)
        for bias, act_bits in itertools.product((None, draw(rows)), (8, 0)):
            args = linear_args(x, ternary, torch.tensor(2.0), bias, act_bits=act_bits)
            check_bits("ternary_linear", *args, what=(tokens, rows, columns))


@pytest.mark.parametrize("tokens", [1, 4, 8, 16, 40])
def test_linear_saturated(backend, tokens):
    """Every product at its largest: 127 * in_features, exactly."""
    columns = 20000 if tokens <= 16 else 5000
    x, ternary = torch.ones(tokens, columns), torch.ones(17, columns, dtype=torch.int8)
    gamma = torch.tensor(127.0)  # times a step of 1 / 127
    for sign in (1, -1):
        (y,) = run("ternary_linear", *linear_args(x, ternary * sign, gamma))
        step = torch.tensor(1.0) / 127
        assert (y == sign * torch.tensor(127.0 * columns) * (step * 127)).all()


@pytest.mark.parametrize("tokens", [1, 3, 6, 12, 20])
def test_linear_token_that_is_not_finite(backend, tokens):
    x, ternary = draw(tokens, 150), draw_ternary(18, 150)
    x[tokens // 2, 149] = INF
    (y,) = run("ternary_linear", *linear_args(x, ternary, torch.tensor(1.0)))
    assert y.isnan().all(1).tolist() == [token == tokens // 2 for token in range(tokens)]
    check_bits("ternary_linear", *linear_args(x, ternary, torch.tensor(1.0)))


@pytest.mark.parametrize("act_bits", [8, 0])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_linear_layouts(backend, tokens, act_bits):
    """Of x, packed weights, gamma and bias, one after the other: the same as contiguous, to the bit."""
    x, ternary = draw(tokens, 128), draw_ternary(18, 128)
    gamma, bias = draw_gamma("row", 18, 128), draw(18)
    args = list(linear_args(x, ternary, gamma, bias, act_bits=act_bits))
    (plain,) = run("ternary_linear", *args)
    variants = {0: list(layouts(x).values()), 1: [shifted(args[1])]}
    variants |= {i: [shifted(args[i]), torch.stack([args[i], args[i]], 1)[:, 0]] for i in (2, 3)}
    for position, views in variants.items():
        for view in views:
            (got,) = run("ternary_linear", *args[:position], view, *args[position + 1 :])
            assert_same_bits(got, plain, f"argument {position}, strides {view.stride()}")


@pytest.mark.parametrize("shape", [(1, 1, 256), (3, 17, 256), (20, 66, 512), (33, 130, 768)], ids=str)
@every_dtype
def test_linear_with_a_gamma_per_group(backend, shape, dtype):
    """Sums of a group are exact; 1e-6 of the sum of the terms' magnitudes."""
    tokens, rows, columns = shape
    x, ternary = draw(tokens, columns, dtype=dtype), draw_ternary(rows, columns)
    gamma, bias = draw_gamma("group", rows, columns), draw(rows, dtype=dtype)
    args = linear_args(x, ternary, gamma, bias, out_dtype=torch.float32)
    (got,) = run("ternary_linear", *args)
    q, step = reference.quantize_activation(x)
    weight = reference.dequantized(ternary.double(), gamma.double(), torch.float64)
    exact = (q.double() * step.double()) @ weight.T + bias.double()
    terms = (q.double().abs() * step.double()) @ weight.abs().T + bias.double().abs()
    assert ((got.double() - exact).abs() <= 1e-6 * terms).all()


# ---- the product on activations as they are, and the gradients ---------------------------------------------

FLOAT_SHAPES = ((1, 1, 1), (3, 17, 40), (16, 33, 65), (17, 144, 300), (70, 127, 256), (130, 20, 100))


def check_accuracy(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, what: object) -> None:
    assert got.is_contiguous()
    assert_accurate(got, plain, exact, str(what))


@every_dtype
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_linear_on_floats(backend, dtype, granularity):
    for tokens, rows, columns in FLOAT_SHAPES:
        columns = columns if granularity != "group" else GROUP * (1 + columns // 100)
        x, ternary = draw(tokens, columns, dtype=dtype), draw_ternary(rows, columns)
        gamma, bias = draw_gamma(granularity, rows, columns), draw(rows, dtype=dtype)
        (got,) = run("ternary_linear", *linear_args(x, ternary, gamma, bias, act_bits=0))
        weight = reference.dequantized(ternary, gamma, dtype)
        exact = reference.linear(x, ternary, gamma, bias, qmax=None, eps=EPS)
        check_accuracy(got, torch.nn.functional.linear(x, weight, bias), exact, (tokens, rows, columns))


@every_dtype
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_backward_input(backend, dtype, granularity):
    for tokens, rows, columns in FLOAT_SHAPES:
        columns = columns if granularity != "group" else GROUP * (1 + columns // 100)
        grad, ternary = draw(tokens, rows, dtype=dtype), draw_ternary(rows, columns)
        gamma = draw_gamma(granularity, rows, columns)
        (got,) = run("ternary_linear_backward_input", grad, encoded(ternary), gamma, T2MMA, columns)
        exact = grad.double() @ reference.dequantized(ternary, gamma, torch.float64)
        plain = grad @ reference.dequantized(ternary, gamma, dtype)
        check_accuracy(got, plain, exact, (tokens, rows, columns))


@pytest.mark.parametrize("form", range(len(FORMATS)), ids=FORMATS)
def test_backward_input_formats(backend, form):
    grad, ternary = draw(5, 19), draw_ternary(19, 135)
    plain = run("ternary_linear_backward_input", grad, encoded(ternary), torch.tensor(0.5), T2MMA, 135)
    got = run("ternary_linear_backward_input", grad, encoded(ternary, form), torch.tensor(0.5), form, 135)
    assert_same_bits(got[0], plain[0], FORMATS[form])


@every_dtype
@pytest.mark.parametrize("out_dtype", FLOATING, ids=str)
def test_backward_weight(backend, dtype, out_dtype):
    for tokens, rows, columns in FLOAT_SHAPES:
        grad = draw(tokens, rows, dtype=dtype)
        q, step = reference.quantize_activation(draw(tokens, columns, dtype=dtype))
        step = step[:, 0]
        (got,) = run("bitlinear_backward_weight", grad, q, step, out_dtype)
        assert got.dtype == out_dtype
        exact = (grad.double() * step.double()[:, None]).T @ q.double()
        plain = (grad.T @ (q.to(dtype) * step.to(dtype)[:, None])).to(out_dtype)
        assert got.is_contiguous()
        assert_accurate(got, plain, exact, f"{tokens, rows, columns}", working=dtype)


def test_backward_weight_of_every_byte(backend):
    """Each of the 256 values, and its place: a gradient that is 1 once."""
    q = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).reshape(2, 128)
    for dtype in FLOATING:
        (got,) = run("bitlinear_backward_weight", torch.eye(2, dtype=dtype), q, torch.ones(2), torch.float32)
        assert_same_bits(got, q.float(), str(dtype))


def test_gradients_empty(backend):
    for tokens, rows, columns in ((0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)):
        grad, packed = draw(tokens, rows), encoded(draw_ternary(rows, columns))
        check_bits("ternary_linear_backward_input", grad, packed, torch.tensor(2.0), T2MMA, columns)
        q = torch.zeros(tokens, columns, dtype=torch.int8)
        check_bits("bitlinear_backward_weight", grad, q, torch.ones(tokens), torch.float32)


@every_dtype
def test_gradient_layouts(backend, dtype):
    grad, ternary, gamma = draw(6, 40, dtype=dtype), draw_ternary(40, 72), draw_gamma("row", 40, 72)
    q, step = reference.quantize_activation(draw(6, 72))
    step = step[:, 0].contiguous()
    plain_input = run("ternary_linear_backward_input", grad, encoded(ternary), gamma, T2MMA, 72)[0]
    plain_weight = run("bitlinear_backward_weight", grad, q, step, torch.float32)[0]
    for name, view in layouts(grad).items():
        got = run("ternary_linear_backward_input", view, shifted(encoded(ternary)), shifted(gamma), T2MMA, 72)
        assert_same_bits(got[0], plain_input, name)
        got = run("bitlinear_backward_weight", view, q, shifted(step), torch.float32)
        assert_same_bits(got[0], plain_weight, name)
    for name, view in layouts(q).items():
        got = run("bitlinear_backward_weight", grad, view, step, torch.float32)
        assert_same_bits(got[0], plain_weight, name)
    ones = torch.ones((), dtype=dtype).expand(6, 40)  # of y.sum()
    got = run("ternary_linear_backward_input", ones, encoded(ternary), gamma, T2MMA, 72)
    same = run("ternary_linear_backward_input", ones.contiguous(), encoded(ternary), gamma, T2MMA, 72)
    assert_same_bits(got[0], same[0], "expanded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_float_product_special_values(backend, dtype):
    """What is not finite stays in its row, infinities keep their sign, the largest numbers do not overflow."""
    ternary = torch.ones(20, 24, dtype=torch.int8)
    x = draw(5, 24, dtype=dtype)
    x[0, 3], x[1, 23], x[2, 0] = NAN, INF, -INF
    x[3], x[3, 7] = 0, torch.finfo(dtype).max
    x[4] = torch.finfo(dtype).tiny
    (y,) = run("ternary_linear", *linear_args(x, ternary, torch.tensor(1.0), act_bits=0))
    assert y[0].isnan().all()
    for row, value in enumerate((INF, -INF, torch.finfo(dtype).max, 24 * torch.finfo(dtype).tiny), start=1):
        assert (y[row] == value).all()


# ---- bitlinear ---------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("columns", [128, 131])
def test_bitlinear(backend, dtype, columns):
    """Also what it saves; columns that are no multiple of sixteen need a copy."""
    for tokens, rows in ((1, 18), (3, 18), (9, 33), (20, 17), (0, 5), (4, 0)):
        x, weight, bias = draw(tokens, columns, dtype=dtype), draw(rows, columns, dtype=dtype), draw(rows, dtype=dtype)
        packed, gamma = expected("ternary_quantize_weight", weight, None, 0, False, EPS, False)
        check_bits("bitlinear", x, weight, packed, gamma, bias, 8, 127, EPS, what=(tokens, rows))
        y, quantized, step = run("bitlinear", x, weight, packed, gamma, bias, 0, 127, EPS)
        assert (quantized.shape, step.shape, y.dtype) == ((0, 0), (0,), dtype)
        ternary = reference_ops.ternary_of("bitlinear", "packed", packed, T2, rows, columns)
        plain = torch.nn.functional.linear(x, reference.dequantized(ternary, gamma, dtype), bias)
        assert_accurate(y, plain, reference.linear(x, ternary, gamma, bias, qmax=None, eps=EPS), str((tokens, rows)))


def test_invalid_codes_stop_what_does_not_wait(backend):
    packed = torch.full((4, 8), 0x55, dtype=torch.uint8)
    packed[2, 3] = 0xFF
    one = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="device-side assert"):
        run("bitlinear", draw(2, 32), draw(4, 32), packed, one, None, 8, 127, EPS)
    with pytest.raises(RuntimeError, match="device-side assert"):
        run("ternary_linear_backward_input", draw(2, 4), packed, one, T2, 32)


# ---- schedules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
def test_any_schedule(backend, seed):
    """Threads and blocks in random order, interrupted at memory accesses: the same bits."""
    ternary, gamma = draw_ternary(40, 600), torch.tensor(0.5)
    weight = draw(20, 200)
    q, step = reference.quantize_activation(draw(20, 40))
    calls = [
        ("ternary_quantize_activation", draw(3, 600), 127, EPS),
        ("ternary_quantize_weight", weight, None, 0, False, EPS, False),
        ("ternary_quantize_weight", weight, None, 1, False, EPS, False),
        ("ternary_quantize_weight", weight, None, 1, True, EPS, False),
        ("ternary_repack", encoded(ternary, T2), T2, T2MMA, 40, 600),
        *(("ternary_linear", *linear_args(draw(tokens, 600), ternary, gamma)) for tokens in (1, 3, 7, 20)),
        ("ternary_linear", *linear_args(draw(20, 600), ternary, gamma, act_bits=0)),
        ("ternary_linear_backward_input", draw(20, 40), encoded(ternary), gamma, T2MMA, 600),
        ("bitlinear_backward_weight", draw(20, 24), q, step[:, 0].contiguous(), torch.float32),
    ]
    plain = [run(*call) for call in calls]
    _emulation.configure(seed=seed, preemption=0.05 if CHECKED else 0.0)
    try:
        for call, results in zip(calls, plain, strict=True):
            for one, other in zip(run(*call), results, strict=True):
                assert_same_bits(one, other, call[0])
    finally:
        _emulation.configure()
