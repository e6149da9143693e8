"""The ledger: what can be said of the speed of every CUDA and Triton kernel without a GPU, in ``bench/ledger.json``.

``python tests/cuda_ledger.py`` compiles every ``csrc/*/cuda/*.cu`` for each target and compares registers, stack,
shared memory and SASS instruction counts per kernel with the ledger ("kernels"), then counts in emulation what the
kernels of every device case move ("traffic", ledger_traffic.py); ``--update`` writes both. The part about Triton
("triton") is taken by triton_offline.py.

A kernel fails when it spills or touches local memory (LDL, STL), whatever the ledger says, and, if the ledger was
written by the same compiler, when a number has grown by more than 2 %, when it has fewer wide loads or asynchronous
copies than before, or when kernels have appeared or vanished. A case fails when it moves a tenth more than it must, or
2 % more of anything than in the ledger.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ledger_traffic

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "bench" / "ledger.json"
CACHE = ROOT / "build" / "cuda_ledger"
TARGETS = ("sm_80", "sm_90a", "sm_100")
JOBS = 2
GROWTH = 1.02
# The flags of CMakeLists.txt that decide what the compiler makes of a kernel.
FLAGS = ("-std=c++20", "-O3", "-cubin", "-Xptxas", "-v")

# Counter: opcodes that it adds up. LDG and STG are split by width; anything else is not counted.
COUNTERS = {
    "LDG.128": ("LDG",), "LDG": ("LDG",), "STG.128": ("STG",), "STG": ("STG",), "LDS": ("LDS",), "STS": ("STS",),
    "LDL": ("LDL",), "STL": ("STL",), "BAR": ("BAR",), "SHFL": ("SHFL",), "MUFU": ("MUFU",),
    "ATOM": ("ATOM", "ATOMG", "ATOMS", "RED", "REDG"), "LDSM": ("LDSM",), "LDGSTS": ("LDGSTS",), "IDP": ("IDP",),
    "HMMA": ("HMMA",), "IMMA": ("IMMA",), "HGMMA": ("HGMMA",),
}  # fmt: skip
MATRIX = ("HMMA", "IMMA", "HGMMA")
WANTED = ("LDG.128", "LDGSTS")  # fewer are worse
LOCAL_MEMORY = ("spill_stores", "spill_loads", "LDL", "STL")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def find_cuobjdump() -> str | None:
    """From the toolkit or from the triton wheel, which ships it."""
    triton = Path(sysconfig.get_paths()["purelib"]) / "triton" / "backends" / "nvidia" / "bin"
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(triton))


def why_not() -> str | None:
    """Why the ledger cannot be taken on this machine, or None."""
    if find_nvcc() is None:
        return "no nvcc: neither on PATH nor under CUDA_HOME"
    if find_cuobjdump() is None:
        return "no cuobjdump: neither on PATH nor in the triton wheel"
    return None


def compiler_version() -> str:
    text = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", text).group(1)


def sources() -> list[Path]:
    return sorted(ROOT.glob("csrc/*/cuda/*.cu"))


def demangle(symbol: str) -> str:
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    address = library.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    return ctypes.string_at(address).decode() if status.value == 0 else symbol


def kernel_name(symbol: str) -> str:
    """``moments_kernel<bfloat16, false>``: without return type, namespaces and parameters."""
    name = demangle(symbol).replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\(([\w: ]+)\)(\d+)", r"\1 \2", name)  # (Enum)1 in a template argument
    return re.sub(r"\w+::", "", name.partition("(")[0])


def parse_ptxas(log: str) -> dict[str, dict[str, int]]:
    kernels: dict[str, dict[str, int]] = {}
    numbers: dict[str, int] = {}
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            numbers = kernels[kernel_name(found[1])] = {}
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            numbers["stack"], numbers["spill_stores"], numbers["spill_loads"] = map(int, found.groups())
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            numbers["registers"], numbers["shared"] = int(found[1]), int(shared[1]) if shared else 0
    return kernels


def matrix_loop(sass: str) -> dict[str, int]:
    """Of the innermost loop with matrix instructions: how many instructions, and how many of them are such; nothing
    where there is no such loop. A loop is what a branch back encloses."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass)
    code = [(int(address, 16), opcode.split(".")[0], operands) for address, opcode, operands in lines]
    loops = []
    for address, opcode, operands in code:
        target = re.search(r"\b0x([0-9a-f]+)\s*$", operands.strip()) if opcode == "BRA" else None
        if target and int(target[1], 16) < address:
            inside = [name for at, name, _ in code if int(target[1], 16) <= at <= address and name != "NOP"]
            if matrix := sum(name in MATRIX for name in inside):
                loops.append((len(inside), matrix))
    return dict(zip(("loop_instructions", "loop_matrix"), min(loops), strict=True)) if loops else {}


def count_instructions(sass: str) -> dict[str, int]:
    """Of the kinds above, and all of them; of the innermost matrix loop too."""
    counts = dict.fromkeys(COUNTERS, 0) | matrix_loop(sass)
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    counts["instructions"] = sum(opcode != "NOP" for opcode in opcodes)  # no padding
    for opcode in opcodes:
        root, *modifiers = opcode.split(".")
        for counter, opcodes in COUNTERS.items():
            wide = counter.endswith(".128")
            if root in opcodes and (root not in ("LDG", "STG") or wide == ("128" in modifiers)):
                counts[counter] += 1
    return counts


