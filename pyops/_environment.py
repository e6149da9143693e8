"""Every environment variable of the package: one table, read once at import, unknown values rejected."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

ISA_LEVELS = ("baseline", "avx2", "avxvnni", "avx512", "avx512vnni")
BACKENDS = ("cuda", "triton", "cpu", "reference")


class Variable(NamedTuple):
    """One variable: its default, what it may be, and what it does."""

    default: str
    allowed: str
    meaning: str
    valid: Callable[[str], bool]


def _backend_choice(text: str) -> bool:
    return all(part.strip().rpartition("=")[2] in BACKENDS for part in text.split(","))


VARIABLES = {
    "PYOPS_AUTOTUNE": Variable(
        "0",
        "0, 1",
        "1: Triton kernels that have several tiles time them at the first call of each size",
        lambda text: text in ("0", "1"),
    ),
    "PYOPS_BACKEND": Variable(
        "",
        "cuda, triton, cpu, reference, or family=backend,...",
        "backend to use, as use_backend()",
        _backend_choice,
    ),
    "PYOPS_CPU_ISA": Variable(
        "", ", ".join(ISA_LEVELS), "cap on the CPU kernel level", lambda text: text in ISA_LEVELS
    ),
    "PYOPS_CUDA_EMU": Variable(
        "0",
        "0, 1, check",
        "1: backend cuda serves CPU tensors through the CUDA kernels in emulation; check: with the race checker",
        lambda text: text in ("0", "1", "check"),
    ),
    "PYOPS_STRICT": Variable(
        "0", "0, 1", "1: a fallback to the torch reference is an error", lambda text: text in ("0", "1")
    ),
    "PYOPS_VERIFY": Variable(
        "1", "0, 1", "0: packed weights are loaded without comparing checksums", lambda text: text in ("0", "1")
    ),
}


def _read(name: str) -> str:
    variable = VARIABLES[name]
    text = os.environ.get(name) or variable.default
    if text != variable.default and not variable.valid(text):
        raise ValueError(f"{name} must be one of: {variable.allowed}; got {text!r}")
    return text


values = {name: _read(name) for name in VARIABLES}
