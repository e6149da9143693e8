"""The part of the ledger that the emulator counts: what the CUDA kernels of every device case move, and from that and
the compiler's numbers the occupancy and a lower bound of the time. See cuda_ledger.py.

Benchmark shapes are too large to emulate whole: of every grid ``SAMPLED`` blocks run, evenly spaced, and the counters
are scaled to the grid. Blocks of one launch do the same work up to the alignment of their rows, so that twice as many
give the same counters within a few percent (test_ledger.py). Buffers are aligned to 64 bytes, a multiple of a sector.

Beside the device cases that are one pass over their data the ternary ops are counted (ledger_ternary.py). The blocks of
a matrix product read what they share again, from the second-level cache: such a case is "tiled", and held against the
ledger only, not against what must move.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

SAMPLED = 16
KEPT = ("global_requests", "sectors", "shared_requests", "wavefronts", "barriers", "warp_barriers", "atomics", "mma",
        "copy_bytes")  # fmt: skip
SECTOR_BYTES = 32
SCHEDULERS = 4  # of a multiprocessor, an instruction each per clock
EXCESS = 1.10  # of the bytes in sectors over those that must move
MMA_FLOPS = 2 * 16 * 8 * 16  # one m16n8k16; one m16n8k32 of int8 takes as long


class Device(NamedTuple):
    """Rates for estimates. Of sm_90a as seen on an H100 80GB HBM3 (copy, bf16 matrix product); the others are nine
    tenths of the data sheet (A100 80GB, B200), not measured."""

    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second, read and written
    matrix_rate: float  # FLOP per second, bf16
    shared_bytes: int  # of a multiprocessor


DEVICES = {
    "sm_80": Device(108, 1.41e9, 1.83e12, 2.8e14, 164 << 10),
    "sm_90a": Device(132, 1.755e9, 3.0e12, 8.0e14, 228 << 10),
    "sm_100": Device(148, 1.85e9, 7.2e12, 2.0e15, 228 << 10),
}


# The blocks that do not run leave their part of a workspace unwritten, and a kernel that merges the parts may branch on
# what lies there: new memory is zero.
ZEROED = {"GLIBC_TUNABLES": "glibc.malloc.perturb=255:glibc.malloc.tcache_count=0"}


# ---- counting ----------------------------------------------------------------------------------------------


def instances(library: Path) -> dict[int, str]:
    """Mangled name of the function at every offset of a library."""
    listed = subprocess.run(["nm", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    fields = (line.split() for line in listed.stdout.splitlines())
    return {int(offset, 16): name for offset, kind, name in fields if kind in "tTwW"}


@contextmanager
def forward_on_cpu():
    """Forwards by the C++ kernels, whole and quick, whose backward will run on the emulated device all the same."""
    import pyops
    from pyops import _dispatch

    with pyops.use_backend("cpu"), mock.patch.object(_dispatch, "snapshot", return_value={"": "cuda"}):
        yield


def launches_of_last_call(names: dict[int, str]) -> list[dict]:
    """What the call since the last look counted, scaled to whole grids."""
    from cuda_ledger import kernel_name

    from pyops import _emulation

    rows = []
    for launch in _emulation.launches():
        x, y, z = launch.grid
        scale = x * y * z / launch.blocks
        counted = {name: round(launch.counters[name] * scale) for name in KEPT if launch.counters[name]}
        kernel = kernel_name(names[launch.function])
        rows.append({"kernel": kernel, "grid": [x, y, z], "threads": launch.threads, "shared": launch.shared} | counted)
    return rows


def count(sampled: int) -> dict:
    """{case: {"bytes": ..., "launches": [...]}}; in a process with PYOPS_CUDA_EMU=check and PYOPS_BACKEND=cuda."""
    import ledger_ternary
    import torch
    from pyops._bench import harness

    import pyops
    from pyops import _emulation

    names = instances(Path(pyops.__file__).parent / "_emulated_check.so")
    _emulation.sample(sampled)
    cases = {}
    for case in harness.device_cases():
        if case.what not in ("forward", "backward"):
            continue  # the sum of the two, or the same in place
        timed = case.build(case, torch.device("cpu"), None).target
        with forward_on_cpu():
            argument = timed.prepare()  # of a backward the forward, of a forward nothing
        _emulation.launches()
        timed.run(argument)
        cases[case.name] = {"bytes": case.bytes, "flops": case.flops, "launches": launches_of_last_call(names)}
    for case in ledger_ternary.cases():
        _emulation.sample(0 if case.whole else sampled)
        _emulation.launches()
        getattr(torch.ops.pyops, case.op)(*case.arguments)
        found = {"bytes": case.bytes, "flops": case.flops, "launches": launches_of_last_call(names)}
        cases[case.name] = found | ({"tiled": True} if case.tiled else {})
    return cases


def take(sampled: int = SAMPLED) -> dict:
    """The counters of the working tree's check build."""
    environment = os.environ | ZEROED | {"PYOPS_CUDA_EMU": "check", "PYOPS_BACKEND": "cuda"}
    command = [sys.executable, __file__, str(sampled)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"counting failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


# ---- what follows from the counters ------------------------------------------------------------------------


def occupancy(registers: int, threads: int, shared: int, device: Device) -> int:
    """Blocks that a multiprocessor holds: by registers (given to warps in steps of 256, a quarter of the 65536 for
    each scheduler), by 64 warps, by shared memory (1 KiB more for each block), at most 32."""
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = 65536 // 4 // per_warp * 4 // warps
    by_shared = device.shared_bytes // (shared + 1024)
    return max(0, min(32, by_registers, 64 // warps, by_shared))


def estimate(case: dict, kernels: dict[str, dict], target: str) -> dict:
    """{"blocks": per launch of a multiprocessor, "microseconds": lower bound of the case}, as

        max(bytes / bandwidth, mma flops / rate, wavefronts / (multiprocessors * clock),
            issued / (multiprocessors * 4 * clock)) * quantisation of waves

    ``kernels`` is {kernel: {target: numbers of the compiler}}. Issued are the instructions of the innermost loops with
    matrix instructions, as often as the count of those says. A tripwire, no claim of speed: launches cost nothing here,
    nor do other instructions.
    """
    device = DEVICES[target]
    resident, waves, issued = [], 1.0, 0.0
    for launch in case["launches"]:
        numbers = kernels[launch["kernel"]][target]
        issued += launch.get("mma", 0) / numbers.get("loop_matrix", 1) * numbers.get("loop_instructions", 0)
        held = occupancy(numbers["registers"], launch["threads"], launch["shared"], device)
        resident.append(held)
        x, y, z = launch["grid"]
        full = x * y * z / (device.multiprocessors * held)
        if launch["sectors"] * SECTOR_BYTES > case["bytes"] / 2:
            waves = max(waves, -(-full // 1) / full)
    seconds = max(
        case["bytes"] / device.bandwidth,
        sum(launch.get("mma", 0) for launch in case["launches"]) * MMA_FLOPS / device.matrix_rate,
        sum(launch.get("wavefronts", 0) for launch in case["launches"]) / (device.multiprocessors * device.clock),
        issued / (device.multiprocessors * SCHEDULERS * device.clock),
    )
    return {"blocks": resident, "microseconds": round(seconds * waves * 1e6, 1)}


def with_estimates(cases: dict, ledger: dict) -> dict:
    kernels = {name: targets for file in ledger["kernels"].values() for name, targets in file.items()}
    targets = next(iter(kernels.values())).keys() & DEVICES.keys()
    return {
        name: case | {"estimate": {target: estimate(case, kernels, target) for target in sorted(targets)}}
        for name, case in cases.items()
    }


def excesses(cases: dict) -> list[str]:
    """Cases that move more than a tenth beyond what they must."""
    found = []
    for name, case in cases.items():
        moved = SECTOR_BYTES * sum(launch["sectors"] for launch in case["launches"])
        if case["bytes"] and not case.get("tiled") and moved > EXCESS * case["bytes"]:
            found.append(f"{name}: moves {moved} bytes in sectors, must move {case['bytes']}")
    return found


def regressions(old: dict, new: dict, growth: float) -> list[str]:
    """What got worse between two counts."""
    found = [f"{name}: not in the ledger" for name in new.keys() - old.keys()]
    found += [f"{name}: only in the ledger" for name in old.keys() - new.keys()]
    for name in old.keys() & new.keys():
        before, after = old[name]["launches"], new[name]["launches"]
        if [launch["kernel"] for launch in before] != [launch["kernel"] for launch in after]:
            found.append(f"{name}: other launches than in the ledger")
            continue
        for was, now in zip(before, after, strict=True):
            for counter in KEPT:
                if now.get(counter, 0) > was.get(counter, 0) * growth:
                    found.append(f"{name}: {now['kernel']}: {counter} {was.get(counter, 0)} -> {now[counter]}")
    return sorted(found)


def table(cases: dict) -> str:
    lines = [f"{'case':58s} {'MB':>8s} {'sectors/must':>12s} {'H100 us':>8s} blocks per multiprocessor"]
    for name, case in cases.items():
        moved = SECTOR_BYTES * sum(launch["sectors"] for launch in case["launches"])
        bound = case["estimate"]["sm_90a"]
        ratio = f"{moved / case['bytes']:12.3f}" if case["bytes"] else " " * 12
        lines.append(f"{name:58s} {case['bytes'] / 1e6:8.1f} {ratio} {bound['microseconds']:8.1f} {bound['blocks']}")
    return "\n".join(lines)


if __name__ == "__main__":
    json.dump(count(int(sys.argv[1])), sys.stdout)
