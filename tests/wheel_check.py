"""Builds the wheel, installs it into a clean environment that has only torch and numpy, and runs it from outside
the source tree: `selftest`, every subpackage's import, and what must (not) be inside. Run: make wheel-test."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = (
    "pyops/_ops.so",
    "pyops/py.typed",
    "pyops/triton_kernels/spherical/spherical_loss.py",
    "pyops/_bench/harness.py",
)


def run(*command: object, **options) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def check_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in EXPECTED if name not in names]
    packages = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "pyops").rglob("*.py")}
    missing += [package for package in packages if not any(name.startswith(package + "/") for name in names)]
    if missing:
        raise SystemExit(f"the wheel lacks {missing}")
    stray = [name for name in names if not name.startswith(("pyops/", "pyops_kernels-"))]
    if stray:
        raise SystemExit(f"the wheel would install outside its package: {stray[:5]}")


def make_environment(folder: Path) -> Path:
    """A clean virtual environment that sees this environment's torch and numpy and nothing else of ours."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    site = Path(
        subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    import torch

    # The downloads of torch's dependencies are minutes: link the folders of torch, numpy and what they import.
    source = Path(torch.__file__).parents[1]
    wanted = ("torch", "torchgen", "numpy", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec",
              "typing_extensions", "functorch")  # fmt: skip
    for entry in source.iterdir():
        stem = entry.name.split("-")[0].split(".")[0].lower()
        if stem in wanted and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    return python


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-build-isolation",
            "--no-deps",
            "-w",
            folder,
            ROOT,
            cwd=folder,
        )
        (wheel,) = folder.glob("*.whl")
        check_contents(wheel)
        python = make_environment(folder / "venv")
        run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYOPS_", "PYTHON"))}
        run(python, "-m", "pyops", "selftest", "--quick", cwd=folder, env=environment)
        run(python, "-m", "pyops", "info", cwd=folder, env=environment)
        inside = (
            "import pyops, sys; assert '/venv/' in pyops.__file__, pyops.__file__; assert 'triton' not in sys.modules"
        )
        run(python, "-c", inside, cwd=folder, env=environment)
        print(f"wheel check passed: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
