"""The packed state of a ternary layer: its keys, its header, and the check that they belong together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyops import _packed_state
from pyops._checks import FormatError, dtype_name, shape_name
from pyops.ternary._formats import CANONICAL, GROUP, MAX_IN_FEATURES, packed_shape

KEYS = ("weight_packed", "weight_gamma", "bias")
HEADER = "weight_header"
_BLOCKS = {"t2": (1, 4), "t5": (1, 5)}


def granularity(gamma: Tensor) -> str:
    """What has a gamma of its own, told by the number of dimensions."""
    return ("tensor", "row", "group")[gamma.dim()]


def make_header(packed: Tensor, gamma: Tensor, bias: Tensor | None, *, fmt: str, shape: tuple[int, int]) -> Tensor:
    """The header of a layer with weights of ``shape = (out_features, in_features)`` in a canonical format."""
    return _packed_state.make_header(
        family="ternary",
        layout=fmt,
        shape=shape,
        block=_BLOCKS[fmt],
        granularity=granularity(gamma),
        tensors=dict(zip(KEYS, (packed, gamma, bias), strict=True)),
    )


def _require(good: bool, name: str, field: str, rule: str, got: object) -> None:
    if not good:
        raise FormatError(f"{name}: {field} must {rule}, got {got}")


def _check_tensor(name: str, key: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    _require(tensor.dtype == dtype, name, key, f"be {dtype_name(dtype)}", dtype_name(tensor.dtype))
    _require(tuple(tensor.shape) == shape, name, key, f"have shape {list(shape)}", shape_name(tensor))


def check_gamma(gamma: Tensor, name: str) -> None:
    """Every gamma is positive and finite."""
    wrong = ~(gamma > 0) | gamma.isinf()
    if bool(wrong.any()):
        at = int(wrong.flatten().nonzero()[0])
        raise FormatError(f"{name} must be positive and finite, got {gamma.flatten()[at].item():g} at element {at}")


def check_codes(packed: Tensor, fmt: str, name: str) -> None:
    """Every byte of a canonical format stands for weights."""
    if fmt == "t2":
        wrong, rule = (packed & (packed >> 1) & 0x55) != 0, "hold the codes 0, 1 and 2 only"
    else:
        wrong, rule = packed > 242, "hold bytes below 243 only"
    if bool(wrong.any()):
        at = int(wrong.flatten().nonzero()[0])
        raise FormatError(f"{name} must {rule}, got byte {int(packed.flatten()[at])} at byte {at}")


def check_state(state: Mapping[str, Tensor], name: str = "packed ternary weight") -> dict:
    """The header's fields of a state with the keys ``weight_packed``, ``weight_gamma``, ``bias`` (may be missing) and
    ``weight_header``, once all of it is known to be right: header, checksums, dtypes, shapes, codes, scales.

    Raises:
        FormatError: its text begins with ``name`` and says what is wrong. Nothing is changed.
    """
    tensors = {key: state.get(key) for key in KEYS}
    for key in (HEADER, *KEYS[:2]):
        _require(isinstance(state.get(key), Tensor), name, key, "be there", "nothing")
    fields = _packed_state.check_header(state[HEADER], tensors, family="ternary", name=name)
    layout, (rows, columns) = fields["layout"], fields["shape"]
    _require(layout in CANONICAL, name, "layout", f"be one of {', '.join(CANONICAL)}", repr(layout))
    _require(columns <= MAX_IN_FEATURES, name, "shape", f"have at most {MAX_IN_FEATURES} columns", columns)
    _require(tuple(fields["block"]) == _BLOCKS[layout], name, "block", f"be {list(_BLOCKS[layout])}", fields["block"])
    gammas = {"tensor": (), "row": (rows,), "group": (rows, columns // GROUP)}
    kind = fields["granularity"]
    _require(kind in gammas, name, "granularity", "be 'tensor', 'row' or 'group'", repr(kind))
    _require(kind != "group" or columns % GROUP == 0, name, "shape", "have whole groups of 256 columns", columns)
    _check_tensor(name, KEYS[0], tensors[KEYS[0]], packed_shape(layout, rows, columns), torch.uint8)
    _check_tensor(name, KEYS[1], tensors[KEYS[1]], gammas[kind], torch.float32)
    if tensors["bias"] is not None:
        bias = tensors["bias"]
        _require(bias.is_floating_point(), name, "bias", "be floating-point", dtype_name(bias.dtype))
        _check_tensor(name, "bias", bias, (rows,), bias.dtype)
    check_codes(tensors[KEYS[0]], layout, f"{name}: weight_packed")
    check_gamma(tensors[KEYS[1]], f"{name}: weight_gamma")
    return fields
