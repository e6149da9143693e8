"""One call on a machine with a GPU: builds, checks and measures every kernel there.

    python bench/gpu_sheet.py --out DIR [--budget 540] [--phases env,build,bench] [--commit HASH]
    python bench/gpu_sheet.py --out DIR --dry-run        every phase on the CPU, the emulator as device

Writes DIR/<gpu>.json, DIR/<gpu>.md and DIR/logs.tar.gz, and rewrites them after every phase, so that a killed run
leaves what it had. Every phase is a process of its own with a share of the budget as its time limit; what it finds it
appends to a file line by line, so that a phase that was killed counts up to there. Needs no network and nothing
installed: torch, triton, numpy, pytest, cmake, ninja, pybind11, nvcc and g++ must be there; ncu and compute-sanitizer
are used if they are. Settings of the GPU are read, never changed.

The cases are those of ``harness.device_cases()``: the ledger counts the same ones in emulation.
"""

from __future__ import annotations

import argparse
import csv
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
# Phase: its share of 540 seconds.
PHASES = {
    "env": 10, "build": 150, "ceilings": 30, "probes": 20, "tests": 120, "sanitizer": 65, "bench": 120, "counters": 20,
}  # fmt: skip
LISTS = ("rows", "sanitizer", "counters", "not_run")  # of what phases report; anything else is set
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
COPIES = 4  # of the L2 cache: inputs rotate over that many bytes
GRAPH_BELOW = 20e-6  # seconds: shorter calls are also timed as a CUDA graph, where the launch costs less
REPEATS = 20
TOLERANCE = 4  # the error of the op over that of the best comparable rival
ROW_KEYS = (
    "op", "dir", "dtype", "shape", "ms_median", "ms_p10", "ms_p90", "graph", "bytes", "flops", "gbps", "tflops",
    "frac_of_copy", "frac_of_mm", "est_ms", "peers", "err", "backend", "commit",
)  # fmt: skip
SHEET_KEYS = (
    "gpu", "date", "commit", "dirty", "versions", "state", "build", "ceilings", "probes", "tests", "sanitizer", "rows",
    "counters", "not_run", "phases",
)  # fmt: skip


# ---- the sheet ---------------------------------------------------------------------------------------------


def empty_sheet(commit: str) -> dict:
    sheet = {key: {} for key in SHEET_KEYS} | {key: [] for key in LISTS}
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
    lines += ["", "## Rows", "", "Error is the largest one over the largest value, against float64.", ""]
    header = ["op", "pass", "shape", "dtype", "ms (p10, p90)", "of copy", "of matrix product", "estimate ms"]
    header += ["best peer", "times faster", "error", "peer's"]
    lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in sheet["rows"]:
        peers = {name: peer for name, peer in row["peers"].items() if not name.startswith("pyops")}
        best = min(peers, key=lambda name: peers[name]["ms"], default="")
        errors = [peer["err"] for peer in peers.values() if peer["err"] is not None]
        speed = f"{peers[best]['ms'] / row['ms_median']:.2f}" if best else ""
        graph = " (graph)" if row["graph"] else ""
        shape = "x".join(map(str, row["shape"]))
        times = f"{row['ms_median']:.4g} ({row['ms_p10']:.4g}, {row['ms_p90']:.4g}){graph}"
        rates = [_number(row[key]) for key in ("frac_of_copy", "frac_of_mm", "est_ms")]
        compared = [best, speed, _number(row["err"]), _number(min(errors, default=None))]
        cells = [row["op"], row["dir"], shape, row["dtype"], times, *rates, *compared]
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
            if key in LISTS:
                sheet[key].append(value)
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
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(SITE) if SITE.exists() and not dry else ""}
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
        for phase in arguments.phases:
            share = PHASES[phase] / BUDGET * arguments.budget
            seconds = min(share, arguments.budget - (time.monotonic() - start))
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
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin:{home}/compute-sanitizer")


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
        """Seconds of each call ``run(i, prepare(i))``, by events; preparations lie between them."""
        torch = self.torch
        for i in range(3):
            run(i, prepare(i))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize()
        for i, (begin, end) in enumerate(events):
            argument = prepare(i)
            begin.record()
            run(i, argument)
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e-3 for begin, end in events]

    def graph_times(self, run: Run, repeats: int) -> list[float]:
        """Seconds of a call as one of ten in a CUDA graph."""
        torch = self.torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # capture wants a warm-up off the default stream
            for i in range(3):
                run(i, None)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(10):
                run(i, None)
        return [seconds / 10 for seconds in self.times(lambda *_: graph.replay(), repeats)]


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

    graph_times = times


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

    nvcc = find_program("nvcc")
    release = re.search(r"V(\d+\.\d+\.\d+)", output_of(nvcc, "--version") if nvcc else "")
    query = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    state = {} if dry else output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").split(", ")
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "missing"
    findings.add(
        gpu="emulated" if dry else torch.cuda.get_device_name(0),
        versions={
            "python": sys.version.split()[0], "torch": torch.__version__, "triton": triton_version,
            "numpy": numpy.__version__, "nvcc": release[1] if release else "missing",
            "driver": state[1] if len(state) > 1 else "none",
        },
        state=dict(zip(query.split(","), state, strict=True)) if len(state) == 6 else {},
    )  # fmt: skip
    git = ("git", "-C", str(ROOT))
    head = output_of(*git, "rev-parse", "--short=12", "HEAD")
    if head:
        findings.add(commit=head, dirty=bool(output_of(*git, "status", "--porcelain", "--untracked-files=no")))


