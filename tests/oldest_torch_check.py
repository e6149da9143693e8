"""Loads the binaries of this tree in the oldest supported torch and runs the self-test there. By hand, because that
torch comes as a CUDA build of several GB: make test-oldest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = "2.11.0"


def main() -> None:
    folder = ROOT / f".venv-torch-{OLDEST}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        # Triton 3.6, which comes with it, cannot interpret loops under newer numpy.
        subprocess.run([str(python), "-m", "pip", "install", "-q", f"torch=={OLDEST}", "numpy<2.3"], check=True)
    # The package as it is installed, with the .so files built against the current torch: nothing is compiled here.
    stage = folder / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(ROOT / "pyops", stage / "pyops", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "triton_kernels", stage / "pyops" / "triton_kernels")
    shutil.copytree(ROOT / "bench", stage / "pyops" / "_bench")
    program = (
        "import torch, pyops, sys, importlib.util\n"
        "print('torch', torch.__version__, 'pyops', pyops.__file__)\n"
        f"assert torch.__version__.startswith({OLDEST!r})\n"
        "from pyops.cli.main import main\n"
        "sys.exit(main(['selftest', '--quick']))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(stage)}
    result = subprocess.run([str(python), "-c", program], env=environment, cwd=stage)
    raise SystemExit(result.returncode)


if __name__ == "__main__":
    main()
