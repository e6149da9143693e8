"""One call on a machine with a GPU: builds, checks and measures every kernel there.

    python bench/gpu_sheet.py --out DIR [--budget 540] [--phases env,build,bench] [--commit HASH]
    python bench/gpu_sheet.py --out DIR --dry-run        every phase on the CPU, the emulator as device

Writes DIR/<gpu>.json, DIR/<gpu>.md and DIR/logs.tar.gz, and rewrites them after every phase, so that a killed run
leaves what it had. Every phase is a process of its own with a share of the budget as its time limit, and what earlier
ones left; what it finds it appends to a file line by line, so that a phase that was killed counts up to there. Needs no
network and nothing installed: torch, triton, numpy, pytest, cmake, ninja, pybind11, nvcc and g++ must be there; ncu and
compute-sanitizer are used if they are. Settings of the GPU are read, never changed. Where the tree has no .git, give
--commit.

The cases are those of ``harness.device_cases()``: the ledger counts the same ones in emulation.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu_sheet"
SITE = BUILD / "site"
BUDGET = 540
# Phase: its share of 540 seconds; the most valuable first.
PHASES = {
    "env": 30, "build": 100, "ceilings": 25, "probes": 45, "bench": 130, "tests": 110, "triton": 40, "counters": 25,
    "sanitizer": 35,
}  # fmt: skip
LISTS = (
    "sanitizer",
    "counters",
    "not_run",
)  # what phases report is added to these and to rows; dictionaries are merged
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
COPIES = 4  # of the L2 cache: inputs rotate over that many bytes
REPEATS = 20
HOST_TIMED = 1 << 27  # bytes: of smaller calls the cost to the CPU is measured, too
BUSY_CYCLES = 2_000_000  # about a millisecond, in which the host gets ahead of the GPU
TOLERANCE = 4  # the error of the op over that of the best comparable rival
ROW_KEYS = (
    "op", "dir", "dtype", "shape", "ms_median", "ms_p10", "ms_p90", "host_us", "bytes", "flops", "gbps", "tflops",
    "frac_of_copy", "frac_of_mm", "est_ms", "peers", "err", "backend", "commit",
)  # fmt: skip
IDENTITY = ("op", "dir", "dtype", "shape", "backend")  # of a row: a later one replaces it
SHEET_KEYS = (
    "gpu", "date", "commit", "dirty", "versions", "state", "build", "ceilings", "probes", "tests", "sanitizer", "rows",
    "counters", "not_run", "phases",
)  # fmt: skip


# ---- the sheet ---------------------------------------------------------------------------------------------


def empty_sheet(commit: str) -> dict:
    sheet = {key: {} for key in SHEET_KEYS} | {key: [] for key in (*LISTS, "rows")}
    return sheet | {"gpu": "unknown", "date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": commit}


def check_sheet(sheet: dict) -> list[str]:
    """What is wrong with a sheet's form."""
    wrong = [f"no {key}" for key in SHEET_KEYS if key not in sheet]
    for row in sheet.get("rows", []):
        missing = [key for key in ROW_KEYS if key not in row]
        if missing:
            wrong.append(f"row {row.get('op')} {row.get('dir')}: no {', '.join(missing)}")
        elif not (row["ms_p10"] <= row["ms_median"] <= row["ms_p90"] and row["ms_median"] > 0):
            wrong.append(f"row {row['op']} {row['dir']}: times {row['ms_p10']}, {row['ms_median']}, {row['ms_p90']}")
    for phase in PHASES:
        if phase not in sheet.get("phases", {}):
            wrong.append(f"phase {phase} left no trace")
    return wrong


