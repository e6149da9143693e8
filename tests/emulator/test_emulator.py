"""The emulator and its checker: planted faults are reported on every schedule, clean kernels never."""

from __future__ import annotations

import numpy
import pytest

from emulator.emulation import FOLDER, build

pytestmark = pytest.mark.emu
SCHEDULES = [(seed, preemption) for seed in range(8) for preemption in (0.0, 0.2)]
X = numpy.arange(1, 1025, dtype=numpy.float32)


def faults(check: bool, ucontext: bool = False):
    return build([FOLDER / "faults.cu"], check=check, ucontext=ucontext)


def arguments(session, name: str) -> tuple[list, object, numpy.ndarray]:
    """(arguments after `fault`, the output, what it must be)."""
    x = session.input("x", X)
    if name == "missing_barrier":
        out = session.output("out", (1,))
        return [x, out], out, X[:64].sum(keepdims=True)
    if name == "missing_second_barrier":
        out = session.output("out", (64,))
        return [x, out, 5], out, numpy.roll(X[:320].reshape(5, 64).sum(0), -1)
    if name == "missing_wait":
        out = session.output("out", (64,))
        return [x, out], out, X[(4 * numpy.arange(64) + 5) % 256]
    if name == "one_past_the_end":
        out = session.output("out", (3, 65))
        return [x, out, 3, 65], out, 2 * X[: 3 * 65].reshape(3, 65)
    if name == "blocks_add":
        out = session.inout("out", numpy.zeros(1, numpy.float32))
        return [x, out], out, X[:4].sum(keepdims=True)
    if name == "last_block":
        partial = session.output("partial", (4,))
        counter = session.inout("counter", numpy.zeros(1, numpy.uint32))
        out = session.output("out", (1,))
        return [x, partial, counter, out], out, 3 * X[:4].sum(keepdims=True)
    out = session.output("out", (64,))
    values = {
        "half_warp_shuffle": X[:64] + X[numpy.arange(64) ^ 1],
        "divergent_barrier": X[63::-1],
        "uninitialised": numpy.append(X[1:64], 0).astype(numpy.float32),
        "within_a_warp": X[numpy.arange(64) ^ 1],
        "deadlock": X[:64],
    }
    return [x, out], out, values[name]


# What the report of each planted fault must say.
EXPECTED = {
    "missing_barrier": "shared race",
    "missing_second_barrier": "shared race",
    "missing_wait": "pending read",
    "half_warp_shuffle": "lane",
    "divergent_barrier": "divergent barrier",
    "one_past_the_end": "out of bounds",
    "uninitialised": "uninitialised read",
    "blocks_add": "cross-block",
    "last_block": "cross-block read",
    "within_a_warp": "shared race",
    "deadlock": "deadlock",
}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("check", [False, True], ids=["fast", "check"])
def test_clean_kernels(name, check):
    """Right values and no report, on every schedule."""
    for seed, preemption in SCHEDULES:
        with faults(check).session(seed, preemption) as session:
            given, out, expected = arguments(session, name)
            assert session.run(f"run_{name}", False, *given) == 0, session.reports()
            numpy.testing.assert_array_equal(out.values(), expected)
            assert session.reports() == []


@pytest.mark.parametrize("name", EXPECTED)
def test_planted_faults(name):
    """Reported on every schedule, with a line of the kernel file or both lines."""
    for seed, preemption in SCHEDULES:
        with faults(True).session(seed, preemption) as session:
            given, _, _ = arguments(session, name)
            assert session.run(f"run_{name}", True, *given) != 0
            reports = session.reports()
            assert any(EXPECTED[name] in report for report in reports), (seed, preemption, reports)
            assert any("faults.cu:" in report for report in reports), reports


@pytest.mark.parametrize("name", EXPECTED)
def test_switch_of_other_processors(name):
    """The same kernels, clean and faulty in turn, where fibers are switched by the C library."""
    for seed, preemption in SCHEDULES[::5]:
        for faulty in (False, True, False):
            with faults(True, ucontext=True).session(seed, preemption) as session:
                given, out, expected = arguments(session, name)
                failed = session.run(f"run_{name}", faulty, *given) != 0
                assert failed == faulty, session.reports()
                if not faulty:
                    numpy.testing.assert_array_equal(out.values(), expected)


def test_blocks_that_wait_for_each_other():
    for check in (False, True):
        for seed, _ in SCHEDULES:
            with faults(check).session(seed) as session:
                total = session.inout("sum", numpy.zeros(1, numpy.float32))
                turn = session.inout("turn", numpy.zeros(1, numpy.uint32))
                assert session.run("run_chain", session.input("x", X), total, turn) == 0, session.reports()
                assert total.values() == X[:4].sum()


def counted(name: str, *arguments, seed: int = 0) -> dict[str, int]:
    with build([FOLDER / "traffic.cu"], check=True).session(seed) as session:
        x, out = session.input("x", numpy.arange(8192, dtype=numpy.float32)), session.output("out", (1024,))
        leading = [a for a in arguments if not isinstance(a, tuple)]
        assert session.run(f"run_{name}", *leading, x, out) == 0, session.reports()
        return session.counters()


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_traffic_is_counted_exactly(seed):
    """32-byte sectors and shared-memory wavefronts, whatever the schedule."""
    vectors = counted("copy_vectors", 1, seed=seed)
    assert (vectors["global_requests"], vectors["sectors"]) == (2 * 8, 2 * 4096 // 32)
    strided = counted("copy_strided", 4, seed=seed)
    assert (strided["global_requests"], strided["sectors"]) == (2 * 32, 1024 + 1024 * 4 // 32)
    for padded, of_a_column in ((True, 1), (False, 32)):
        tile = counted("transpose", padded, seed=seed)
        assert tile["shared_requests"] == 64
        assert tile["wavefronts"] == 32 + 32 * of_a_column
        assert tile["barriers"] == 1
