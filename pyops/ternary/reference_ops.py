"""The ops of the family in torch code, with the ops' own arguments and outputs: the backend of last resort."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyops import _dispatch, _lib
from pyops.ternary import _checks, reference
from pyops.ternary._formats import FORMATS, GROUP, _ceil, packed_shape

_RULES = {"int8": "hold -1, 0 and 1 only", "t5": "hold bytes below 243 only", "t5x16": "hold bytes below 243 only"}
_CODES_RULE = "hold the codes 0, 1 and 2 only"


# ---- where a weight lies ---------------------------------------------------------------------------------------


@functools.cache
def _fields(name: str) -> int:
    return 5 if name in ("t5", "t5x16") else 4


def _split(codes: Tensor, name: str) -> Tensor:
    """Codes [N, K] as [..., bytes..., digits]: the last axis is the place in the byte."""
    n, k = codes.shape
    rows, columns = (16, {"t2x16": 16, "t5x16": 20, "t2mma": 128}[name]) if name not in ("t2", "t5") else (1, None)
    columns = columns or _fields(name)
    padded = torch.nn.functional.pad(codes, (0, _ceil(k, columns) * columns - k, 0, _ceil(n, rows) * rows - n), value=1)
    if name in ("t2", "t5"):
        return padded.unflatten(1, (-1, columns))
    if name == "t2mma":
        # row = 8 h + g; k = 128 c + 32 s + 16 m + 4 t + b  ->  [block, c, (g, t), (s, b), field 2 m + h]
        parts = padded.unflatten(1, (-1, 4, 2, 4, 4)).unflatten(0, (-1, 2, 8))
        return parts.permute(0, 3, 2, 6, 4, 7, 5, 1).flatten(6).flatten(4, 5).flatten(2, 3)
    parts = padded.unflatten(1, (-1, _fields(name), 4)).unflatten(0, (-1, 16))
    return parts.permute(0, 2, 1, 4, 3)


def _join(digits: Tensor, name: str, n: int, k: int) -> Tensor:
    """The inverse of :func:`_split`."""
    if name in ("t2", "t5"):
        return digits.flatten(1)[:n, :k]
    if name == "t2mma":
        parts = digits.unflatten(4, (2, 2)).unflatten(3, (4, 4)).unflatten(2, (8, 4))
        whole = parts.permute(0, 7, 2, 1, 4, 6, 3, 5).flatten(3).flatten(0, 2)
        return whole[:n, :k]
    return digits.permute(0, 2, 1, 4, 3).flatten(2).flatten(0, 1)[:n, :k]


def encode(ternary: Tensor, name: str) -> Tensor:
    """-1, 0, 1 as bytes of a format."""
    base = 3 if _fields(name) == 5 else 4
    digits = _split(ternary.to(torch.int32) + 1, name)
    places = base ** torch.arange(_fields(name), dtype=torch.int32, device=ternary.device)
    return (digits * places).sum(-1).to(torch.uint8).reshape(packed_shape(name, *ternary.shape))


def decode(packed: Tensor, name: str, n: int, k: int) -> Tensor:
    """Codes [N, K] int32, 3 where a byte is not valid."""
    base = 3 if _fields(name) == 5 else 4
    places = base ** torch.arange(_fields(name), dtype=torch.int32, device=packed.device)
    values = packed.to(torch.int32)[..., None]
    digits = values // places % base
    return _join(torch.where(values >= 243, 3, digits) if base == 3 else digits, name, n, k)


def ternary_of(op: str, argument: str, packed: Tensor, form: int, n: int, k: int) -> Tensor:
    """T int8 [N, K] from any format; ValueError for a byte that stands for no weight."""
    name = FORMATS[form]
    codes = packed.to(torch.int32) + 1 if name == "int8" else decode(packed, name, n, k)
    bad = (codes < 0) | (codes > 2)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        value = int(codes[row, column]) - (name == "int8")
        if _fields(name) == 5:
            value = int(packed.flatten()[_byte_of(name, k, row, column)])
        raise ValueError(
            f"pyops::{op}: {argument} must {_RULES.get(name, _CODES_RULE)}, got {value} at [{row}, {column}]"
        )
    return (codes - 1).to(torch.int8)


def _byte_of(name: str, k: int, row: int, column: int) -> int:
    if name == "t5":
        return row * _ceil(k, 5) + column // 5
    return ((row // 16 * _ceil(k, 20) + column // 20) * 16 + row % 16) * 4 + column % 4


# ---- the ops ---------------------------------------------------------------------------------------------------


def ternary_quantize_weight(weight, scale, measure, per_row, eps, add_eps):
    _checks.quantize_weight(weight, scale, measure, per_row, eps)
    name = reference.MEASURES[measure]
    ternary, gamma = reference.quantize_weight(weight, scale, measure=name, per_row=per_row, eps=eps, add_eps=add_eps)
    return encode(ternary, "t2"), gamma


def ternary_quantize_activation(x, qmax, eps):
    _checks.quantize_activation("ternary_quantize_activation", x, qmax, eps)
    quantized, step = reference.quantize_activation(x, qmax, eps)
    return quantized, step[:, 0], quantized.sum(1, dtype=torch.int32)


def ternary_repack(source, from_format, to_format, out_features, in_features):
    _, to_name = _checks.repack(source, from_format, to_format, out_features, in_features)
    ternary = ternary_of("ternary_repack", "source", source, from_format, out_features, in_features)
    return ternary if to_name == "int8" else encode(ternary, to_name)


def _product(x, ternary, gamma, bias, quantized: bool, qmax, eps):
    """(y in float32, q, step); integers are exact in float64."""
    if not quantized:
        q, step = x.new_empty((0, 0), dtype=torch.int8), x.new_empty(0, dtype=torch.float32)
        y = reference.linear(x, ternary, gamma, None, qmax=None, eps=eps).float()
    else:
        q, step = reference.quantize_activation(x, qmax, eps)
        if gamma.dim() == 2:
            groups = q.double().unflatten(1, (gamma.shape[1], GROUP))
            codes = ternary.double().unflatten(1, (gamma.shape[1], GROUP))
            sums = torch.einsum("mgk,ngk->mng", groups, codes).float()
            y = step * torch.einsum("mng,ng->mn", sums, gamma)
        else:
            y = (q.double() @ ternary.double().T).float() * (step * gamma)
        step = step[:, 0]
    return (y if bias is None else y + bias.float()), q, step


def ternary_linear(
    x, packed, gamma, bias, form, out_features, in_features, act_bits, qmax, eps, out_dtype,
):  # fmt: skip
    _checks.linear(x, packed, gamma, bias, form, out_features, in_features, act_bits, qmax, eps, out_dtype)
    ternary = ternary_of("ternary_linear", "packed", packed, form, out_features, in_features)
    return _product(x, ternary, gamma, bias, act_bits == 8, qmax, eps)[0].to(out_dtype or x.dtype)


def ternary_linear_backward_input(grad, packed, gamma, form, in_features):
    _checks.linear_backward_input(grad, packed, gamma, form, in_features)
    ternary = ternary_of("ternary_linear_backward_input", "packed", packed, form, grad.shape[1], in_features)
    wide: Tensor = grad.float() @ reference.dequantized(ternary, gamma, torch.float32)
    return wide.to(grad.dtype)


def bitlinear(x, weight, packed, gamma, bias, act_bits, qmax, eps):
    _checks.bitlinear(x, weight, packed, gamma, bias, act_bits, qmax, eps)
    ternary = ternary_of("bitlinear", "packed", packed, FORMATS.index("t2"), *weight.shape)
    y, q, step = _product(x, ternary, gamma, bias, act_bits == 8, qmax, eps)
    return y.to(x.dtype), q, step


def bitlinear_backward_weight(grad, quantized, step, dtype):
    _checks.backward_weight(grad, quantized, step, dtype)
    return ((grad.float() * step[:, None]).T @ quantized.float()).to(dtype)


_dispatch.register("ternary", "ternary.quantize_weight", ternary_quantize_weight=ternary_quantize_weight)
_dispatch.register("ternary", "ternary.quantize_activation", ternary_quantize_activation=ternary_quantize_activation)
_dispatch.register("ternary", "ternary.repack", ternary_repack=ternary_repack)
_dispatch.register(
    "ternary",
    "ternary.linear",
    _lib.PRODUCT_LEVELS,
    ternary_linear=ternary_linear,
    ternary_linear_backward_input=ternary_linear_backward_input,
)
_dispatch.register(
    "ternary",
    "ternary.bitlinear",
    _lib.PRODUCT_LEVELS,
    bitlinear=bitlinear,
    bitlinear_backward_weight=bitlinear_backward_weight,
)
