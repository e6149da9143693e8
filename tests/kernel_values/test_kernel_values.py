"""The torch-free kernels on this processor and, cross-compiled and emulated, on aarch64."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(ROOT.glob("csrc/*/cpu/*_kernel.cpp"))
CROSS = ("aarch64-linux-gnu-g++", "qemu-aarch64")


def build_and_run(compiler: str, runner: list[str], folder: Path) -> str:
    program = folder / "kernel_values"
    command = [
        compiler,
        "-std=c++20",
        "-O3",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-static",
        "-DPYOPS_ISA=baseline",
    ]
    command += [str(path) for path in (*KERNELS, ROOT / "tests/kernel_values/driver.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True, capture_output=True, text=True)
    result = subprocess.run([*runner, str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.row("R47")
@pytest.mark.parametrize("target", ["native", "aarch64"])
def test_kernel_values(target, tmp_path):
    if target == "native":
        output = build_and_run("g++", [], tmp_path)
    else:
        missing = [tool for tool in CROSS if shutil.which(tool) is None]
        if missing and platform.machine() != "aarch64":
            pytest.skip(f"not installed: {', '.join(missing)} (Debian: g++-aarch64-linux-gnu qemu-user)")
        output = build_and_run(CROSS[0], [CROSS[1]], tmp_path)
    counted = re.search(r"(\d+) cases, 0 failures", output)
    assert counted, output[-2000:]
    assert int(counted[1]) > 100_000
