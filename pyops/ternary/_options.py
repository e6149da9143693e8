"""What the public functions of the family do to their Python arguments before an op sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from pyops._autograd import reject
from pyops.ternary.reference import EPS_MODES, MEASURES

GRANULARITIES = ("tensor", "row")


def tensor(op: str, name: str, value: object, optional: bool = False) -> None:
    """TypeError for what is no tensor; other layouts the dispatcher would answer for, at length."""
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        reject(op, name, "be a Tensor or None" if optional else "be a Tensor", type(value).__name__, TypeError)
    if value.layout is not torch.strided:
        reject(op, name, "be a strided tensor", "another layout")


def choice(op: str, name: str, value: object, allowed: tuple) -> int:
    """The position of an option among those allowed."""
    if value in allowed and type(value) is type(allowed[allowed.index(value)]):
        return allowed.index(value)
    words = ", ".join(map(repr, allowed))
    error = ValueError if isinstance(value, (str, int, type(None))) and not isinstance(value, bool) else TypeError
    reject(op, name, f"be one of {words}", repr(value), error)


def number(op: str, name: str, value: object, low: float, high: float, rule: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        reject(op, name, "be a number", type(value).__name__, TypeError)
    if not low <= value <= high:
        reject(op, name, rule, f"{value:g}", ValueError)
    return float(value)


def positive_eps(op: str, eps: object) -> float:
    return number(op, "eps", eps, 2.0**-149, 3.4e38, "be positive")


def measure(op: str, value: object) -> int:
    return choice(op, "weight_measure", value, MEASURES)


def eps_mode(op: str, value: object) -> bool:
    return bool(choice(op, "eps_mode", value, EPS_MODES))


def per_row(op: str, value: object) -> bool:
    return bool(choice(op, "granularity", value, GRANULARITIES))


def act_bits(op: str, value: object) -> int:
    """8, or 0 for None."""
    return (8, 0)[choice(op, "act_bits", value, (8, None))]


def qmax(op: str, value: object) -> int:
    return (127, 128)[choice(op, "qmax", value, (127, 128))]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks of matrix products on the device of ``x``, or None."""
    if not torch._C._is_any_autocast_enabled():
        return None
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
