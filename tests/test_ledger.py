"""The ledger notices what it is there for: a kernel that spills, lost padding of shared memory, more traffic."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import textwrap

import cuda_ledger
import ledger_traffic
import numpy
import pytest
from emulator.emulation import FOLDER, build

from pyops import _emulation

BUILT = (cuda_ledger.ROOT / "pyops" / "_emulated_check.so").exists()


@pytest.fixture(scope="module")
def traffic() -> dict:
    if not BUILT:
        pytest.skip("the emulation was not built (PYOPS_EMULATION=ON)")
    return ledger_traffic.take()


def test_a_kernel_made_to_spill_fails(tmp_path):
    """The same kernel with eight live values passes, with 64 it spills."""
    if reason := cuda_ledger.why_not():
        pytest.skip(reason)
    kernels = cuda_ledger.compile_kernels(FOLDER / "spill.cu", "sm_90a", str(tmp_path))
    ledger = {"kernels": {"spill.cu": {name: {"sm_90a": numbers} for name, numbers in kernels.items()}}}
    complaints = cuda_ledger.local_memory(ledger)
    assert any("keep_all<64>" in line and "spill_stores" in line for line in complaints), complaints
    assert any("keep_all<64>" in line and "LDL" in line for line in complaints), complaints
    assert not any("keep_all<8>" in line for line in complaints), complaints


def test_lost_padding_fails():
    """A transposition through shared memory with and without a float of padding after each row."""
    cases = {}
    for padded in (True, False):
        with build([FOLDER / "traffic.cu"], check=True).session() as session:
            x = session.input("x", numpy.arange(1024, dtype=numpy.float32))
            out = session.output("out", (32, 32))
            assert session.run("run_transpose", padded, x, out) == 0, session.reports()
            launch = _emulation.launches(session.library)[-1]
        cases[padded] = {"transpose": {"bytes": 8192, "launches": [{"kernel": "transpose"} | launch.counters]}}
    assert ledger_traffic.regressions(cases[True], copy.deepcopy(cases[True]), cuda_ledger.GROWTH) == []
    (message,) = ledger_traffic.regressions(cases[True], cases[False], cuda_ledger.GROWTH)
    assert "wavefronts 64 -> 1056" in message


def test_excess_traffic_fails():
    """Every eighth float of a buffer: a sector of 32 bytes for each."""
    with build([FOLDER / "traffic.cu"], check=True).session() as session:
        x = session.input("x", numpy.zeros(8 * 1024, numpy.float32))
        assert session.run("run_copy_strided", 4, x, session.output("out", (1024,))) == 0, session.reports()
        counters = _emulation.launches(session.library)[-1].counters
    case = {"bytes": 2 * 4 * 1024, "launches": [{"kernel": "copy_strided"} | counters]}
    (message,) = ledger_traffic.excesses({"strided": case})
    assert "moves 36864 bytes" in message
    assert ledger_traffic.excesses({"strided": case | {"bytes": 36864}}) == []


@pytest.mark.emu
def test_traffic_ledger_holds(traffic):
    assert len(traffic) >= 20
    assert ledger_traffic.excesses(traffic) == []
    assert ledger_traffic.regressions(cuda_ledger.load()["traffic"], traffic, cuda_ledger.GROWTH) == []


@pytest.mark.emu
def test_sampled_blocks_stand_for_the_grid(traffic):
    """Three times as many blocks give the same counters for the whole grid; blocks with a target are few."""
    more = ledger_traffic.take(3 * ledger_traffic.SAMPLED)
    for name, case in traffic.items():
        for few, many in zip(case["launches"], more[name]["launches"], strict=True):
            for counter in ledger_traffic.KEPT:
                assert math.isclose(few.get(counter, 0), many.get(counter, 0), rel_tol=0.03), (name, few, many)


@pytest.mark.emu
def test_sampling_scales_to_what_a_whole_grid_does():
    """A grid small enough to run whole."""
    if not BUILT:
        pytest.skip("the emulation was not built (PYOPS_EMULATION=ON)")
    script = """
        import json, sys, torch, pyops
        from pyops import _emulation
        found = []
        for sampled in (0, 16):
            _emulation.sample(sampled)
            _emulation.launches()
            pyops.z_loss(torch.zeros(96, 4096), torch.zeros(96, dtype=torch.int64))
            launch = _emulation.launches()[0]
            x, y, z = launch.grid
            found.append((launch.blocks, x * y * z, launch.counters))
        print(json.dumps(found))
    """
    environment = os.environ | {"PYOPS_CUDA_EMU": "check", "PYOPS_BACKEND": "cuda"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    whole, sampled = json.loads(done.stdout)
    assert whole[0] == whole[1] == sampled[1] > sampled[0] == 16
    for counter, value in whole[2].items():
        assert math.isclose(value, sampled[2][counter] * sampled[1] / sampled[0], rel_tol=0.02), counter


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "target", "blocks"),
    [
        (32, 256, 0, "sm_90a", 8),  # 64 warps
        (80, 128, 20480, "sm_90a", 6),  # registers: 2560 per warp, 24 warps
        (255, 256, 0, "sm_80", 1),
        (32, 32, 0, "sm_90a", 32),  # the most there can be
        (32, 128, 100 << 10, "sm_80", 1),  # shared memory
        (32, 128, 100 << 10, "sm_90a", 2),
        (33, 1024, 0, "sm_90a", 1),  # 40 registers are given: 1280 per warp, 51 warps
    ],
)
def test_occupancy(registers, threads, shared, target, blocks):
    assert ledger_traffic.occupancy(registers, threads, shared, ledger_traffic.DEVICES[target]) == blocks


def test_estimate_is_a_lower_bound():
    """Of copying at the bandwidth, of matrix instructions at their rate, whichever is longer; whole waves count."""
    kernels = {"copy": {"sm_90a": {"registers": 32}}}
    device = ledger_traffic.DEVICES["sm_90a"]
    grid = device.multiprocessors * 8
    launch = {"kernel": "copy", "grid": [grid, 1, 1], "threads": 256, "shared": 0, "sectors": 10**9 // 32}
    case = {"bytes": 10**9, "flops": 0, "launches": [launch]}
    found = ledger_traffic.estimate(case, kernels, "sm_90a")
    assert found == {"blocks": [8], "microseconds": round(1e9 / device.bandwidth * 1e6, 1)}
    one_more = case | {"launches": [launch | {"grid": [grid + 1, 1, 1]}]}
    assert ledger_traffic.estimate(one_more, kernels, "sm_90a")["microseconds"] > 1.9 * found["microseconds"]
    matrix = case | {"launches": [launch | {"mma": 10**9}]}
    slow = ledger_traffic.estimate(matrix, kernels, "sm_90a")["microseconds"]
    assert slow == pytest.approx(4.096e12 / device.matrix_rate * 1e6, rel=1e-3)


def test_triton_ledger_notices():
    """On the committed ledger with one number changed; needs no compiler."""
    import triton_offline

    for entries in cuda_ledger.load()["triton"].values():
        assert triton_offline.regressions(entries, copy.deepcopy(entries)) == []
        for number, change in (("registers", 50), ("instructions", 10**4), ("wide_loads", -1), ("fewest_blocks", -1)):
            worse = copy.deepcopy(entries)
            kernel = next(name for name, targets in worse.items() if targets["sm_90"]["wide_loads"])
            worse[kernel]["sm_90"][number] += change
            (message,) = triton_offline.regressions(entries, worse)
            assert number in message
            assert kernel in message


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/                   IMMA.16832.S8.S8 R8, R4.ROW, R6.COL, R8 ;
        /*0030*/                   IMMA.16832.S8.S8 R8, R4.ROW, R6.COL, R8 ;
        /*0040*/                   NOP ;
        /*0050*/              @!P0 BRA 0x10 ;
        /*0060*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0070*/               @P1 BRA 0x0 ;
        /*0080*/               @P2 BRA 0xa0 ;
        /*0090*/                   STG.E [R2.64], R8 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0 ;
"""


