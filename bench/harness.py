"""Times an op against named rivals as interleaved, paired ratios, and holds the ratios against floors.

One round times every reference (rivals and memory probes) once and then the op once; a speed-up is the median over
the rounds of reference_i / target_i. The pairing is the point: over 12 repeats on a busy two-core machine the
spread (max - min) / median was 0.41 for the ratio of two separate blocks and 0.05 for the paired median.
Nothing here needs pytest: ``drive_plainly`` runs the rounds for the command line, ``test_benchmarks.py`` hands them
to pytest-benchmark.

    python -m pyops._bench.harness [--quick] [--filter TEXT] [--json]
    python -m pyops._bench.harness --take-floors [--runs 12]     rewrites floors.json; on a quiet machine only
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy
import torch

import pyops

FAMILIES = ("spherical", "ternary")
FOLDER = Path(__file__).resolve().parent
FLOORS = FOLDER / "floors.json"

ROUNDS = 100
MINIMUM_ROUNDS = 15  # of a case whose op alone is slow
MINIMUM_PAIRS = 5  # of a rival that is slow against the op
SECONDS = 2.0  # of a case for the op, and for each reference; a slow rival sits out most rounds
SHORTEST_ROUND = 100e-6  # a shorter call is looped inside its round
PROBED_BYTES = 8 << 20  # from here on the fraction of memory bandwidth is recorded


# ---- what a case is ----------------------------------------------------------------------------------------


@dataclass
class Timed:
    """Something to time: ``run(argument)``, with ``prepare()`` making the argument outside the timing."""

    run: Callable[[object], object]
    prepare: Callable[[], object] = lambda: None


@dataclass
class Prepared:
    """A case with its tensors: the op, its rivals, and yardsticks (memory probes of the same size, the bare
    dispatcher call), which are no rivals. ``exact()`` is the result in float64, with which those of the op and of
    the rivals named in ``comparable`` can be compared. One run, of whichever, makes ``calls`` calls: a loop over
    several operands. ``facts`` go into the row as they are."""

    target: Timed
    rivals: dict[str, Timed]
    exact: Callable[[], torch.Tensor]
    comparable: tuple[str, ...]
    yardsticks: dict[str, Timed] = field(default_factory=dict)
    backend: str = ""
    calls: int = 1
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One measurement; ``bytes`` is what the op must move, ``macs`` how often it must multiply and add. A case with a
    ``gate`` is single-threaded and has a floor: its ratio to the reference of that name must not fall below it."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    what: str
    threads: int
    gate: str
    bytes: int
    build: Callable[[Case, bool], Prepared] = field(compare=False, repr=False)
    macs: int = 0

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.op}-{self.what}-{shape}-{self.dtype}-{self.threads}t"


@dataclass(frozen=True)
class DeviceCase:
    """A measurement on a GPU: the ledger counts its traffic in emulation, the GPU sheet times it. ``bytes`` and
    ``flops`` are what the op must move and compute; ``compiled`` wants a torch.compile rival, which takes seconds.
    ``build(case, device, seed)`` makes its tensors; without a seed their rows lie over each other in little memory,
    aligned as in a real tensor, which is all that counting needs."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    what: str
    bytes: int
    flops: int
    compiled: bool
    build: Callable[[DeviceCase, torch.device, int | None], Prepared] = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        return f"{self.op} {self.what} {'x'.join(map(str, self.shape))} {self.dtype}"


def _families() -> list:
    return [importlib.import_module(f"pyops._bench.{family}") for family in FAMILIES]


def all_cases() -> list[Case]:
    return [case for family in _families() for case in family.cases()]


def device_cases(tiny: bool = False) -> list[DeviceCase]:
    """Of all families, the most telling first; ``tiny``: the same passes on shapes that an emulator can run."""
    each = [family.device_cases(tiny) for family in _families()]
    return [case for turn in itertools.zip_longest(*each) for case in turn if case]


# ---- the machine -------------------------------------------------------------------------------------------


@lru_cache
def cpu_model() -> str:
    """Model name with family and model number: cloud machines share names ("Xeon Processor") over generations."""
    facts = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return f"{name} ({', '.join(numbers)})" if numbers else name