def file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def markdown(sheet: dict) -> str:
    """Ceilings, checks, and a line per row."""
    lines = [f"# {sheet['gpu']}, {sheet['date']}, commit {sheet['commit'] or 'unknown'}", ""]
    lines += [", ".join(f"{name} {version}" for name, version in sheet["versions"].items()), "", "## Ceilings", ""]
    lines += ["| what | rate |", "|---|---|"]
    lines += [f"| {name} | {value:.4g} |" for name, value in sheet["ceilings"].items()]
    lines += ["", "## Checks", ""]
    lines += [f"- {name}: {sheet[name] or 'not run'}" for name in ("probes", "tests")]
    lines += [f"- {one['tool']}: {one['result']}" for one in sheet["sanitizer"]] or ["- sanitizer: not run"]
    lines += [
        "",
        "## Rows",
        "",
        "Error is the largest one over the largest value, against float64. Times are of the GPU",
    ]
    lines += ["alone; host is what a call costs the CPU.", ""]
    header = ["op", "pass", "shape", "dtype", "backend", "ms (p10, p90)", "host us"]
    header += ["of copy", "of matrix product", "estimate ms"]
    header += ["best peer", "times faster", "error", "peer's"]
    lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in sheet["rows"]:
        peers = row["peers"]
        best = min(peers, key=lambda name: peers[name]["ms"], default="")
        errors = [peer["err"] for peer in peers.values() if peer["err"] is not None]
        speed = f"{peers[best]['ms'] / row['ms_median']:.2f}" if best else ""
        shape = "x".join(map(str, row["shape"]))
        times = f"{row['ms_median']:.4g} ({row['ms_p10']:.4g}, {row['ms_p90']:.4g})"
        rates = [_number(row[key]) for key in ("frac_of_copy", "frac_of_mm", "est_ms")]
        compared = [best, speed, _number(row["err"]), _number(min(errors, default=None))]
        cells = [row["op"], row["dir"], shape, row["dtype"], row["backend"], times, _number(row["host_us"])]
        cells += [*rates, *compared]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Counters", ""]
    lines += [f"- {one}" for one in sheet["counters"]] or ["none"]
    lines += ["", "## Not run", ""]
    lines += [f"- {text}" for text in sheet["not_run"]] or ["nothing was left out"]
    lines += ["", "## Phases", ""]
    lines += [f"- {name}: {phase['result']}, {phase['seconds']:.0f} s" for name, phase in sheet["phases"].items()]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def write(sheet: dict, out: Path, logs: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    name = file_name(sheet["gpu"])
    if name != "unknown":  # written before the GPU was known
        for suffix in ("json", "md"):
            (out / f"unknown.{suffix}").unlink(missing_ok=True)
    (out / f"{name}.json").write_text(json.dumps(sheet, indent=1) + "\n")
    (out / f"{name}.md").write_text(markdown(sheet))
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        for log in sorted(logs.glob("*.log")):
            archive.add(log, log.name)


# ---- the driver --------------------------------------------------------------------------------------------


def merge(sheet: dict, findings: Path) -> None:
    """Adds the lines that a phase left; the last one may be cut off."""
    for line in findings.read_text().splitlines() if findings.exists() else ():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        for key, value in found.items():
            if key == "rows":
                identity = [value[part] for part in IDENTITY]
                sheet["rows"] = [row for row in sheet["rows"] if [row[part] for part in IDENTITY] != identity]
            if key in LISTS or key == "rows":
                sheet[key].append(value)
            elif isinstance(value, dict) and isinstance(sheet.get(key), dict):
                sheet[key] |= value
            else:
                sheet[key] = value


def run_limited(command: list[str], seconds: float, log: Path, environment: dict[str, str]) -> str:
    """Runs a process group with a time limit; "ok", "failed (code)" or "out of time"."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            with suppress(ProcessLookupError):  # whatever it has left behind, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "ok" if code == 0 else f"failed ({code})"


def environment_of(phase: str, dry: bool) -> dict[str, str]:
    tools = str(Path(sys.executable).parent)  # cmake and ninja of the same environment
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PATH": tools + os.pathsep + os.environ.get("PATH", "")}
    if not dry:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH"))))
    if dry:
        environment |= {
            "PYOPS_CUDA_EMU": "check" if phase in ("sanitizer", "counters") else "1",
            "PYOPS_BACKEND": "" if phase in ("probes", "tests") else "cuda",
        }
    return environment


def drive(arguments: argparse.Namespace) -> int:
    sheet = empty_sheet(arguments.commit)
    start = time.monotonic()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        due = 0.0  # when the phase must be over
        for phase in arguments.phases:
            due += PHASES[phase] / BUDGET * arguments.budget
            seconds = due - (time.monotonic() - start)
            if seconds < 1:
                sheet["phases"][phase] = {"result": "not run: no time left", "seconds": 0.0}
                sheet["not_run"].append(f"phase {phase}: no time left")
                continue
            findings = logs / f"{phase}.findings"
            command = [sys.executable, __file__, "--phase", phase, "--findings", str(findings)]
            command += ["--seconds", str(seconds), "--commit", sheet["commit"]] + ["--dry-run"] * arguments.dry_run
            began = time.monotonic()
            environment = environment_of(phase, arguments.dry_run)
            result = run_limited(command, seconds, logs / f"{phase}.log", environment)
            merge(sheet, findings)
            sheet["phases"][phase] = {"result": result, "seconds": round(time.monotonic() - began, 1)}
            failed = failed or result != "ok"
            if result != "ok":
                sheet["not_run"].append(f"phase {phase}: {result}, see its log")
                print((logs / f"{phase}.log").read_text(errors="replace")[-3000:], flush=True)
            print(f"{phase}: {result}, {sheet['phases'][phase]['seconds']} s", flush=True)
            write(sheet, arguments.out, logs)
    print(markdown(sheet))
    return int(failed)


# ---- what phases share -------------------------------------------------------------------------------------


class Findings:
    """Where a phase leaves what it found, at once."""

    def __init__(self, path: Path):
        self._file = path.open("a")

    def add(self, **found) -> None:
        self._file.write(json.dumps(found) + "\n")
        self._file.flush()


def output_of(*command: str) -> str:
    """What a program prints, or nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def find_program(name: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), *sorted(map(str, Path("/usr/local").glob("cuda-*")))]
    folders = [f"{home}/{part}" for home in homes for part in ("bin", "compute-sanitizer")]
    folders += map(str, Path("/opt/nvidia/nsight-compute").glob("*"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


Run = Callable[[int, object], object]  # call number, what was prepared for it
Prepare = Callable[[int], object]


class Gpu:
    """The device of a real run."""

    def __init__(self):
        import torch

        self.torch = torch
        self.device = torch.device("cuda")
        properties = torch.cuda.get_device_properties(0)
        self.name = properties.name
        self.cache = getattr(properties, "L2_cache_size", 50 << 20)
        self.scale = 1  # of probe sizes

    def times(self, run: Run, repeats: int, prepare: Prepare = lambda _: None) -> list[float]:
        """Seconds of each call ``run(i, prepare(i))`` on the GPU, by events. Preparations lie between them, and before
        each call the GPU is kept busy until all of it has been launched: otherwise short calls measure the host."""
        torch = self.torch
        for i in range(3):
            run(i, prepare(i))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize()
        for i, (begin, end) in enumerate(events):
            argument = prepare(i)
            torch.cuda._sleep(BUSY_CYCLES)
            begin.record()
            run(i, argument)
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e-3 for begin, end in events]

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()


class Emulated:
    """The device of a dry run."""

    def __init__(self):
        import torch

        self.torch = torch
        self.device = torch.device("cpu")
        self.name = "emulated"
        self.cache = 1 << 16
        self.scale = 1024

    def times(self, run: Run, repeats: int, prepare: Prepare = lambda _: None) -> list[float]:
        found = []
        for i in range(min(repeats, 3)):
            argument = prepare(i)
            start = time.perf_counter()
            run(i, argument)
            found.append(time.perf_counter() - start)
        return found

    def synchronize(self) -> None:
        pass


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = lambda part: ordered[min(len(ordered) - 1, int(part * len(ordered)))]  # noqa: E731
    return {
        "ms_median": statistics.median(ordered) * 1e3,
        "ms_p10": min(at(0.1), statistics.median(ordered)) * 1e3,
        "ms_p90": max(at(0.9), statistics.median(ordered)) * 1e3,
    }


# ---- phases ------------------------------------------------------------------------------------------------


def phase_env(findings: Findings, dry: bool, seconds: float) -> None:
    import numpy
    import torch

    git = ("git", "-C", str(ROOT))
    head = output_of(*git, "rev-parse", "--short=12", "HEAD")
    if head:
        findings.add(commit=head, dirty=bool(output_of(*git, "status", "--porcelain", "--untracked-files=no")))
    nvcc = find_program("nvcc")
    release = re.search(r"V(\d+\.\d+\.\d+)", output_of(nvcc, "--version") if nvcc else "")
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "missing"
    query = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    state = [] if dry else output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").split(", ")
    state = dict(zip(query.split(","), state, strict=True)) if len(state) == 6 else {}
    findings.add(
        versions={
            "python": sys.version.split()[0], "torch": torch.__version__, "triton": triton_version,
            "numpy": numpy.__version__, "nvcc": release[1] if release else "missing",
            "driver": state.get("driver_version", "none"),
        },
        state=state,
    )  # fmt: skip
    findings.add(gpu="emulated" if dry else torch.cuda.get_device_name(0))


def cmake_options(**switches: str) -> list[str]:
    import importlib.util

    torch = Path(importlib.util.find_spec("torch").origin).parent
    pybind11 = output_of(sys.executable, "-m", "pybind11", "--cmakedir")
    options = {
        "PYOPS_TORCH_DIR": torch, "PYOPS_OUTPUT_DIR": BUILD / "lib", "Python_EXECUTABLE": sys.executable,
        "PYOPS_NATIVE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"), "pybind11_DIR": pybind11, **switches,
    }  # fmt: skip
    return [f"-D{name}={value}" for name, value in options.items()]


