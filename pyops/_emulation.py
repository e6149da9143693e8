"""Backend "cuda" without a GPU: the CUDA kernels of a source tree, run by the emulator on CPU tensors.

Only with PYOPS_CUDA_EMU=1 or =check; see docs/emulator.md. With "check", kernels may touch what an op was given and
what it allocates, and nothing else; a finding of the checker is a RuntimeError of the op that caused it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

COUNTERS = (
    "global_requests", "sectors", "shared_requests", "wavefronts", "barriers", "warp_barriers", "atomics", "mma",
    "copy_bytes",
)  # fmt: skip
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


@dataclass(frozen=True)
class Launch:
    """What the check build counted in one launch: ``counters`` are of the ``blocks`` that ran, of those of the grid."""

    kernel: str
    function: int  # offset of the kernel's instance in the library
    grid: tuple[int, int, int]
    threads: int  # of a block
    shared: int  # bytes of a block
    blocks: int
    counters: dict[str, int]


def sample(blocks: int) -> None:
    """From now on only that many blocks of every grid run, evenly spaced (0: all of them); outputs mean nothing."""
    _checker.pyops_emulator_sample(ctypes.c_int64(blocks))


def launches(library: ctypes.CDLL | None = None) -> list[Launch]:
    """The launches since this was last called, of the check build that ops run in or of another one."""
    library = library or _checker
    size = library.pyops_emulator_launches(None, ctypes.c_size_t(0), ctypes.c_bool(False))
    text = ctypes.create_string_buffer(size)
    library.pyops_emulator_launches(text, ctypes.c_size_t(size), ctypes.c_bool(True))
    found = []
    for line in text.value.decode().splitlines():
        kernel, *fields = line.split("\t")
        function, x, y, z, threads, shared, blocks, *counters = map(int, fields)
        counted = dict(zip(COUNTERS, counters, strict=True))
        found.append(Launch(kernel, function, (x, y, z), threads, shared, blocks, counted))
    return found


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
