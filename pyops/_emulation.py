"""Backend "cuda" without a GPU: the CUDA kernels of a source tree, run by the emulator on CPU tensors.

Only with PYOPS_CUDA_EMU=1 or =check; see docs/emulator.md. With "check", kernels may touch what an op was given and
what it allocates, and nothing else; a finding of the checker is a RuntimeError of the op that caused it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

_LIBRARIES = {"1": "_emulated.so", "check": "_emulated_check.so"}
_checker: ctypes.CDLL | None = None


def library(choice: str, folder: Path) -> Path | None:
    """The file that PYOPS_CUDA_EMU asks for; ImportError when it was not built."""
    if choice not in _LIBRARIES:
        return None
    path = folder / _LIBRARIES[choice]
    if not path.exists():
        raise ImportError(f"pyops: PYOPS_CUDA_EMU={choice} needs {path.name}, which `make setup` builds in a tree")
    return path


def attach(path: Path) -> None:
    """After the library is loaded: its checker, if it has one."""
    global _checker
    if path.name == _LIBRARIES["check"]:
        _checker = ctypes.CDLL(str(path))


def configure(seed: int = 0, preemption: float = 0.0, threads: int = 0) -> None:
    """How the fibers of later calls are scheduled: seed 0 in thread order, any other at random."""
    loaded = _checker or ctypes.CDLL(str(Path(__file__).parent / _LIBRARIES["1"]))
    loaded.pyops_emulator_configure(ctypes.c_uint(seed), ctypes.c_double(preemption), ctypes.c_int(threads))


def run(name: str, args: tuple):
    """The op ``name`` of pyops on the emulated device."""
    op = getattr(torch.ops.pyops_emulated, name).default
    if _checker is not None:
        _checker.pyops_emulator_forget_buffers()
        for argument, value in zip(op._schema.arguments, args, strict=True):
            if isinstance(value, torch.Tensor):
                written = argument.alias_info is not None and argument.alias_info.is_write
                _register(argument.name, value, written)
    return op(*args)


def _register(name: str, tensor: torch.Tensor, written: bool) -> None:
    if tensor.numel() == 0:
        return
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    _checker.pyops_emulator_register(
        ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t((last + 1) * tensor.element_size()),
        ctypes.c_size_t(tensor.element_size()), ctypes.c_bool(written), name.encode(),
    )  # fmt: skip
