"""What can be said of the CUDA kernels without a GPU: they obey the source rules that let the emulator compile them,
and the compile ledger holds."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import cuda_ledger
import pytest

KERNEL_FILES = sorted(path for suffix in ("cu", "cuh") for path in cuda_ledger.ROOT.glob(f"csrc/*/cuda/*.{suffix}"))
# Rule: (pattern that must not occur, why).
FORBIDDEN = {
    "launch syntax": (r"<<<|>>>", "launches go through PYOPS_LAUNCH"),
    "raw shared memory": (r"__shared__", "shared memory comes from PYOPS_SHARED and PYOPS_DYN_SHARED"),
    "inline PTX": (r"\basm\b", "PTX stands in csrc/device/pyops_device.h only"),
    "emulator branch": (r"PYOPS_EMU", "a kernel that needs one misses an intrinsic"),
    "active mask": (r"__activemask", "masks are passed"),
    "float atomics": (r"\batomic\w+\s*\(", "results are bitwise reproducible; merges have a fixed order"),
    "synchronisation": (r"cuda\w*Synchronize|cudaMalloc|cudaFree", "a launch neither waits nor allocates"),
}


def code_of(path: Path) -> str:
    """The source without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def included(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)


def kernel_id(path: Path) -> str:
    return str(path.relative_to(cuda_ledger.ROOT))


def ledger_or_skip() -> dict:
    if reason := cuda_ledger.why_not():
        pytest.skip(reason)
    return cuda_ledger.take()


def test_there_are_kernel_files():
    assert {path.name for path in KERNEL_FILES} >= {"spherical_loss.cu", "cross_entropy.cu", "row_reduce.cuh"}


@pytest.mark.parametrize("rule", FORBIDDEN)
@pytest.mark.parametrize("path", KERNEL_FILES, ids=kernel_id)
def test_source_rule(path, rule):
    pattern, why = FORBIDDEN[rule]
    assert not re.search(pattern, code_of(path)), why


@pytest.mark.parametrize("path", KERNEL_FILES, ids=kernel_id)
def test_kernel_files_include_no_library(path):
    """Own headers that reach no torch header, and C headers that the host compiler has too."""
    pending, seen = [path], set()
    while pending:
        file = pending.pop()
        for name in included(file):
            found = (file.parent / name).resolve()
            if found.exists() and found not in seen:
                seen.add(found)
                pending.append(found)
            assert (
                found.exists()
                or name in ("math.h", "stdint.h", "string.h")
                or file.name in ("pyops_device.h", "cuda_emulator.h")
            ), name


@pytest.mark.parametrize("path", [path for path in KERNEL_FILES if path.suffix == ".cu"], ids=kernel_id)
def test_launchers_are_plain_c(path):
    launchers = re.findall(r'extern "C" (\w+) \w+\(([^)]*)\)', code_of(path))
    assert any(result == "int" for result, _ in launchers)
    assert all(parameters.endswith("void* stream") for result, parameters in launchers if result == "int")


def test_no_kernel_uses_local_memory():
    assert cuda_ledger.local_memory(ledger_or_skip()) == []


def test_ledger_holds():
    new = ledger_or_skip()
    old = cuda_ledger.load()
    if old["compiler"] != new["compiler"]:
        pytest.skip(f"the ledger is of nvcc {old['compiler']}, this is {new['compiler']}")
    assert cuda_ledger.regressions(old, new) == []


@pytest.mark.parametrize(
    ("counter", "change"),
    [("registers", 2), ("LDG.128", -1), ("MUFU", 5), ("instructions", 60)],
    ids=["more registers", "fewer wide loads", "more of a counter", "more instructions"],
)
def test_ledger_notices(counter, change):
    """On the committed ledger with one number changed; needs no compiler."""
    old = cuda_ledger.load()
    new = copy.deepcopy(old)
    kernels = new["kernels"]["csrc/spherical/cuda/spherical_loss.cu"]
    numbers = kernels["gradient_kernel<bfloat16, SphericalLoss 0>"]["sm_90a"]
    numbers[counter] = numbers.get(counter, 0) + change
    (message,) = cuda_ledger.regressions(old, new)
    assert counter in message
    numbers["STL"] = 1
    assert any("STL" in line for line in cuda_ledger.local_memory(new))
    del kernels["total_kernel"]
    assert any("only in the ledger" in line for line in cuda_ledger.regressions(old, new))
