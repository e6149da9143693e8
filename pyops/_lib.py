"""Loads the native libraries: ``_ops.so`` (needed), ``_cuda.so`` (optional) and the ``_native`` module."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from pyops import _emulation, _environment
from pyops._environment import ISA_LEVELS

_FOLDER = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
_REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps pyops-kernels"

native = None
_cuda_missing = ""  # why _cuda.so is not loaded
emulated = False  # whether backend "cuda" is the emulation, for CPU tensors


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"pyops: {path.name} does not load in torch {torch.__version__}: {error}. "
            f"Reinstall it against this torch: {_REINSTALL}"
        ) from error


def load() -> None:
    """Loads what is there; ImportError says what was found and how to repair it."""
    global native, _cuda_missing, emulated
    if _torch_version() < OLDEST_TORCH:
        raise ImportError(
            f"pyops: built for torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}, found {torch.__version__}. "
            "Install a newer torch: pip install 'torch>=2.11'"
        )
    ops = _FOLDER / "_ops.so"
    if not ops.exists():
        raise ImportError(
            f"pyops: {ops.name} is not next to the package: this is a source tree that has not been built, or a "
            f"damaged install. Run `make setup` in the tree, or {_REINSTALL}"
        )
    _load(ops)
    native = importlib.import_module("pyops._native")
    native.attach(str(ops))
    emulation = _emulation.library(_environment.values["PYOPS_CUDA_EMU"], _FOLDER)
    if emulation:
        _load(emulation)
        _emulation.attach(emulation)
        emulated = True
    cuda = _FOLDER / "_cuda.so"
    if not cuda.exists():
        _cuda_missing = "this build has no CUDA library (_cuda.so); install on a machine with nvcc"
        return
    try:
        _load(cuda)
    except ImportError as error:
        _cuda_missing = str(error)


def cuda_loaded() -> bool:
    """Whether the C++ CUDA kernels are registered."""
    return not _cuda_missing


def cuda_unavailable() -> str:
    """Why CUDA C++ cannot serve, or an empty string. Asks the driver, so not at import: a process that has asked
    cannot fork workers that use CUDA."""
    if _cuda_missing:
        return _cuda_missing
    return "" if torch.cuda.is_available() else "no CUDA device is available to torch"


#: Levels that the CPU kernels are compiled for, lowest first (CMakeLists.txt): all, and products of ternary weights.
KERNEL_LEVELS = ("baseline", "avx2", "avx512")
PRODUCT_LEVELS = ("baseline", "avx2", "avxvnni", "avx512", "avx512vnni")


def kernel_level(levels: tuple[str, ...] = KERNEL_LEVELS) -> str:
    """The compiled level that runs now: the highest one at or below the processor's and the cap."""
    order = ISA_LEVELS.index(native.current_isa())
    return next(level for level in reversed(levels) if ISA_LEVELS.index(level) <= order)
