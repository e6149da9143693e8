"""Every intrinsic against numpy, in emulation and on a GPU: dense products, one-hot probes, independently written
layouts."""

from __future__ import annotations

import numpy
import pytest
import torch

from emulator.emulation import FOLDER, DeviceLibrary, build, build_for_device

pytestmark = pytest.mark.emu
LANES = numpy.arange(32)


@pytest.fixture(params=["fast", "check", pytest.param("gpu", marks=pytest.mark.gpu)])
def session(request):
    source = FOLDER / "intrinsics.cu"
    library = build_for_device((source,)) if request.param == "gpu" else build([source], check=request.param == "check")
    with library.session(seed=3) as opened:
        yield opened


def run(session, name, *arguments):
    assert session.run(name, *arguments) == 0, session.reports()


def to_bits(values: numpy.ndarray, kind: str) -> numpy.ndarray:
    """Numbers as unsigned integers of their own width."""
    if kind == "s8":
        return values.astype(numpy.int8).view(numpy.uint8)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(numpy.uint16)


def fragments(a: numpy.ndarray, b: numpy.ndarray, kind: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Registers of all lanes for A [16, K] and B [K, 8], from the layouts of the PTX manual."""
    per_register = 4 if kind == "s8" else 2
    width = 32 // per_register
    a_bits, b_bits = to_bits(a, kind).astype(numpy.uint32), to_bits(b, kind).astype(numpy.uint32)
    registers_a, registers_b = numpy.zeros((32, 4), numpy.uint32), numpy.zeros((32, 2), numpy.uint32)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for part in range(per_register):
            for register in range(4):
                row = group + (8 if register in (1, 3) else 0)
                column = thread * per_register + part + (4 * per_register if register >= 2 else 0)
                registers_a[lane, register] |= a_bits[row, column] << numpy.uint32(width * part)
            for register in range(2):
                row = thread * per_register + part + 4 * per_register * register
                registers_b[lane, register] |= b_bits[row, group] << numpy.uint32(width * part)
    return registers_a, registers_b


def spread(d: numpy.ndarray) -> numpy.ndarray:
    """D [16, 8] as four values per lane."""
    return numpy.array([[d[lane // 4 + 8 * (e // 2), 2 * (lane % 4) + e % 2] for e in range(4)] for lane in LANES])


def gather(registers: numpy.ndarray) -> numpy.ndarray:
    d = numpy.zeros((16, 8), registers.dtype)
    for lane in LANES:
        for e in range(4):
            d[lane // 4 + 8 * (e // 2), 2 * (lane % 4) + e % 2] = registers[lane, e]
    return d


def multiply(session, kind: str, a: numpy.ndarray, b: numpy.ndarray, c: numpy.ndarray) -> numpy.ndarray:
    registers_a, registers_b = fragments(a, b, kind)
    accumulator = numpy.int32 if kind == "s8" else numpy.float32
    d = session.inout("d", spread(c).astype(accumulator))
    run(session, f"run_mma_{kind}", session.input("a", registers_a), session.input("b", registers_b), d)
    return gather(d.values())


@pytest.mark.parametrize("kind", ["bf16", "f16", "s8"])
def test_mma_is_a_matrix_product(session, kind):
    random = numpy.random.default_rng(0)
    depth = 32 if kind == "s8" else 16
    if kind == "s8":
        a, b = random.integers(-128, 128, (16, depth)), random.integers(-128, 128, (depth, 8))
        c = random.integers(-(2**31), 2**31, (16, 8))
        exact = (a @ b + c).astype(numpy.int32)  # wraps
        numpy.testing.assert_array_equal(multiply(session, kind, a, b, c), exact)
        return
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    a, b = (torch.from_numpy(random.standard_normal(s)).to(dtype).double().numpy() for s in ((16, depth), (depth, 8)))
    c = random.standard_normal((16, 8)).astype(numpy.float32)
    error = numpy.abs(multiply(session, kind, a, b, c) - (a @ b + c))
    # Matrix units align and truncate where the emulator rounds: twice its bound, until a sheet has measured theirs.
    units = 4 if isinstance(session.library, DeviceLibrary) else 2
    assert (error <= units * depth * 2.0**-23 * (numpy.abs(a) @ numpy.abs(b) + numpy.abs(c))).all()


@pytest.mark.parametrize("kind", ["bf16", "f16", "s8"])
def test_mma_places_every_element(session, kind):
    """A[i, k] = 1 alone gives row k of B in row i of D."""
    depth = 32 if kind == "s8" else 16
    b = numpy.arange(depth * 8).reshape(depth, 8) % 127 - 50
    for i, k in [(i, (7 * i + j) % depth) for i in range(16) for j in (0, depth // 2)]:
        a = numpy.zeros((16, depth))
        a[i, k] = 1
        expected = numpy.zeros((16, 8))
        expected[i] = b[k]
        numpy.testing.assert_array_equal(multiply(session, kind, a, b.astype(float), numpy.zeros((16, 8))), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix(session, matrices, transposed):
    """Rows in any order, so that it matters which lane gives which address."""
    random = numpy.random.default_rng(1)
    tile = random.integers(0, 1 << 16, (32, 8)).astype(numpy.uint16)
    rows = random.permutation(32).astype(numpy.int32)
    out = session.output("out", (32, matrices), numpy.uint32)
    run(session, "run_ldmatrix", matrices, transposed, session.input("tile", tile), session.input("rows", rows), out)
    for lane in LANES:
        for m in range(matrices):
            matrix = tile[rows[8 * m : 8 * m + 8]]
            matrix = matrix.T if transposed else matrix
            low, high = matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].astype(numpy.uint32)
            assert out.values()[lane, m] == low | high << numpy.uint32(16)


def test_cp_async(session):
    random = numpy.random.default_rng(2)
    first, second = (random.integers(0, 1 << 32, (32, 4)).astype(numpy.uint32) for _ in range(2))
    copy = random.integers(0, 2, 32).astype(numpy.int32)
    out = session.output("out", (64, 4), numpy.uint32)
    given = [session.input(n, v) for n, v in (("first", first), ("second", second), ("copy", copy))]
    run(session, "run_cp_async", *given, out)
    expected = numpy.concatenate([first * (copy != 0)[:, None], second * (copy == 0)[:, None]])
    numpy.testing.assert_array_equal(out.values(), expected)


def test_dp4a(session):
    random = numpy.random.default_rng(3)
    a, b = (random.integers(-128, 128, (32, 4)).astype(numpy.int8) for _ in range(2))
    c = random.integers(-(2**31), 2**31, 32).astype(numpy.int32)
    out = session.output("out", (32,), numpy.int32)
    given = [session.input(n, v) for n, v in (("a", a.view(numpy.uint32)), ("b", b.view(numpy.uint32)), ("c", c))]
    run(session, "run_dp4a", *given, out)
    exact = (a.astype(numpy.int64) * b).sum(1) + c
    numpy.testing.assert_array_equal(out.values(), exact.astype(numpy.int32))


def test_conversions(session):
    """To nearest even; ties, overflow, subnormals, infinities and NaN."""
    special = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 65504, 65520, 1e30, -1e39, 1e-40, 6e-8, 2.9e-8, 3.4e38, -150.0]
    x = numpy.random.default_rng(4).standard_normal(64).astype(numpy.float32)
    with numpy.errstate(over="ignore"):
        x[: len(special)] = numpy.array(special).astype(numpy.float32)
    x[14:17] = numpy.inf, -numpy.inf, numpy.nan
    outputs = [session.output(n, (32,), numpy.uint32) for n in ("bf16", "f16")]
    outputs += [session.output(n, (32,)) for n in ("from_bf16", "from_f16", "power")]
    run(session, "run_conversions", session.input("x", x), *outputs)
    values = torch.from_numpy(x)
    for out, back, dtype in ((outputs[0], outputs[2], torch.bfloat16), (outputs[1], outputs[3], torch.float16)):
        halves = torch.from_numpy(out.values().view(numpy.int16).copy()).view(dtype)
        assert torch.equal(halves.double().nan_to_num(7.0), values.to(dtype).double().nan_to_num(7.0))
        wide = torch.from_numpy(back.values())
        assert torch.equal(wide.nan_to_num(7.0), halves[::2].float().nan_to_num(7.0))
    power = numpy.exp2(x[::2].astype(numpy.float64))
    power[power < 2.0**-126] = 0
    with numpy.errstate(over="ignore"):
        numpy.testing.assert_allclose(outputs[4].values(), power.astype(numpy.float32), rtol=2.0**-22)


def test_shuffles_and_votes(session):
    x = numpy.random.default_rng(5).integers(0, 900, 32).astype(numpy.int32)
    out = session.output("out", (6, 32), numpy.int32)
    run(session, "run_shuffles", session.input("x", x), out)
    got = out.values()
    numpy.testing.assert_array_equal(got[0], x[LANES ^ 5])
    numpy.testing.assert_array_equal(got[1], x[numpy.where(LANES % 8 + 3 < 8, LANES + 3, LANES)])
    numpy.testing.assert_array_equal(got[2], x[numpy.where(LANES % 16 >= 2, LANES - 2, LANES)])
    numpy.testing.assert_array_equal(got[3], x[LANES // 8 * 8 + 1])
    votes = sum(int(v & 1) << lane for lane, v in enumerate(x))
    assert (got[4].view(numpy.uint32) == votes).all()
    assert (got[5] == 2).all()
