"""The PTX of every intrinsic, interpreted, against the emulation of the same probe on the same registers."""

from __future__ import annotations

import re

import numpy
import pytest

from emulator.emulation import FOLDER, build
from emulator.ptx import Kernel, Memory, compile_ptx

pytestmark = pytest.mark.emu


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    try:
        return compile_ptx(FOLDER / "intrinsics.cu", tmp_path_factory.mktemp("ptx"))
    except FileNotFoundError as error:
        pytest.skip(str(error))


def emulate(launcher: str, leading: tuple, inputs: list[numpy.ndarray], outputs: list[numpy.ndarray]) -> list:
    with build([FOLDER / "intrinsics.cu"], check=False).session() as session:
        given = [session.input(f"input {i}", values) for i, values in enumerate(inputs)]
        results = [session.inout(f"output {i}", values) for i, values in enumerate(outputs)]
        assert session.run(launcher, *leading, *given, *results) == 0
        return [result.values() for result in results]


def interpret(ptx: str, name: str, inputs: list[numpy.ndarray], outputs: list[numpy.ndarray]) -> list:
    memory = Memory()
    given = [memory.add(values) for values in inputs]
    results = [memory.add(values) for values in outputs]
    Kernel(ptx, name).run(memory, *given, *results)
    return [memory.at(at, v.nbytes).view(v.dtype).reshape(v.shape) for at, v in zip(results, outputs, strict=True)]


def draw(*shape, dtype=numpy.uint32, seed=0):
    random = numpy.random.default_rng(seed)
    if numpy.dtype(dtype).kind == "f":
        return random.standard_normal(shape).astype(dtype)
    info = numpy.iinfo(dtype)
    return random.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def halves(*shape, kind: str, seed: int) -> numpy.ndarray:
    """Registers with two moderate 16-bit floats each: random bits would be NaN now and then."""
    import torch

    values = torch.from_numpy(draw(*shape[:-1], 2 * shape[-1], dtype=numpy.float32, seed=seed))
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    return values.to(dtype).view(torch.int16).numpy().view(numpy.uint32).copy()


def test_mma_s8(ptx):
    inputs, outputs = [draw(32, 4, seed=1), draw(32, 2, seed=2)], [draw(32, 4, dtype=numpy.int32, seed=3)]
    numpy.testing.assert_array_equal(
        *emulate("run_mma_s8", (), inputs, outputs), *interpret(ptx, "mma_s8", inputs, outputs)
    )


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma_of_floats(ptx, kind):
    inputs = [halves(32, 4, kind=kind, seed=4), halves(32, 2, kind=kind, seed=5)]
    outputs = [draw(32, 4, dtype=numpy.float32, seed=6)]
    ours, theirs = emulate(f"run_mma_{kind}", (), inputs, outputs), interpret(ptx, f"mma_{kind}", inputs, outputs)
    numpy.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=1e-4)
    assert numpy.abs(theirs[0]).max() > 1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix(ptx, matrices, transposed):
    rows = numpy.random.default_rng(7).permutation(32).astype(numpy.int32)
    inputs, outputs = [draw(32, 4, seed=8), rows], [numpy.zeros((32, matrices), numpy.uint32)]
    ours = emulate("run_ldmatrix", (matrices, transposed), inputs, outputs)
    theirs = interpret(ptx, f"probe_ldmatrixILi{matrices}ELb{int(transposed)}", inputs, outputs)
    numpy.testing.assert_array_equal(ours[0], theirs[0])


def test_cp_async(ptx):
    copy = draw(32, dtype=numpy.int32, seed=9) & 1
    inputs, outputs = [draw(32, 4, seed=10), draw(32, 4, seed=11), copy], [numpy.zeros((64, 4), numpy.uint32)]
    ours, theirs = emulate("run_cp_async", (), inputs, outputs), interpret(ptx, "probe_cp_async", inputs, outputs)
    numpy.testing.assert_array_equal(ours[0], theirs[0])
    assert theirs[0].any()


def test_dp4a(ptx):
    inputs = [draw(32, seed=12), draw(32, seed=13), draw(32, dtype=numpy.int32, seed=14)]
    outputs = [numpy.zeros(32, numpy.int32)]
    ours, theirs = emulate("run_dp4a", (), inputs, outputs), interpret(ptx, "probe_dp4a", inputs, outputs)
    numpy.testing.assert_array_equal(ours[0], theirs[0])


def test_conversions(ptx):
    x = draw(64, dtype=numpy.float32, seed=15) * 20
    x[:6] = 0, -0.0, 65504, 1e30, 1e-40, -1e30
    inputs = [x]
    outputs = [numpy.zeros(32, numpy.uint32)] * 2 + [numpy.zeros(32, numpy.float32)] * 3
    ours, theirs = emulate("run_conversions", (), inputs, outputs), interpret(ptx, "probe_conversions", inputs, outputs)
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        numpy.testing.assert_array_equal(a, b)
    numpy.testing.assert_allclose(ours[4], theirs[4], rtol=1e-6)


def test_shuffles_and_votes(ptx):
    inputs, outputs = [draw(32, dtype=numpy.int32, seed=16) % 900], [numpy.zeros((6, 32), numpy.int32)]
    ours, theirs = emulate("run_shuffles", (), inputs, outputs), interpret(ptx, "probe_shuffles", inputs, outputs)
    numpy.testing.assert_array_equal(ours[0], theirs[0])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"(mma\.sync\S+s8\S+ \{[^}]*\}), \{(%r\d+), (%r\d+),", r"\1, {\3, \2,"),  # two registers of A swapped
        (r"(mma\.sync\S+s8\S+ \{[^}]*\}, \{[^}]*\}), \{(%r\d+), (%r\d+)\}", r"\1, {\3, \2}"),  # those of B
        (r"\.x4\.trans\.", r".x4."),
        (r"(cp\.async\.cg\S+ \[\S+\], \[\S+\], 16), %r\d+", r"\1, 16"),  # copies whatever the predicate
        (r"(cvt\.rn\.bf16x2\.f32 %r\d+), (%f\d+), (%f\d+)", r"\1, \3, \2"),
    ],
)
def test_a_wrong_asm_string_shows(ptx, old, new):
    """Each change of the PTX, as a typing error in the header would make it, fails a test above."""
    changed, count = re.subn(old, new, ptx)
    assert count, "the pattern must match something"
    failed = []
    for test in (test_mma_s8, test_cp_async, test_conversions, lambda text: test_ldmatrix(text, 4, True)):
        try:
            test(changed)
        except AssertionError:
            failed.append(test)
    assert failed