def make_libraries(seconds: float, *targets: str, **switches: str) -> bool:
    """Configures and builds; whether that went well in time."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *cmake_options(**switches)]
    build = ["cmake", "--build", str(BUILD), "-j", str(os.cpu_count()), *targets]
    end = time.monotonic() + seconds
    for command in (configure, build):
        with subprocess.Popen(command, start_new_session=True) as process:
            try:
                code = process.wait(max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return False
        if code:
            return False
    return True


def lay_out_site(libraries: list[Path]) -> None:
    """A folder that Python can import pyops from, made of copies."""
    shutil.rmtree(SITE, ignore_errors=True)
    skipped = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for source, target in (("pyops", "pyops"), ("triton_kernels", "pyops/triton_kernels"), ("bench", "pyops/_bench")):
        shutil.copytree(ROOT / source, SITE / target, ignore=skipped)
    for library in libraries:
        shutil.copy(library, SITE / "pyops")


def phase_build(findings: Findings, dry: bool, seconds: float) -> None:
    """For the present GPU alone, without setuptools. If the CUDA library does not build here, a prebuilt one that was
    carried along in pyops/ serves: it depends on no version of torch or Python."""
    start = time.monotonic()
    if dry:
        import pyops

        libraries = sorted(path.name for path in Path(pyops.__file__).parent.glob("*.so"))
        assert {"_emulated.so", "_emulated_check.so"} <= set(libraries), libraries
        findings.add(build={"result": "the present build", "libraries": libraries})
        return
    import torch

    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}" + ("a" if major >= 9 else "")
    nvcc = find_program("nvcc") or "nvcc"
    left = start + seconds - 25 - time.monotonic()  # for the other way and the first import
    if make_libraries(left, PYOPS_CUDA="ON", PYOPS_CUDA_ARCHS=architecture, CMAKE_CUDA_COMPILER=nvcc):
        result, found = "built", {}
    else:
        if not make_libraries(15, "--target", "_native", PYOPS_CUDA="OFF"):
            raise RuntimeError("nothing builds here, not even _native")
        result, found = "prebuilt", {path.name: path for path in (ROOT / "pyops").glob("_*.so")}
        findings.add(not_run="build: the CUDA library did not build, the carried one is used")
    found |= {path.name: path for path in (BUILD / "lib").glob("*.so")}
    lay_out_site(list(found.values()))
    findings.add(
        build={
            "result": result, "architecture": architecture, "libraries": sorted(found),
            "seconds": round(time.monotonic() - start, 1),
        }
    )  # fmt: skip
    smoke = "import pyops, torch; print(pyops.z_loss(torch.randn(4, 99).cuda(), torch.zeros(4, dtype=int).cuda()))"
    environment = os.environ | {"PYTHONPATH": str(SITE), "PYOPS_STRICT": "1"}
    subprocess.run([sys.executable, "-P", "-c", smoke], check=True, env=environment)


def phase_ceilings(findings: Findings, dry: bool, seconds: float) -> None:
    device = Emulated() if dry else Gpu()
    torch, scale = device.torch, device.scale
    size = 8192 if scale == 1 else 64

    def best(run: Run) -> float:
        return min(device.times(run, 10))

    def int8_rate() -> float:
        a, b = (torch.randint(-128, 128, (size, size), device=device.device, dtype=torch.int8) for _ in range(2))
        return 2 * size**3 / best(lambda *_: torch._int_mm(a, b.t()))

    one = torch.zeros(1, device=device.device)
    cached = max(1, device.cache // 32 // 1024) * 1024
    ceilings = {
        "copy_bytes_per_s": lambda: copy_and_read(device, (1 << 28) // scale, best)[0],
        "read_bytes_per_s": lambda: copy_and_read(device, (1 << 28) // scale, best)[1],
        "cached_copy_bytes_per_s": lambda: copy_and_read(device, cached, best)[0],
        "mm_bfloat16_flop_per_s": lambda: product_rate(device, size, torch.bfloat16, best),
        "mm_float32_flop_per_s": lambda: product_rate(device, size // 2, torch.float32, best),
        "mm_int8_op_per_s": int8_rate,
        "launch_gpu_s": lambda: best(lambda *_: one.add_(1)),
        "launch_host_s": lambda: host_seconds(lambda *_: one.add_(1), lambda _: None, device),
    }
    for name, measured in ceilings.items():
        with noted(findings, f"ceiling {name}"):
            findings.add(ceilings={name: measured()})


def host_seconds(run: Run, prepare: Prepare, device) -> float:
    """What a call costs the CPU: many of them without waiting for the GPU."""
    arguments = [prepare(i) for i in range(REPEATS)]
    device.synchronize()
    start = time.perf_counter()
    for i, argument in enumerate(arguments):
        run(i, argument)
    taken = (time.perf_counter() - start) / REPEATS
    device.synchronize()
    return taken


def copy_and_read(device, floats: int, best: Callable) -> tuple[float, float]:
    """Bytes per second, read and written or read."""
    source = device.torch.randn(floats, device=device.device)
    target = device.torch.empty_like(source)
    copy = 2 * source.nbytes / best(lambda *_: target.copy_(source))
    return copy, source.nbytes / best(lambda *_: source.view(-1, 1024).amax(1))


def product_rate(device, n: int, dtype, best: Callable) -> float:
    a, b = (device.torch.randn(n, n, device=device.device).to(dtype) for _ in range(2))
    return 2 * n**3 / best(lambda *_: a @ b)


def run_pytest(arguments: list[str], seconds: float, environment: dict[str, str] | None = None) -> dict:
    """Counts of a pytest run, from its report; one that takes too long is interrupted and reports what it had."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-P", "-m", "pytest", "-q", "--maxfail=50", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", *arguments]
        result = "ended"
        # A process started in the background ignores SIGINT, and so would pytest.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(command, cwd=ROOT, env=os.environ | (environment or {}), preexec_fn=heed) as process:
            try:
                process.wait(max(1.0, seconds - 10))
            except subprocess.TimeoutExpired:
                result = "interrupted: out of time"
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(8)
                except subprocess.TimeoutExpired:
                    process.kill()
        if not report.exists():
            return {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "result": f"{result}, no report"}
        suite = ElementTree.parse(report).getroot().find("testsuite")
    total, failed, errors, skipped = (int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped"))
    failures = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    return {
        "passed": total - failed - errors - skipped, "failed": failed + errors, "skipped": skipped,
        "failures": failures[:50], "result": result,
    }  # fmt: skip


def workers() -> list[str]:
    import importlib.util

    return ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []


def phase_probes(findings: Findings, dry: bool, seconds: float) -> None:
    """Every intrinsic, its PTX on the hardware against numpy: what the emulator's version passes too."""
    chosen = "fast" if dry else "gpu"
    findings.add(probes=run_pytest(["tests/emulator/test_intrinsics.py", "-k", chosen], seconds))


def phase_tests(findings: Findings, dry: bool, seconds: float) -> None:
    """The contract on the GPU by the CUDA kernels, then, as Triton's mode is one of a process, by Triton's."""
    if dry:
        chosen = ["tests/spherical/test_cross_entropy.py", "-k", "cuda-emulated"]
        findings.add(tests={"cuda": run_pytest(chosen, seconds)})
        return
    end = time.monotonic() + seconds
    chosen = ["tests/contract.py", "-m", "gpu and not slow", *workers()]
    findings.add(tests={"cuda": run_pytest(chosen, seconds * 0.55)})
    own = ["tests/spherical/test_triton_kernels.py", "tests/ternary/test_ternary_triton.py"]
    chosen = [*own, "tests/contract.py", "-m", "gpu and not slow"]
    chosen += ["-k", "triton_kernels or ternary_triton or test_accuracy or test_sizes", *workers()]
    findings.add(tests={"triton": run_pytest(chosen, end - time.monotonic(), {"TRITON_INTERPRET": "0"})})


def run_each_once(dry: bool, profiled: bool = False) -> None:
    """Every op and pass once on a small shape, for the sanitizer; or, for the profiler, the first few of the ledger."""
    from pyops._bench import harness

    device = Emulated() if dry else Gpu()
    cases = [case for case in harness.device_cases() if case.what in ("forward", "backward")][:4]
    for case in cases if profiled else harness.device_cases(tiny=True):
        timed = case.build(dataclasses.replace(case, compiled=False), device.device, 0).target
        timed.run(timed.prepare())
    device.synchronize()


def each_once(phase: str) -> list[str]:
    return [sys.executable, __file__, "--phase", phase, "--findings", os.devnull, "--seconds", "60"]


def phase_sanitizer(findings: Findings, dry: bool, seconds: float) -> None:
    if dry:
        done = subprocess.run([*each_once("each-once"), "--dry-run"], capture_output=True, text=True)
        clean = "0 errors" if done.returncode == 0 else done.stderr[-300:]
        findings.add(sanitizer={"tool": "emulator's checker", "result": clean})
        return
    program = find_program("compute-sanitizer")
    if not program:
        findings.add(not_run="sanitizer: no compute-sanitizer here")
        return
    end = time.monotonic() + seconds - 5
    # Of our kernels only; torch asks its libraries for much that is not there, which is no error of ours.
    options = ["--error-exitcode", "9", "--launch-timeout", "0", "--report-api-errors", "no", "--print-limit", "20"]
    options += ["--kernel-regex", "kns=pyops"]
    running = {}
    with tempfile.TemporaryDirectory() as folder:
        for tool in SANITIZERS:
            output = Path(folder) / tool
            command = [program, "--tool", tool, *options, *each_once("each-once")]
            environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            with output.open("w") as file:
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            running[tool] = process, output
        for tool, (process, output) in running.items():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(1.0, end - time.monotonic()))
            late = process.poll() is None
            process.kill()
            text = output.read_text(errors="replace")
            print(text[-4000:], flush=True)
            if late:
                findings.add(not_run=f"sanitizer {tool}: out of time")
                continue
            summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: ([^\n]*)", text)
            result = summary[1] if summary else f"exit code {process.returncode}, no summary"
            findings.add(sanitizer={"tool": tool, "result": result})


