"""Runs the CPU tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer, after showing that a planted
overrun is caught. Run: make sanitize."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/spherical/test_spherical_loss.py", "tests/spherical/test_cross_entropy.py")
PLANTED = ("    add(sum, d);", "    add(sum, d);\n    if (i + lanes >= n) add(sum, load(x + n));")


def library(name: str) -> str:
    return subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()


def copy_tree(folder: Path) -> Path:
    """The source tree without build products: the sanitizer build must not replace the ordinary one."""
    tree = folder / "tree"
    skipped = shutil.ignore_patterns(".venv*", ".triton-*", "build", ".git", "*.so", "__pycache__", "dist")
    shutil.copytree(ROOT, tree, ignore=skipped)
    return tree


def build(tree: Path) -> None:
    environment = os.environ | {"PYOPS_SANITIZE": "address,undefined", "PYOPS_CUDA": "OFF"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"sanitizer build failed:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")


def run_python(tree: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": str(tree),
    }
    return subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)


CALL = """
import sys; sys.path.insert(0, "."); sys.modules.pop("pyops", None)
import pyops, torch
assert pyops._lib.native.build_info()["sanitize"], "not the sanitizer build"
for n in (1, 5, 4096, 5000):
    print(pyops.z_loss(torch.randn(3, n).clone(), torch.zeros(3, dtype=torch.long)))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        tree = copy_tree(Path(name))
        kernel = tree / "csrc/spherical/cpu/spherical_loss_kernel.cpp"
        source = kernel.read_text()
        if PLANTED[0] not in source:
            raise SystemExit("the place for the planted overrun is gone: update PLANTED")
        kernel.write_text(source.replace(*PLANTED))
        build(tree)
        planted = run_python(tree, "-c", CALL)
        if planted.returncode == 0 or "ERROR: AddressSanitizer" not in planted.stderr:
            raise SystemExit(f"the planted overrun was not caught:\n{planted.stdout}{planted.stderr[-3000:]}")
        print("planted overrun caught")
        kernel.write_text(source)
        build(tree)
        clean = run_python(tree, "-c", CALL)
        if clean.returncode:
            raise SystemExit(f"sanitizer report on clean code:\n{clean.stderr[-5000:]}")
        result = run_python(tree, "-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", *TESTS)
        print(result.stdout[-600:])
        if result.returncode:
            raise SystemExit(f"tests under sanitizers failed:\n{result.stdout[-4000:]}{result.stderr[-4000:]}")


if __name__ == "__main__":
    main()