def test_matrix_loop():
    """The innermost of two loops; padding does not count, nor does a branch forward or one to itself."""
    assert cuda_ledger.matrix_loop(SASS) == {"loop_instructions": 4, "loop_matrix": 2}
    assert cuda_ledger.matrix_loop(SASS.replace("IMMA", "IMAD")) == {}
    counted = cuda_ledger.count_instructions(SASS)
    assert (counted["IMMA"], counted["LDSM"], counted["loop_instructions"]) == (2, 1, 4)


def test_estimate_counts_what_matrix_loops_issue():
    """Five instructions for every matrix instruction, an instruction per scheduler and clock."""
    device = ledger_traffic.DEVICES["sm_90a"]
    numbers = {"registers": 32, "loop_instructions": 320, "loop_matrix": 64}
    launch = {"kernel": "product", "grid": [132, 1, 1], "threads": 256, "shared": 0, "sectors": 0, "mma": 10**8}
    case = {"bytes": 1, "flops": 0, "launches": [launch]}
    found = ledger_traffic.estimate(case, {"product": {"sm_90a": numbers}}, "sm_90a")["microseconds"]
    issued = 5 * 10**8 / (device.multiprocessors * 4 * device.clock)
    assert found == round(1e6 * max(issued, 10**8 * ledger_traffic.MMA_FLOPS / device.matrix_rate), 1)
    more = {"product": {"sm_90a": numbers | {"loop_instructions": 640}}}
    assert ledger_traffic.estimate(case, more, "sm_90a")["microseconds"] == round(2e6 * issued, 1)


def test_tiled_cases_may_read_again():
    case = {"bytes": 1000, "launches": [{"sectors": 1000}]}
    assert len(ledger_traffic.excesses({"once": case})) == 1
    assert ledger_traffic.excesses({"product": case | {"tiled": True}}) == []
