"""What the Triton kernels of all families share: whether they are interpreted, rounding to an output's type."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """float64 or float32 to the type of an output, to nearest; to the 16-bit types by way of float32. The
    interpreter truncates to bfloat16 (and gets subnormals wrong), so for it the rounding is done on the bits."""
    if dtype == tl.float64:
        return value.to(tl.float64)
    value = value.to(tl.float32)
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits += tl.where(value == value, 0x7FFF + ((bits >> 16) & 1), 0)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


def on_device_of(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
