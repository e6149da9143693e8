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
CASES = [case for case in harness.all_cases() if case.gate or not QUICK]


@pytest.fixture(scope="module")
def run(request):
    """Collects (row, verdict) of every case and says what the floors made of them."""

    def say(text: str) -> None:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{text}", flush=True)

    why = harness.foreign(FLOORS)
    if why:
        say(f"the floors inform and do not gate: {why}")
    taken: list[tuple[dict, harness.Verdict]] = []
    yield taken
    path = harness.results_file(QUICK)
    if not QUICK:
        harness.store(harness.probe_rows(sorted({case.threads for case in CASES})), path)
    by_state = {state: [v.text for _, v in taken if v.state == state] for state in ("pass", "inform", "fail")}
    below = [text for text in by_state["inform"] + by_state["fail"] if "BELOW" in text]
    counts = ", ".join(f"{len(texts)} {state}" for state, texts in by_state.items())
    say("\n".join([f"{len(taken)} rows in {path.relative_to(harness.FOLDER.parent)}; floors: {counts}", *below]))


def _parameters():
    for case in CASES:
        marks = pytest.mark.benchmark(timer=harness.timer(case.threads))
        yield pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", list(_parameters()))
def test_benchmark(case, benchmark, run):
    def drive(target, setup, rounds, clock):
        if benchmark.disabled:
            return harness.drive_plainly(target, setup, rounds, clock)
        benchmark.pedantic(target, setup=setup, rounds=rounds, iterations=1)
        return benchmark.stats.stats.data

    if QUICK:
        row, verdict = harness.measure_gated(case, FLOORS, drive)
    else:
        row = harness.measure(case, drive=drive)
        verdict = harness.measure_gated(case, FLOORS)[1] if case.gate else harness.judge(case, row, FLOORS)
    run.append((row, verdict))
    harness.store([row], harness.results_file(QUICK))  # at once: a full run takes the better part of an hour
    benchmark.extra_info["speedup"] = {name: entry["ratio"] for name, entry in row["references"].items()}
    benchmark.extra_info["fraction"] = row["fraction"]
    assert verdict.state != "fail", f"three times in a row, the last: {verdict.text}"
