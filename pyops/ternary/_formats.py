"""Packed formats by name: their numbers in the ops and their shapes (csrc/ternary/ternary_format.h draws them)."""

from __future__ import annotations

import torch

from pyops._autograd import reject

#: Position = number in the ops. ``int8`` holds the weights -1, 0, 1 themselves.
FORMATS = ("int8", "t2", "t5", "t2x16", "t5x16", "t2mma")
#: What a state_dict may hold; the others are made for a processor and never saved.
CANONICAL = ("t2", "t5")
GROUP = 256  # in_features that share one gamma, where it has two dimensions
MAX_IN_FEATURES = 1 << 24
_RULE = "be 0 (int8), 1 (t2), 2 (t5), 3 (t2x16), 4 (t5x16) or 5 (t2mma)"
_BLOCK_COLUMNS = {"t2x16": 16, "t5x16": 20, "t2mma": 128}


def code(op: str, argument: str, name: object, allowed: tuple[str, ...] = FORMATS) -> int:
    """The number of a format; ValueError names the ones there are."""
    if not isinstance(name, str):
        reject(op, argument, f"be one of {', '.join(allowed)}", type(name).__name__, TypeError)
    if name not in allowed:
        reject(op, argument, f"be one of {', '.join(allowed)}", repr(name), ValueError)
    return FORMATS.index(name)


def check_code(op: str, argument: str, number: int) -> str:
    """The name of a format; the op's own check of its number."""
    if not 0 <= number < len(FORMATS):
        reject(op, argument, _RULE, number)
    return FORMATS[number]


def _ceil(a, b):
    return (a + b - 1) // b


def packed_shape(name: str, out_features: int, in_features: int) -> tuple[int, ...]:
    """Shape of the tensor that holds a matrix of that many rows and columns."""
    if name == "int8":
        return (out_features, in_features)
    if name in ("t2", "t5"):
        return (out_features, _ceil(in_features, int(name[1]) if name == "t5" else 4))
    tail = (32, 16) if name == "t2mma" else (16, 4)
    return (_ceil(out_features, 16), _ceil(in_features, _BLOCK_COLUMNS[name]), *tail)


def packed_dtype(name: str) -> torch.dtype:
    return torch.int8 if name == "int8" else torch.uint8