@contextmanager
def noted(findings: Findings, what: str):
    """An error of one case is a line under "not run" and not the end of the phase."""
    try:
        yield
    except Exception as error:  # torch, Triton and the driver raise many kinds
        text = str(error).strip().splitlines()
        findings.add(not_run=f"{what}: {type(error).__name__}: {text[0][:200] if text else ''}")
        print(f"{what}: {error!r}", flush=True)


def relative_error(result, exact) -> float:
    result = result[0] if isinstance(result, tuple) else result
    scale = exact.abs().max().item()
    error = (result.double() - exact).abs().max().item()
    return error / scale if scale else error


def phase_bench(findings: Findings, dry: bool, seconds: float) -> None:
    """All cases, then those with a torch.compile rival again, which replaces their rows: compiling takes seconds."""
    end = time.monotonic() + seconds - (5 if dry else 25)
    device = Emulated() if dry else Gpu()
    ceilings, cases = measured_ceilings(device), sheet_cases(dry)
    measure_all([dataclasses.replace(case, compiled=False) for case in cases], findings, device, ceilings, end)
    measure_all([case for case in cases if case.compiled], findings, device, ceilings, end)


def phase_triton(findings: Findings, dry: bool, seconds: float) -> None:
    """Our Triton kernels on the same cases, without rivals. In a process of its own: asking for a backend puts Python
    on the way of every later call."""
    import pyops

    if dry:
        return  # interpreted Triton says nothing about time, and the tests run it
    device = Gpu()
    end = time.monotonic() + seconds - 10
    with pyops.use_backend("triton"):
        cases = [dataclasses.replace(case, compiled=False) for case in sheet_cases(dry)]
        measure_all(cases, findings, device, measured_ceilings(device), end, rivals=False)


