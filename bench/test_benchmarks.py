"""Benchmarks under pytest-benchmark: ``make bench`` runs all cases, ``PYOPS_BENCH=quick`` the gated ones.

A gated case (one thread) fails when its ratio is below its floor three times in a row; every other case informs.
Rows go to bench/results, those of a quick run to bench/results/local.
"""

from __future__ import annotations

import os

import pytest
from pyops._bench import harness

MODE = os.environ.get("PYOPS_BENCH", "full")
if MODE not in ("full", "quick"):
    raise ValueError(f"PYOPS_BENCH must be full or quick, got {MODE!r}")
QUICK = MODE == "quick"
FLOORS = harness.load_floors()
CASES = [case for case in harness.all_cases() if case.gated or not QUICK]


@pytest.fixture(scope="module")
def rows():
    """Collects the rows of the run and keeps them; says at the top why floors do not gate here, if so."""
    why = harness.foreign(FLOORS)
    if why:
        print(f"\nThe floors inform and do not gate: {why}")
    taken: list[dict] = []
    yield taken
    path = harness.results_file(QUICK)
    if not QUICK:
        taken = harness.probe_rows(sorted({case.threads for case in CASES})) + taken
    harness.store(taken, path)
    print(f"\n{len(taken)} rows in {path.relative_to(harness.FOLDER.parent)}")


def _parameters():
    for case in CASES:
        marks = pytest.mark.benchmark(timer=harness.timer(case.threads), group=f"{case.op} {case.what}")
        yield pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", _parameters())
def test_benchmark(case, benchmark, rows):
    def drive(target, setup, rounds, clock):
        if benchmark.disabled:
            return harness.drive_plainly(target, setup, rounds, clock)
        benchmark.pedantic(target, setup=setup, rounds=rounds, iterations=1)
        return benchmark.stats.stats.data

    references = harness.gate_reference(case, FLOORS) if QUICK else None
    row, verdict = harness.measure_gated(case, FLOORS, drive, references=references, compiled=not QUICK)
    rows.append(row)
    benchmark.extra_info["speedup"] = {name: entry["ratio"] for name, entry in row["references"].items()}
    benchmark.extra_info["fraction"] = row["fraction"]
    print(f"\n{verdict.state}: {verdict.text}")
    assert verdict.state != "fail", f"three times in a row, the last: {verdict.text}"