def compile_kernels(source: Path, target: str, folder: str) -> dict[str, dict[str, int]]:
    cubin = Path(folder) / f"{source.parent.parent.name}.{source.stem}.{target}.cubin"
    architecture = f"arch=compute_{target.removeprefix('sm_')},code={target}"
    command = [find_nvcc(), *FLAGS, "-gencode", architecture, "-o", str(cubin), str(source)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode:
        raise RuntimeError(f"{source.relative_to(ROOT)} does not compile for {target}:\n{compiled.stderr}")
    kernels = parse_ptxas(compiled.stderr)
    dump = subprocess.run([find_cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    for section in re.split(r"\n\s*Function : ", dump)[1:]:
        symbol, _, sass = section.partition("\n")
        counts = count_instructions(sass)
        kernels[kernel_name(symbol.strip())].update({k: n for k, n in counts.items() if n})
    return kernels


def fingerprint() -> str:
    """Of everything that the ledger depends on."""
    digest = hashlib.sha256(repr((compiler_version(), FLAGS, TARGETS)).encode() + Path(__file__).read_bytes())
    for path in sorted(path for suffix in ("cu", "cuh", "h") for path in ROOT.glob(f"csrc/**/*.{suffix}")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def take() -> dict:
    """The ledger of the working tree: {"compiler": ..., "kernels": {source: {kernel: {target: {number: ...}}}}}.
    Kept under build/ by fingerprint: compiling takes a minute."""
    cached = CACHE / f"{fingerprint()}.json"
    if cached.exists():
        return json.loads(cached.read_text())
    jobs = [(source, target) for source in sources() for target in TARGETS]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        results = list(pool.map(lambda job: compile_kernels(*job, folder), jobs))
    kernels: dict = {}
    for (source, target), found in zip(jobs, results, strict=True):
        file = kernels.setdefault(str(source.relative_to(ROOT)), {})
        for name, numbers in sorted(found.items()):
            file.setdefault(name, {})[target] = numbers
    ledger = {"compiler": compiler_version(), "kernels": kernels}
    CACHE.mkdir(parents=True, exist_ok=True)
    cached.write_text(json.dumps(ledger))
    return ledger


def rows(ledger: dict) -> dict[tuple[str, str, str], dict[str, int]]:
    return {
        (file, kernel, target): numbers
        for file, kernels in ledger["kernels"].items()
        for kernel, targets in kernels.items()
        for target, numbers in targets.items()
    }


def local_memory(ledger: dict) -> list[str]:
    """Kernels that spill or use local memory."""
    return [
        f"{' '.join(key)}: {counter} = {numbers[counter]}, must be 0"
        for key, numbers in rows(ledger).items()
        for counter in LOCAL_MEMORY
        if numbers.get(counter, 0)
    ]


def regressions(old: dict, new: dict) -> list[str]:
    """What got worse between two ledgers of one compiler."""
    if old["compiler"] != new["compiler"]:
        return []
    before, after = rows(old), rows(new)
    found = [f"{' '.join(key)}: not in the ledger" for key in after.keys() - before.keys()]
    found += [f"{' '.join(key)}: only in the ledger" for key in before.keys() - after.keys()]
    for key in before.keys() & after.keys():
        for counter in sorted(before[key].keys() | after[key].keys()):
            was, now = before[key].get(counter, 0), after[key].get(counter, 0)
            if (counter not in WANTED and now > was * GROWTH) or (counter in WANTED and now < was):
                found.append(f"{' '.join(key)}: {counter} {was} -> {now}")
    return sorted(found)


def load() -> dict:
    return json.loads(LEDGER.read_text())


def save(**sections) -> None:
    """Replaces sections of the file; one line per innermost entry, so that a diff shows what changed."""

    def lines(value, indent: str) -> str:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if not any(isinstance(one, dict) for one in inner):
            return json.dumps(value)
        keys = [f"{json.dumps(key)}: " for key in value] if isinstance(value, dict) else [""] * len(value)
        body = ",\n".join(f"{indent} {key}{lines(one, indent + ' ')}" for key, one in zip(keys, inner, strict=True))
        return f"{{\n{body}\n{indent}}}" if isinstance(value, dict) else f"[\n{body}\n{indent}]"

    LEDGER.write_text(lines(load() | sections, "") + "\n")


def table(ledger: dict) -> str:
    lines = [
        f"{'kernel':58s} {'target':7s} {'regs':>4s} {'stack':>5s} {'spill':>5s} {'smem':>5s} LDG.128 STG.128 "
        "instructions per matrix instruction"
    ]
    for (_, kernel, target), numbers in rows(ledger).items():
        spills = numbers["spill_stores"] + numbers["spill_loads"]
        lines.append(
            f"{kernel:58s} {target:7s} {numbers['registers']:4d} {numbers['stack']:5d} {spills:5d} "
            f"{numbers['shared']:5d} {numbers.get('LDG.128', 0):7d} {numbers.get('STG.128', 0):7d}"
            + (f" {numbers['loop_instructions'] / numbers['loop_matrix']:6.2f}" if "loop_matrix" in numbers else "")
        )
    return "\n".join(lines)


def compare(new: dict, traffic: dict) -> list[str]:
    """Everything that speaks against a ledger just taken."""
    old = load()
    problems = local_memory(new) + ledger_traffic.excesses(traffic)
    problems += ledger_traffic.regressions(old["traffic"], traffic, GROWTH)
    if old["compiler"] != new["compiler"]:
        print(f"kernels not compared: the ledger is of nvcc {old['compiler']}, this is {new['compiler']}")
    return problems + regressions(old, new)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write bench/ledger.json")
    arguments = parser.parse_args()
    if reason := why_not():
        print(f"ledger not taken: {reason}")
        return 1
    new = take()
    print(table(new))
    traffic = ledger_traffic.with_estimates(ledger_traffic.take(), new)
    print(ledger_traffic.table(traffic))
    if arguments.update:
        save(**new, traffic=traffic)
    problems = compare(new, traffic)
    print("\n".join(problems) or "ledger holds")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