def sheet_cases(dry: bool) -> list:
    from pyops._bench import harness

    return harness.device_cases(tiny=dry)


def measure_all(cases: list, findings: Findings, device, ceilings, end: float, rivals: bool = True) -> None:
    estimates = ledger_estimates(device)
    for case in cases:
        if time.monotonic() > end:
            findings.add(not_run=f"bench {case.name}{' with torch.compile' * case.compiled}: no time left")
            continue
        with noted(findings, f"bench {case.name}"):
            findings.add(rows=measure(case, device, ceilings, estimates, rivals))
        if device.device.type == "cuda":
            device.torch.cuda.empty_cache()


def measured_ceilings(device) -> tuple[float, float]:
    """Copy bandwidth and bfloat16 matrix product, taken again beside the rows: clocks move."""

    def middle(run: Run) -> float:
        return statistics.median(device.times(run, 10))

    copy, _ = copy_and_read(device, (1 << 27) // device.scale, middle)
    size = 8192 if device.scale == 1 else 64
    return copy, product_rate(device, size, device.torch.bfloat16, middle)


def ledger_estimates(device) -> dict[str, float]:
    """Lower bounds in milliseconds by case, for the target nearest to this device."""
    path = ROOT / "bench" / "ledger.json"
    traffic = json.loads(path.read_text()).get("traffic", {}) if path.exists() else {}
    major = device.torch.cuda.get_device_capability()[0] if device.device.type == "cuda" else 9
    target = {8: "sm_80", 9: "sm_90a", 10: "sm_100"}.get(major, "sm_90a")
    return {name: case["estimate"][target]["microseconds"] * 1e-3 for name, case in traffic.items()}


def measure(case, device, ceilings: tuple[float, float], estimates: dict[str, float], rivals: bool = True) -> dict:
    """A row: the op and its rivals on the same rotating inputs, after their results were found right."""
    copies = max(1, min(16, math.ceil(COPIES * device.cache / max(1, case.bytes))))
    sets = [case.build(case, device.device, seed) for seed in range(copies)]
    first = sets[0]
    exact = first.exact()
    error = relative_error(first.target.run(first.target.prepare()), exact)
    peers = {}
    for name in first.rivals:
        contenders = [one.rivals.get(name) or first.rivals[name] for one in sets]
        result = first.rivals[name].run(first.rivals[name].prepare())
        comparable = name in first.comparable
        peers[name] = {"ms": 0.0, "err": relative_error(result, exact) if comparable else None}
        if rivals:
            peers[name]["ms"] = time_calls(contenders, device)["ms_median"]
    errors = [peer["err"] for peer in peers.values() if peer["err"] is not None and math.isfinite(peer["err"])]
    allowed = max(1e-5, TOLERANCE * max(errors, default=0.0))
    if not error <= allowed:
        raise RuntimeError(f"wrong result: error {error:.3g}, allowed {allowed:.3g}")
    del exact
    contenders = [one.target for one in sets]
    times = time_calls(contenders, device)
    seconds = times["ms_median"] * 1e-3
    copy, mm = ceilings
    return {
        "op": case.op, "dir": case.what, "dtype": case.dtype, "shape": list(case.shape), **times,
        "host_us": 1e6 * host_seconds(*rotating(contenders), device) if case.bytes < HOST_TIMED else None,
        "bytes": case.bytes, "flops": case.flops,
        "gbps": case.bytes / seconds / 1e9, "tflops": case.flops / seconds / 1e12,
        "frac_of_copy": case.bytes / seconds / copy if case.bytes else None,
        "frac_of_mm": case.flops / seconds / mm if case.flops else None,
        "est_ms": estimates.get(case.name), "peers": peers if rivals else {}, "err": error, "backend": first.backend,
        "commit": os.environ.get("PYOPS_SHEET_COMMIT", ""),
    }  # fmt: skip


def rotating(contenders: list) -> tuple[Run, Prepare]:
    """Calls that take the input sets in turn."""
    of = lambda i: contenders[i % len(contenders)]  # noqa: E731
    return lambda i, argument: of(i).run(argument), lambda i: of(i).prepare()


def time_calls(contenders: list, device) -> dict[str, float]:
    run, prepare = rotating(contenders)
    return quantiles(device.times(run, REPEATS, prepare))


METRICS = {
    "dram__bytes.sum": "DRAM bytes",
    "lts__t_sectors_op_read.sum": "L2 sectors read",
    "lts__t_sectors_op_write.sum": "L2 sectors written",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
}
PROFILED = "^(moments|exponentials|class_weight|finish|total|gradient)_kernel"


def phase_counters(findings: Findings, dry: bool, seconds: float) -> None:
    """A few kernels by the profiler, to compare with what the emulator counted in the ledger."""
    if dry:
        from pyops import _emulation

        run_each_once(dry)
        first = {}
        for launch in _emulation.launches():
            first.setdefault(launch.kernel, launch.counters)
        for kernel, counters in first.items():
            findings.add(counters={"kernel": kernel, **{name: number for name, number in counters.items() if number}})
        return
    ncu = find_program("ncu")
    if not ncu:
        findings.add(not_run="counters: no ncu here")
        return
    command = [ncu, "--csv", "--print-units", "base", "--clock-control", "none", "--metrics", ",".join(METRICS)]
    command += ["-k", f"regex:{PROFILED}", *each_once("profiled")]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=seconds - 3).stdout
    except subprocess.TimeoutExpired as late:
        text = (late.stdout or b"").decode(errors="replace")
        findings.add(not_run="counters: ncu ran out of time")
    kernels = read_ncu(text)
    if not kernels:
        findings.add(not_run=f"counters: ncu gave no table: {text[-200:]}")
    for entry in kernels:
        findings.add(counters=entry)


