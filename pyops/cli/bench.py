"""``bench``: times the ops against their rivals on this machine; works from an installed wheel."""

from __future__ import annotations

import argparse
import importlib
import json
import sys

import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", nargs="?", metavar="FAMILY", help="only this family, e.g. spherical")
    parser.add_argument("--quick", action="store_true", help="gated single-thread cases only, no torch.compile rivals")
    parser.add_argument("--op", action="append", metavar="OP", help="only this op, e.g. z_loss; may be repeated")
    parser.add_argument("--shape", metavar="MxD", help="rows x classes of your own, on all threads")
    parser.add_argument("--dtype", help="with --shape: float32 (default), float64, bfloat16 or float16")


def _shape(text: str) -> tuple[int, int]:
    rows, _, classes = text.partition("x")
    if not (rows.isdigit() and classes.isdigit() and int(rows) and int(classes)):
        raise ValueError(f"--shape must be MxD with positive numbers, got {text!r}")
    return int(rows), int(classes)


def _known(name: str, value: str, allowed) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def _cases(arguments: argparse.Namespace) -> list:
    from pyops._bench import harness

    families = [_known("FAMILY", arguments.family, harness.FAMILIES)] if arguments.family else harness.FAMILIES
    modules = [importlib.import_module(f"pyops._bench.{family}") for family in families]
    ops = {op: module for module in modules for op in module.OPS}
    wanted = [_known("--op", op, ops) for op in arguments.op or ops]
    if arguments.shape is None:
        if arguments.dtype is not None:
            raise ValueError("--dtype goes with --shape")
        cases = [case for module in modules for case in module.cases() if case.op in wanted]
        return [case for case in cases if case.gate or not arguments.quick]
    dtypes = ("float32", "float64", "bfloat16", "float16")
    dtype = _known("--dtype", arguments.dtype or "float32", dtypes)
    shape = _shape(arguments.shape)
    return [case for op in wanted for case in ops[op].custom_cases([op], shape, dtype)]


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the tables; 1 when a gated case stayed below its floor."""
    from pyops._bench import harness, report

    floors = harness.load_floors()
    cases = _cases(arguments)
    why = harness.foreign(floors)
    if why:
        print(f"floors inform and do not gate: {why}", file=sys.stderr)
    rows, failures = [], []
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name}", file=sys.stderr, flush=True)
        rows.append(harness.measure(case, compiled=not arguments.quick))
        if case.gate and not why:
            _, verdict = harness.measure_gated(case, floors)
            failures += [verdict.text] if verdict.state == "fail" else []
    probes = harness.probe_rows([1] if arguments.quick else sorted({1, torch.get_num_threads()}))
    print(json.dumps(probes + rows, indent=2) if arguments.json else report.text(probes + rows))
    for failure in failures:
        print(f"below its floor three times in a row: {failure}", file=sys.stderr)
    return 1 if failures else 0
