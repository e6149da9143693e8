"""How fast the emulator is: by hand, on a quiet machine.

    python tests/emulator/speed.py

prints rates of three kernels in both builds with one host thread and with all, and beside them a probe of the
processor (dependent float multiplications per second, which is the clock over the latency of one).
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from emulator.emulation import FOLDER, build

REPEATS = 7


def seconds(run: Callable[[], int]) -> float:
    """The median of several calls, after one that may touch memory for the first time."""
    taken = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        assert run() == 0
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def probe() -> float:
    """Additions per second of a running sum, each of which waits for the one before it."""
    values = numpy.ones(1 << 20, numpy.float32)
    return values.size / min(seconds(lambda: int(numpy.cumsum(values)[-1]) * 0) for _ in range(3))


def rates(check: bool, threads: int) -> dict[str, float]:
    random = numpy.random.default_rng(0)
    part = 8 if check else 1
    found = {}
    with build([FOLDER / "traffic.cu"], check=check).session(threads=threads) as session:
        blocks, steps = 64 // part, 64
        values = random.standard_normal(1536).astype(numpy.float32)  # subnormal numbers would be slow
        pairs = torch.from_numpy(values).bfloat16().view(torch.int32).numpy().view(numpy.uint32)
        a, b = session.input("a", pairs[:512]), session.input("b", pairs[512:])
        c = session.output("c", (blocks * 128 * 4,))
        taken = seconds(session.bound("run_multiply", blocks, a, b, c, steps))
        found["bf16 mma, FLOP/s"] = blocks * 4 * steps * 2 * 16 * 8 * 16 / taken
    with build([FOLDER / "traffic.cu"], check=check).session(threads=threads) as session:
        rows, columns = 1024 // part, 4096
        w = session.input("w", random.integers(0, 1 << 32, rows * columns // 4).astype(numpy.uint32))
        x = session.input("x", random.integers(0, 1 << 32, columns // 4).astype(numpy.uint32))
        y = session.output("y", (rows,), numpy.int32)
        taken = seconds(session.bound("run_multiply_vector", rows, w, x, y, columns))
        found["int8 GEMV, MAC/s"] = rows * columns / taken
        signed = [v.values().view(numpy.int8).astype(numpy.int64) for v in (w, x)]
        numpy.testing.assert_array_equal(y.values(), (signed[0].reshape(rows, columns) @ signed[1]).astype(numpy.int32))
    with build([FOLDER / "traffic.cu"], check=check).session(threads=threads) as session:
        blocks = 1024 // part
        x = session.input("x", numpy.zeros(8 * 256 * blocks, numpy.float32))
        out = session.output("out", (256 * blocks,))
        taken = seconds(session.bound("run_copy_strided", blocks, x, out))
        found["simple kernel, CUDA threads/s"] = 256 * blocks / taken
    return found


def main() -> None:
    print(f"probe: {probe():.3g} dependent additions/s")
    for check in (False, True):
        alone, together = rates(check, 1), rates(check, os.cpu_count() or 1)
        for name, rate in alone.items():
            build_name = "check" if check else "fast"
            print(f"{build_name:6s}{name:32s}{rate:12.3g}   all host threads: {together[name] / rate:.2f} times that")


if __name__ == "__main__":
    main()