def read_ncu(text: str) -> list[dict]:
    """A dictionary per launch from the table that ncu prints, one line per launch and metric."""
    start = text.find('"ID"')
    kernels: dict[str, dict] = {}
    for line in csv.DictReader(io.StringIO(text[start:])) if start >= 0 else ():
        if not line.get("Kernel Name") or not line.get("Metric Value"):
            continue  # cut off
        entry = kernels.setdefault(line["ID"], {"kernel": line["Kernel Name"][:80]})
        value = line["Metric Value"].replace(",", "")
        with suppress(ValueError):
            entry[METRICS.get(line["Metric Name"], line["Metric Name"])] = float(value)
    return list(kernels.values())


def run_phase(arguments: argparse.Namespace) -> int:
    os.environ["PYOPS_SHEET_COMMIT"] = arguments.commit
    if arguments.phase in ("each-once", "profiled"):
        run_each_once(arguments.dry_run, arguments.phase == "profiled")
        return 0
    findings = Findings(arguments.findings)
    globals()[f"phase_{arguments.phase}"](findings, arguments.dry_run, arguments.seconds)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything (default %(default)s)")
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated; default: %(default)s")
    parser.add_argument("--commit", default="", help="where there is no git: the commit that this tree is of")
    parser.add_argument("--dry-run", action="store_true", help="every phase on the CPU, with the emulator as device")
    for hidden in ("--phase", "--findings", "--seconds"):
        kind = {"--findings": Path, "--seconds": float}.get(hidden, str)
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        return run_phase(arguments)
    if not arguments.out:
        parser.error("--out is needed")
    arguments.phases = [phase for phase in arguments.phases.split(",") if phase]
    unknown = [phase for phase in arguments.phases if phase not in PHASES]
    if unknown:
        parser.error(f"unknown phase {unknown[0]!r}, must be one of {', '.join(PHASES)}")
    return drive(arguments)


if __name__ == "__main__":
    sys.exit(main())
