"""What the public loss functions of the family do to their Python arguments before an op sees them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pyops._autograd import reject
from pyops._dispatch import library
from pyops.spherical.reference import REDUCTIONS

_REDUCTION_CODES = {name: code for code, name in enumerate(REDUCTIONS)}


def reduction_code(op: str, reduction: object) -> int:
    code = _REDUCTION_CODES.get(reduction) if isinstance(reduction, str) else None
    if code is None:
        error = ValueError if isinstance(reduction, str) else TypeError
        reject(op, "reduction", "be one of 'none', 'mean', 'sum'", repr(reduction), error)
    return code


# What a number must be, in words and as a test.
POSITIVE = ("be positive", lambda value: value > 0)
NOT_NAN = ("be a number", lambda value: value == value)
AT_LEAST_0 = ("be at least 0", lambda value: value >= 0)
SHARE = ("be in [0, 1]", lambda value: 0 <= value <= 1)


def reject_options(op: str, ignore_index: object, **options: tuple[object, tuple[str, Callable]]) -> None:
    """Raises for the first option that is no real number (TypeError) or breaks its rule (ValueError)."""
    if not isinstance(ignore_index, int):
        reject(op, "ignore_index", "be an int", type(ignore_index).__name__, TypeError)
    for name, (value, (rule, holds)) in options.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            reject(op, name, "be a number", type(value).__name__, TypeError)
        if not holds(value):
            reject(op, name, rule, f"{value:g}", ValueError)


def check_tensors(op: str, logits, target, target_weight, weight) -> None:
    """TypeError for what is no tensor; the weights have no gradient and must not ask for one."""
    if not isinstance(logits, Tensor):
        reject(op, "logits", "be a Tensor", type(logits).__name__, TypeError)
    if not isinstance(target, Tensor):
        reject(op, "target", "be a Tensor", type(target).__name__, TypeError)
    _check_strided(op, "logits", logits)
    _check_strided(op, "target", target)
    if target_weight is not None:
        _check_weight(op, "target_weight", target_weight)
    if weight is not None:
        _check_weight(op, "weight", weight)


def _check_strided(op: str, name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:  # the dispatcher would answer for the op, at length
        reject(op, name, "be a strided tensor", "another layout")


def _check_weight(op: str, name: str, weight) -> None:
    if not isinstance(weight, Tensor):
        reject(op, name, "be a Tensor or None", type(weight).__name__, TypeError)
    _check_strided(op, name, weight)
    if weight.requires_grad and torch.is_grad_enabled():
        reject(op, name, "not require grad (it has no derivative here)", "requires_grad=True")


def autocast_arguments(logits, target_weight, weight, out_dtype):
    """The autocast rule of the losses: logits stay as they are (their sums are never narrower than float32), unless
    the tensors differ in dtype, when all are widened as torch widens operands; the loss comes back in float32
    (float64 for float64), where gradient scaling does not overflow it."""
    tensors = [t for t in (logits, target_weight, weight) if t is not None and t.is_floating_point()]
    if len({t.dtype for t in tensors}) > 1:
        widest = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        logits, target_weight, weight = (
            t.to(widest) if t is not None and t.is_floating_point() else t for t in (logits, target_weight, weight)
        )
    if out_dtype is None and logits.dtype in (torch.float16, torch.bfloat16):
        out_dtype = torch.float32
    return logits, target_weight, weight, out_dtype


def register_autocast(name: str) -> None:
    """Gives a loss op, whose first arguments are (logits, target, target_weight, weight) and whose last is out_dtype,
    the autocast rule."""
    op = getattr(torch.ops.pyops, name).default

    def kernel(excluded, logits, target, target_weight, weight, *options):
        logits, target_weight, weight, out_dtype = autocast_arguments(logits, target_weight, weight, options[-1])
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(logits, target, target_weight, weight, *options[:-1], out_dtype)

    for key in ("AutocastCPU", "AutocastCUDA"):
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        library.impl(name, functools.partial(kernel, excluded), key)