def cmake_options(architecture: str) -> list[str]:
    import importlib.util

    torch = Path(importlib.util.find_spec("torch").origin).parent
    pybind11 = output_of(sys.executable, "-m", "pybind11", "--cmakedir")
    return [
        f"-DPYOPS_TORCH_DIR={torch}", f"-DPYOPS_OUTPUT_DIR={BUILD / 'lib'}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DPYOPS_NATIVE_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}", f"-Dpybind11_DIR={pybind11}",
        "-DPYOPS_CUDA=ON", "-DPYOPS_EMULATION=ON", f"-DPYOPS_CUDA_ARCHS={architecture}",
        f"-DCMAKE_CUDA_COMPILER={find_program('nvcc') or 'nvcc'}",
    ]  # fmt: skip


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
    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *cmake_options(architecture)]
    build = [cmake, "--build", str(BUILD), "-j", str(os.cpu_count())]
    result = "built"
    libraries = BUILD / "lib"
    if subprocess.run(configure).returncode or subprocess.run(build, timeout=seconds - 20).returncode:
        subprocess.run([*build, "--target", "_native"], check=True)
        result = "prebuilt"
    found = {path.name: path for path in (ROOT / "pyops").glob("_*.so")} if result == "prebuilt" else {}
    found |= {path.name: path for path in libraries.glob("*.so")}
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
    torch, scale, ceilings = device.torch, device.scale, {}

    def best(run: Run) -> float:
        return min(device.times(run, 10))

    ceilings["copy_bytes_per_s"], ceilings["read_bytes_per_s"] = copy_and_read(device, (1 << 28) // scale, best)
    ceilings["cached_copy_bytes_per_s"], _ = copy_and_read(device, max(1024, device.cache // 32), best)
    size = 8192 if scale == 1 else 64
    for dtype, n in ((torch.bfloat16, size), (torch.float32, size // 2)):
        name = str(dtype).removeprefix("torch.")
        ceilings[f"mm_{name}_flop_per_s"] = product_rate(device, n, dtype, best)
    a, b = (torch.randint(-128, 128, (size, size), device=device.device, dtype=torch.int8) for _ in range(2))
    ceilings["mm_int8_op_per_s"] = 2 * size**3 / best(lambda *_: torch._int_mm(a, b.t()))
    one = torch.zeros(1, device=device.device)
    ceilings["launch_s"] = statistics.median(device.times(lambda *_: one.add_(1), 50))
    ceilings["graph_launch_s"] = statistics.median(device.graph_times(lambda *_: one.add_(1), 50))
    findings.add(ceilings=ceilings)


def copy_and_read(device, floats: int, best: Callable) -> tuple[float, float]:
    """Bytes per second, read and written or read."""
    source = device.torch.randn(floats, device=device.device)
    target = device.torch.empty_like(source)
    copy = 2 * source.nbytes / best(lambda *_: target.copy_(source))
    return copy, source.nbytes / best(lambda *_: source.view(-1, 1024).amax(1))


def product_rate(device, n: int, dtype, best: Callable) -> float:
    a, b = (device.torch.randn(n, n, device=device.device).to(dtype) for _ in range(2))
    return 2 * n**3 / best(lambda *_: a @ b)


def run_pytest(arguments: list[str], dry: bool, environment: dict[str, str] | None = None) -> dict:
    """Counts of a pytest run, read from its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-P",
            "-m",
            "pytest",
            "-q",
            "--maxfail=20",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
        ]
        subprocess.run([*command, *arguments], cwd=ROOT, env=os.environ | (environment or {}))
        if not report.exists():
            return {"passed": 0, "failed": 0, "skipped": 0, "error": "no report"}
        suite = ElementTree.parse(report).getroot().find("testsuite")
    total, failed, errors, skipped = (int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped"))
    failures = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    return {
        "passed": total - failed - errors - skipped, "failed": failed + errors, "skipped": skipped,
        "failures": failures[:20],
    }  # fmt: skip


def workers() -> list[str]:
    import importlib.util

    return ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []


def phase_probes(findings: Findings, dry: bool, seconds: float) -> None:
    """Every intrinsic, its PTX on the hardware against numpy: what the emulator's version passes too."""
    chosen = "fast" if dry else "gpu"
    findings.add(probes=run_pytest(["tests/emulator/test_intrinsics.py", "-k", chosen], dry))


def phase_tests(findings: Findings, dry: bool, seconds: float) -> None:
    """The contract on the GPU by the CUDA kernels, then, as Triton's mode is one of a process, by Triton's."""
    if dry:
        chosen = ["tests/spherical/test_cross_entropy.py", "-k", "cuda-emulated"]
        findings.add(tests={"cuda": run_pytest(chosen, dry)})
        return
    cuda = run_pytest(["tests", "-m", "gpu and not slow", "--ignore=tests/emulator", *workers()], dry)
    findings.add(tests={"cuda": cuda})
    chosen = ["tests/contract.py", "tests/spherical", "-m", "gpu and not slow", "-k", "triton", *workers()]
    findings.add(tests={"cuda": cuda, "triton": run_pytest(chosen, dry, {"TRITON_INTERPRET": "0"})})


def run_each_once(dry: bool) -> None:
    """Every op and pass once on a small shape; what the sanitizer and the profiler watch."""
    from pyops._bench import harness

    import pyops

    device = Emulated() if dry else Gpu()
    for backend in ("cuda",) if dry else ("cuda", "triton"):
        with pyops.use_backend(backend):
            for case in harness.device_cases(tiny=True):
                timed = case.build(case, device.device, 0).target
                timed.run(timed.prepare())
    if not dry:
        device.torch.cuda.synchronize()


def phase_sanitizer(findings: Findings, dry: bool, seconds: float) -> None:
    script = [sys.executable, __file__, "--phase", "each-once", "--findings", os.devnull, "--seconds", "60"]
    if dry:
        done = subprocess.run([*script, "--dry-run"], capture_output=True, text=True)
        clean = "0 errors" if done.returncode == 0 else done.stderr[-300:]
        findings.add(sanitizer={"tool": "emulator's checker", "result": clean})
        return
    program = find_program("compute-sanitizer")
    if not program:
        findings.add(not_run="sanitizer: no compute-sanitizer here")
        return
    running = {
        tool: subprocess.Popen(
            [program, "--tool", tool, "--error-exitcode", "9", *script], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for tool in SANITIZERS
    }  # fmt: skip
    end = time.monotonic() + seconds - 5
    for tool, process in running.items():
        try:
            text = process.communicate(timeout=max(1, end - time.monotonic()))[0]
        except subprocess.TimeoutExpired:
            process.kill()
            findings.add(not_run=f"sanitizer {tool}: out of time")
            continue
        print(text[-4000:], flush=True)
        summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: ([^\n]*)", text)
        findings.add(sanitizer={"tool": tool, "result": summary[1] if summary else f"exit code {process.returncode}"})


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
    from pyops._bench import harness

    end = time.monotonic() + seconds - 5
    device = Emulated() if dry else Gpu()
    ceilings = measured_ceilings(device)
    estimates = ledger_estimates(device)
    for case in harness.device_cases(tiny=dry):
        if time.monotonic() > end:
            findings.add(not_run=f"bench {case.name}: no time left")
            continue
        with noted(findings, f"bench {case.name}"):
            findings.add(rows=measure(case, device, ceilings, estimates))
        if not dry:
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


def measure(case, device, ceilings: tuple[float, float], estimates: dict[str, float]) -> dict:
    """A row: the op and its rivals on the same rotating inputs, after their results were found right."""
    import pyops

    copies = max(1, min(16, math.ceil(COPIES * device.cache / max(1, case.bytes))))
    sets = [case.build(case, device.device, seed) for seed in range(copies)]
    first = sets[0]
    exact = first.exact()
    error = relative_error(first.target.run(first.target.prepare()), exact)
    peers = {}
    for name in first.rivals:
        contenders = [one.rivals.get(name) or first.rivals[name] for one in sets]
        result = first.rivals[name].run(first.rivals[name].prepare())
        peers[name] = {
            "ms": time_calls(contenders, device)[0]["ms_median"],
            "err": relative_error(result, exact) if name in first.comparable else None,
        }
    if device.device.type == "cuda":
        with pyops.use_backend("triton"):
            ours = first.target.run(first.target.prepare())
            times, _ = time_calls([one.target for one in sets], device)
        peers["pyops, Triton"] = {"ms": times["ms_median"], "err": relative_error(ours, exact)}
    allowed = TOLERANCE * max([peers[name]["err"] for name in first.comparable if name in peers] or [0.0])
    if not error <= max(allowed, 1e-5):
        raise RuntimeError(f"wrong result: error {error:.3g}, allowed {allowed:.3g}")
    times, graph = time_calls([one.target for one in sets], device)
    seconds = times["ms_median"] * 1e-3
    copy, mm = ceilings
    return {
        "op": case.op, "dir": case.what, "dtype": case.dtype, "shape": list(case.shape), **times, "graph": graph,
        "bytes": case.bytes, "flops": case.flops,
        "gbps": case.bytes / seconds / 1e9, "tflops": case.flops / seconds / 1e12,
        "frac_of_copy": case.bytes / seconds / copy if case.bytes else None,
        "frac_of_mm": case.flops / seconds / mm if case.flops else None,
        "est_ms": estimates.get(case.name), "peers": peers, "err": error, "backend": first.backend,
        "commit": os.environ.get("PYOPS_SHEET_COMMIT", ""),
    }  # fmt: skip


def time_calls(contenders: list, device) -> tuple[dict[str, float], bool]:
    """Quantiles over calls that rotate among input sets, and whether they are those of a CUDA graph."""

    def prepare(i: int) -> object:
        return contenders[i % len(contenders)].prepare()

    def run(i: int, argument: object) -> object:
        return contenders[i % len(contenders)].run(argument)

    taken = device.times(run, REPEATS, prepare)
    if statistics.median(taken) >= GRAPH_BELOW or prepare(0) is not None:
        return quantiles(taken), False
    try:
        taken = device.graph_times(run, REPEATS)
    except Exception as error:  # not everything can be captured
        print(f"no graph: {error!r}", flush=True)
        return quantiles(taken), False
    return quantiles(taken), True


METRICS = {
    "dram__bytes.sum": "DRAM bytes",
    "lts__t_sectors_op_read.sum": "L2 sectors read",
    "lts__t_sectors_op_write.sum": "L2 sectors written",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
    "sm__inst_executed_pipe_tensor.sum": "tensor instructions",
}


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
    script = [sys.executable, __file__, "--phase", "each-once", "--findings", os.devnull, "--seconds", "60"]
    command = [
        ncu,
        "--csv",
        "--clock-control",
        "none",
        "--metrics",
        ",".join(METRICS),
        "-c",
        "12",
        "-k",
        "regex:kernel",
    ]
    done = subprocess.run([*command, *script], capture_output=True, text=True, timeout=seconds - 3)
    start = done.stdout.find('"ID"')
    if start < 0:
        findings.add(not_run=f"counters: ncu gave no table: {(done.stdout + done.stderr)[-200:]}")
        return
    kernels: dict[str, dict] = {}
    for line in csv.DictReader(io.StringIO(done.stdout[start:])):
        entry = kernels.setdefault(line["ID"], {"kernel": line["Kernel Name"][:80]})
        entry[METRICS.get(line["Metric Name"], line["Metric Name"])] = line["Metric Value"]
    for entry in kernels.values():
        findings.add(counters=entry)


def run_phase(arguments: argparse.Namespace) -> int:
    os.environ["PYOPS_SHEET_COMMIT"] = arguments.commit
    if arguments.phase == "each-once":
        run_each_once(arguments.dry_run)
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