@lru_cache
def available_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_id() -> str:
    """CPU model and thread count; no host name."""
    text = re.sub(r"\((?:R|TM|C)\)", "", cpu_model(), flags=re.IGNORECASE).lower()
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-") + f"-{available_threads()}t"


@lru_cache
def commit() -> str:
    """Short commit of the source tree, with "+" when it has changes; the version when installed from a wheel."""
    git = ["git", "-C", str(FOLDER)]
    try:
        if not (FOLDER.parent / "pyproject.toml").exists():
            raise OSError("not a source tree")
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", "..", ":!results", ":!floors.json"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return f"v{pyops.__version__}"
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def timer(threads: int) -> Callable[[], float]:
    """CPU time of the thread where there is only one. Ten repeats with 4 to 6 runnable processes on two cores, spread
    of the paired median in CPU against wall time: backward / clone 0.08, 0.10; forward+backward / clone 0.13, 0.19;
    in-place backward / copy 0.12, 0.31; small cases alike."""
    return time.thread_time if threads == 1 else time.perf_counter


# ---- probes ------------------------------------------------------------------------------------------------


def _seconds(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    best = math.inf
    for _ in range(repeats):
        start = clock()
        run()
        best = min(best, clock() - start)
    return best


def memory_probes(tensor: torch.Tensor, threads: int) -> dict[str, Timed]:
    """What the memory can do with ``tensor``: "copy" into an existing buffer (the better of torch and numpy),
    "clone" into fresh memory (page faults included, like an op that allocates its output), "read" (as integers:
    float16 bits read as float32 would hit denormals)."""
    buffer = torch.empty_like(tensor)
    source, destination = (values.reshape(-1).view(torch.uint8) for values in (tensor, buffer))
    words = source[: source.numel() // 8 * 8].view(torch.int64)
    candidates = {
        "copy": [lambda: buffer.copy_(tensor), lambda: numpy.copyto(destination.numpy(), source.numpy())],
        "clone": [tensor.clone],
        "read": [lambda: words.sum(), lambda: numpy.maximum.reduce(words.numpy())],
    }
    clock = timer(threads)
    chosen = {}
    for name, runs in candidates.items():
        for run in runs:
            run()
        best = min(runs, key=lambda run: _seconds(run, 3, clock))
        chosen[name] = Timed(lambda _, best=best: best())
    return chosen


PROBE_BYTES = {"copy": 2, "clone": 2, "read": 1}  # times the size of the tensor
EQUAL_WORK = ("peak", "stream")


def peak_probe(macs: int, threads: int) -> dict[str, Timed]:
    """ "peak": so many multiply-adds by the best 8-bit dot product of the level in use, from registers; nothing where
    that level has none."""
    native = pyops._lib.native
    if native.current_isa() == "baseline":
        return {}
    return {"peak": Timed(lambda _: native.dot_products(macs, threads))}


def stream_probe(tensors: list[torch.Tensor], calls: int, threads: int) -> dict[str, Timed]:
    """ "stream": reads the next ``calls`` of the tensors, in turn, and does nothing with them."""
    turn = itertools.cycle(tensors)

    def run(_) -> None:
        pieces = [(tensor.data_ptr(), tensor.nbytes) for tensor in itertools.islice(turn, calls)]
        pyops._lib.native.read_memory(pieces, threads)

    return {"stream": Timed(run)}


def machine_probes(threads: int) -> dict[str, float]:
    """Bytes per second of the memory probes on 256 MiB, FLOP per second of float32 and bfloat16 GEMM at 1024, and
    multiply-adds per second of the 8-bit dot product."""
    clock = timer(threads)
    found = {}
    with _quiet(threads):
        tensor = torch.ones(64 << 20)
        for name, probe in memory_probes(tensor, threads).items():
            seconds = _seconds(lambda probe=probe: probe.run(None), 5, clock)
            found[f"{name}_bytes_per_s"] = PROBE_BYTES[name] * tensor.nbytes / seconds
        for dtype in (torch.float32, torch.bfloat16):
            a, b = torch.randn(2, 1024, 1024).to(dtype)
            seconds = _seconds(lambda a=a, b=b: a @ b, 6, clock)
            found[f"gemm_{str(dtype).removeprefix('torch.')}_flop_per_s"] = 2 * 1024**3 / seconds
        work = {"peak_macs_per_s": 1 << 34, "stream_bytes_per_s": tensor.nbytes}
        probes = peak_probe(1 << 34, threads) | stream_probe([tensor], 1, threads)
        for name, amount in work.items():
            if name.split("_")[0] in probes:
                probe = probes[name.split("_")[0]]
                found[name] = amount / _seconds(lambda probe=probe: probe.run(None), 5, clock)
    return found


# ---- measuring ---------------------------------------------------------------------------------------------


def drive_plainly(target: Callable[[], object], setup: Callable[[], object], rounds: int, clock) -> list[float]:
    """What ``benchmark.pedantic(target, setup=setup, rounds=rounds, iterations=1)`` does."""
    times = []
    for _ in range(rounds):
        setup()
        start = clock()
        target()
        times.append(clock() - start)
    return times


@contextmanager
def _quiet(threads: int):
    """Thread count of the case, and no garbage collection in the middle of a round."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_num_threads(before)


class _Rounds:
    """The rounds of one case: who runs when, and the times of the references.

    Every timed call follows an untimed one of the same function, so that it finds caches and free pages as it would
    in a loop and not as the rival before it left them. Without that, a z_loss step on 256 MiB of logits took 86 ms
    after itself and up to 480 ms after eager torch (390 ms of it in the kernel: pages that had been free for two
    seconds had gone back to the virtual machine's host).
    """

    def __init__(self, target: Timed, references: dict[str, Timed], clock: Callable[[], float], seconds: float):
        self.clock = clock
        self.references = references
        self.timed = target
        estimates = {name: self._estimate(timed) for name, timed in references.items()}
        own = self._estimate(target)
        self.loops = max(1, math.ceil(SHORTEST_ROUND / own[0]))
        self.rounds = max(MINIMUM_ROUNDS, min(ROUNDS, int(seconds / (own[1] * (self.loops + 1)))))
        self.every = {}
        for name, (_, each) in estimates.items():
            pairs = max(MINIMUM_PAIRS, min(self.rounds, int(seconds / (each * (self.loops + 1)))))
            self.every[name] = math.ceil(self.rounds / pairs)
        self.times: dict[str, dict[int, float]] = {name: {} for name in references}
        self.round = -1
        self.arguments: list = []

    def _estimate(self, timed: Timed) -> tuple[float, float]:
        """(timed seconds, seconds with the preparation) of one call, after a first one that may compile."""
        timed.run(timed.prepare())
        best = (math.inf, math.inf)
        for _ in range(3):
            start = self.clock()
            argument = timed.prepare()
            ready = self.clock()
            timed.run(argument)
            end = self.clock()
            best = (min(best[0], end - ready), min(best[1], end - start))
        return best

    def _arguments(self, timed: Timed) -> list:
        timed.run(timed.prepare())
        return [timed.prepare() for _ in range(self.loops)]

    def _time(self, timed: Timed) -> float:
        arguments = self._arguments(timed)
        start = self.clock()
        for argument in arguments:
            timed.run(argument)
        return self.clock() - start

    def setup(self) -> None:
        """Times the references that are due, in rotating order, and prepares the op."""
        self.round += 1
        names = [name for name, every in self.every.items() if self.round % every == 0]
        turn = self.round % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            self.times[name][self.round] = self._time(self.references[name])
        self.arguments = self._arguments(self.timed)

    def target(self) -> None:
        for argument in self.arguments:
            self.timed.run(argument)


def compare(
    target: Timed, references: dict[str, Timed], threads: int, seconds: float = SECONDS, drive=drive_plainly
) -> tuple[list[float], dict[str, dict]]:
    """Seconds per call of ``target`` in each round, and per reference its median seconds per call ("seconds"), the
    median paired ratio to the target ("ratio") and the number of pairs."""
    clock = timer(threads)
    with _quiet(threads):
        rounds = _Rounds(target, references, clock, seconds)
        times = list(drive(rounds.target, rounds.setup, rounds.rounds, clock))
    compared = {}
    for name, taken in rounds.times.items():
        compared[name] = {
            "seconds": statistics.median(taken.values()) / rounds.loops,
            "ratio": statistics.median(seconds / times[at] for at, seconds in taken.items()),
            "pairs": len(taken),
        }
        if name == "dispatcher":
            extra = statistics.median(times[at] - seconds for at, seconds in taken.items())
            compared[name]["overhead_us"] = extra / rounds.loops * 1e6
    return [seconds / rounds.loops for seconds in times], compared


def measure(case: Case, references: Iterable[str] | None = None, compiled: bool = True, drive=drive_plainly) -> dict:
    """Runs one case and returns its row.

    Args:
        references: names of rivals and yardsticks to time; all of them by default.
        compiled: whether ``torch.compile`` rivals are wanted (seconds of compiling per case).
        drive: runs the rounds; see :func:`drive_plainly`.
    """
    with _quiet(case.threads):
        prepared = case.build(case, compiled)
    available = prepared.yardsticks | prepared.rivals
    wanted = available if references is None else {name: available[name] for name in references}
    times, compared = compare(prepared.target, wanted, case.threads, drive=drive)
    for entry in compared.values():
        entry["seconds"] /= prepared.calls
    return _row(case, prepared, [seconds / prepared.calls for seconds in times], compared)


def _row(case: Case, prepared: Prepared, times: list[float], compared: dict) -> dict:
    rivals = {name: compared[name] for name in prepared.rivals if name in compared}
    best = min(rivals, key=lambda name: rivals[name]["ratio"], default=None)
    return {
        "op": case.op,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "backend": prepared.backend,
        "pass": case.what,
        "threads": case.threads,
        "machine": machine_id(),
        "commit": commit(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "clock": timer(case.threads).__name__,
        "rounds": len(times),
        "median": statistics.median(times),
        "p20": float(numpy.quantile(times, 0.2)),
        "p80": float(numpy.quantile(times, 0.8)),
        "references": compared,
        "rival": best,
        "rival_median": rivals[best]["seconds"] if best else None,
        "speedup": rivals[best]["ratio"] if best else None,
        "bytes": case.bytes,
        "macs": case.macs,
        "fraction": _fractions(case, compared),
        **prepared.facts,
    }


def _fractions(case: Case, compared: dict) -> dict[str, float]:
    """Bytes per second of the op over those of each probe on tensors of the same size in the same rounds; what the
    probes of equal work would have taken over what the op took."""
    equal = {name: compared[name]["ratio"] for name in EQUAL_WORK if name in compared}
    if case.bytes < PROBED_BYTES:
        return equal
    size = math.prod(case.shape) * getattr(torch, case.dtype).itemsize
    return equal | {
        name: compared[name]["ratio"] * case.bytes / (factor * size)
        for name, factor in PROBE_BYTES.items()
        if name in compared
    }


# ---- floors ------------------------------------------------------------------------------------------------


def load_floors() -> dict:
    return json.loads(FLOORS.read_text())


def foreign(floors: dict) -> str:
    """Why these floors cannot gate here, or an empty string: a ratio also moves when the reference moves."""
    if not floors.get("cases"):
        return "no floors were taken yet"
    here = {"cpu": cpu_model(), "torch": torch.__version__}
    differences = [f"{key} was {floors[key]!r}, is {value!r}" for key, value in here.items() if floors[key] != value]
    return "floors were taken elsewhere: " + "; ".join(differences) if differences else ""


@dataclass(frozen=True)
class Verdict:
    """``state`` is "pass", "fail" or "inform" (below the floor or not, it does not gate)."""

    state: str
    text: str


def judge(case: Case, row: dict, floors: dict) -> Verdict:
    """The row's ratio against the floor of its case."""
    entry = floors.get("cases", {}).get(case.name)
    if entry is None:
        return Verdict("inform", f"{case.name}: no floor")
    ratio = row["references"][case.gate]["ratio"]
    if entry["floor"] is None:
        return Verdict("inform", f"{case.name}: {ratio:.3f}x {case.gate}, was too unsteady for a floor")
    holds = ratio >= entry["floor"]
    text = f"{case.name}: {ratio:.3f}x {case.gate}, floor {entry['floor']:.3f} (median {entry['median']:.3f})"
    if foreign(floors):
        return Verdict("inform", text + ("" if holds else ", BELOW, not gating"))
    return Verdict("pass" if holds else "fail", text + ("" if holds else ", BELOW"))


def measure_gated(case: Case, floors: dict, drive=drive_plainly) -> tuple[dict, Verdict]:
    """Row and verdict of a gated case, measured against its gate alone, as its floor was. A failing case is measured
    twice more before it counts as failed."""
    for attempt in range(3):
        row = measure(case, [case.gate], compiled=False, drive=drive_plainly if attempt else drive)
        verdict = judge(case, row, floors)
        if verdict.state != "fail":
            break
    return row, verdict


def floor_entry(reference: str, ratios: list[float]) -> dict:
    """The ratio that a change must not fall below: the median less 10 % or three times the spread that was seen.
    None where the spread would hide a kernel slowed by 30 %: such a floor would only look like a gate."""
    middle = statistics.median(ratios)
    spread = (max(ratios) - min(ratios)) / middle
    margin = max(0.10, 3 * spread)
    floor = round(middle * (1 - margin), 4) if 1 - margin > 1 / 1.3 else None
    return {"reference": reference, "median": round(middle, 4), "spread": round(spread, 4), "floor": floor}


def take_floors(runs: int, text: str) -> dict:
    """Runs the gated cases ``runs`` times, each in a process of its own (memory layout differs between processes
    more than within one), and returns the floors."""
    ratios: dict[str, list[float]] = {}
    gates = {case.name: case.gate for case in all_cases() if case.gate}
    for run in range(runs):
        command = [sys.executable, "-m", "pyops._bench.harness", "--quick", "--json", "--filter", text]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for row in json.loads(done.stdout):
            ratios.setdefault(row["case"], []).append(row["references"][gates[row["case"]]]["ratio"])
        print(f"run {run + 1} of {runs} done", file=sys.stderr)
    cases = {name: floor_entry(gates[name], taken) for name, taken in sorted(ratios.items())}
    return {"cpu": cpu_model(), "torch": torch.__version__, "commit": commit(), "runs": runs, "cases": cases}


# ---- keeping rows ------------------------------------------------------------------------------------------

_KEY = ("op", "shape", "dtype", "backend", "pass", "threads", "machine", "commit")


def results_file(quick: bool) -> Path | None:
    """Where rows are kept: in the source tree only; those of quick runs in a folder that git ignores."""
    if not (FOLDER.parent / "pyproject.toml").exists():
        return None
    folder = FOLDER / "results" / "local" if quick else FOLDER / "results"
    return folder / f"{machine_id()}.jsonl"


def store(rows: list[dict], path: Path) -> None:
    """Appends rows; a row of the same key (same commit) is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {}
    for row in (load(path) if path.exists() else []) + rows:
        kept[json.dumps([row.get(part) for part in _KEY])] = row
    path.write_text("".join(json.dumps(row) + "\n" for row in kept.values()))


def load(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def probe_rows(threads: Iterable[int]) -> list[dict]:
    """One row per thread count with what memory and GEMM can do here, in the form of the other rows."""
    return [
        {
            "op": "probe",
            "shape": [],
            "dtype": "",
            "backend": "torch",
            "pass": "",
            "threads": count,
            "machine": machine_id(),
            "commit": commit(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            **machine_probes(count),
        }
        for count in threads
    ]


# ---- command line ------------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> list[dict]:
    rows = []
    for case in all_cases():
        if arguments.filter not in case.name or (arguments.quick and not case.gate):
            continue
        row = measure(case, [case.gate], compiled=False) if arguments.quick else measure(case)
        rows.append({"case": case.name, **row})
        if not arguments.json:
            print(f"{case.name}: {row['median'] * 1e3:.3f} ms", end="  ")
            print(*(f"{name} {r['ratio']:.3f}x" for name, r in row["references"].items()), sep="  ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pyops._bench.harness", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the gated cases, against their gates only")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON list")
    parser.add_argument("--take-floors", action="store_true", help="rewrite floors.json from --runs quick runs")
    parser.add_argument("--runs", type=int, default=12, help="runs of --take-floors (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.take_floors:
        floors = take_floors(arguments.runs, arguments.filter)
        FLOORS.write_text(json.dumps(floors, indent=1) + "\n")
        for name, entry in floors["cases"].items():
            print(f"{name}: {entry}" + ("  too unsteady to gate" if entry["floor"] is None else ""))
        return
    rows = _run(arguments)
    if arguments.json:
        json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
