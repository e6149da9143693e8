"""The benchmark cases of the family on small tensors: each builds, checks its own results, and gives a row."""

from __future__ import annotations

import dataclasses

import pytest
from pyops._bench import harness, ternary, ternary_targets

from pyops import _lib

KINDS = {(case.op, case.what, case.threads): case for case in ternary.cases()}


def small(case: harness.Case) -> harness.Case:
    shape = (48, 80) if len(case.shape) == 2 else (min(case.shape[0], 9), 48, 80)
    return dataclasses.replace(case, shape=shape, threads=1)


@pytest.mark.parametrize("case", [case for key, case in KINDS.items() if key[2] == 1], ids=lambda case: case.name)
def test_cases_check_themselves(case, monkeypatch):
    """Each against its references once; a gate is among them."""
    monkeypatch.setattr(ternary, "COLD_BYTES", 1 << 13)
    prepared = small(case).build(small(case), False)
    references = prepared.yardsticks | prepared.rivals
    level = _lib.native.current_isa()
    for timed in (prepared.target, *references.values()):
        timed.run(timed.prepare())
    assert _lib.native.current_isa() == level
    assert len(references) >= 2
    if case.gate and (case.gate != "peak" or level != "baseline"):
        assert case.gate in references


def test_wrong_results_are_not_timed(monkeypatch):
    case = small(KINDS["linear_packed", "t2_hot", 1])
    right = ternary._linear
    monkeypatch.setattr(ternary, "_linear", lambda *given: lambda packed: right(*given)(packed) * 1.001)
    with pytest.raises(AssertionError, match="not close"):
        case.build(case, False)


def test_probes():
    """The counted work is what was asked for, and levels without a dot product say so."""
    native = _lib.native
    tensor = ternary._activations(64, 64, "float32")
    assert native.read_rate(tensor.data_ptr(), tensor.nbytes) > 0
    native.read_memory([(tensor.data_ptr(), tensor.nbytes)] * 3, 2)
    try:
        for level in ("avx2", None):
            native.force_isa(level)
            if native.current_isa() != "baseline":
                assert 10**6 <= native.dot_products(10**6) < 1.01 * 10**6
                assert 10**6 <= native.dot_products(10**6, 2) < 1.01 * 10**6
                assert native.dot_rate(2.0) > 1e9
        native.force_isa("baseline")
        with pytest.raises(RuntimeError, match="no probe of 8-bit dot products at level baseline"):
            native.dot_products(1)
    finally:
        native.force_isa(None)


def row(shape: tuple[int, int], stream: float) -> dict:
    return {
        "op": "linear_packed", "pass": "t2_cold", "shape": [1, *shape], "dtype": "float32", "threads": 1,
        "median": 1e-4, "macs": 10**7, "fraction": {"stream": stream}, "references": {},
    }  # fmt: skip


def test_targets_say_what_was_missed():
    rows = [row(shape, 0.95) for shape in ternary.SHAPES]
    (line,) = [line for line in ternary_targets.target_table(rows).splitlines() if "t2 cold, of the stream | 1" in line]
    assert line.endswith("| 0.95 | 0.95 | 0.95 | 0.95 | ≥ 0.90 | yes |")
    rows[2] = row(ternary.SHAPES[2], 0.85)
    assert "| 0.85 | 0.95 | ≥ 0.90 | **missed** 1 |" in ternary_targets.target_table(rows)
    assert "| — | ≥ 0.90 | — |" in ternary_targets.target_table(rows[:3])
    assert "| 100 | 100 | 100 | 100 |" in ternary_targets.rate_table(rows)
