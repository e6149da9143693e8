"""Words that the argument checks of all families share; the C++ fronts use the same (csrc/common/tensor.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyops._autograd import reject


class FormatError(ValueError):
    """Malformed packed weights, patterns or files."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_name(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def strided(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        reject(op, argument, "be a strided tensor", "another layout")


def device(op: str, argument: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    if tensor.device != like.device:
        reject(op, argument, f"be on the device of {like_name}", f"{tensor.device} and {like.device}")
