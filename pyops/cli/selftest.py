"""``selftest``: every op, every backend and CPU level that is here, against its reference.

It ships in the wheel and needs neither pytest nor the source tree: it answers "does this installation compute
the right numbers on this machine" in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

# Triton serves CPU tensors only interpreted, and reads this when a kernel is defined.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

import pyops
from pyops import _dispatch, _environment, _lib
from pyops.spherical import _selftest as spherical
from pyops.ternary import _selftest as ternary

FAMILIES = {"spherical": spherical, "ternary": ternary}


@contextmanager
def _cpu_level(level: str) -> Iterator[None]:
    _lib.native.force_isa(level)
    try:
        yield
    finally:
        _lib.native.force_isa(None)


def backends(device: str, levels: tuple[str, ...]) -> Iterator[tuple[str, Callable]]:
    """(label, context manager factory) of everything that can run on ``device``, the CPU kernels at ``levels``."""
    if device == "cpu":
        allowed = _environment.ISA_LEVELS.index(_lib.native.current_isa())
        for level in levels:
            if _environment.ISA_LEVELS.index(level) <= allowed:
                yield f"cpu:{level}", lambda level=level: _cpu_level(level)
    elif not _lib.cuda_unavailable():
        yield "cuda", nullcontext
    if not _dispatch.triton_unavailable():
        yield "triton", lambda: pyops.use_backend("triton")
    yield "reference", lambda: pyops.use_backend("reference")


def run(arguments: argparse.Namespace) -> int:
    """Prints one line per family and backend; status 1 when any case fails or none ran."""
    start, rows, failures = time.perf_counter(), [], []
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for family, module in FAMILIES.items():
            for label, context in backends(device, module.LEVELS):
                ran = 0
                for name, check in module.cases(label, device, arguments.full):
                    problem = check(context)
                    ran += 1
                    if problem:
                        failures.append(f"{device} {label} {name}: {problem}")
                rows.append({"family": family, "device": device, "backend": label, "cases": ran})
                if not arguments.json:
                    print(f"{device:5s} {family:12s} {label:15s} {ran:4d} cases")
    seconds = time.perf_counter() - start
    result = {"rows": rows, "failures": failures, "seconds": round(seconds, 1)}
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print("\n".join(failures) or f"all {sum(row['cases'] for row in rows)} cases passed in {seconds:.1f} s")
    return 1 if failures or not rows else 0
