"""Argument checks of the family, word for word those of ``csrc/ternary/ternary_arguments.cpp``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyops._autograd import reject
from pyops._checks import device, dtype_name, shape_name, strided
from pyops.ternary._formats import GROUP, MAX_IN_FEATURES, check_code, packed_dtype, packed_shape

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
_FLOATING_RULE = "be float32, bfloat16 or float16"


def floating(op: str, argument: str, tensor: Tensor) -> None:
    strided(op, argument, tensor)
    if tensor.dtype not in FLOATING:
        reject(op, argument, _FLOATING_RULE, dtype_name(tensor.dtype))


def _typed(op: str, argument: str, tensor: Tensor, like: Tensor, like_name: str, dtype: torch.dtype) -> None:
    strided(op, argument, tensor)
    device(op, argument, tensor, like, like_name)
    if tensor.dtype != dtype:
        reject(op, argument, f"be {dtype_name(dtype)}", dtype_name(tensor.dtype))


def _shape(op: str, argument: str, tensor: Tensor, *sizes: int) -> None:
    if tuple(tensor.shape) != sizes:
        reject(op, argument, f"have shape {list(sizes)}", shape_name(tensor))


def _matrix(op: str, argument: str, tensor: Tensor, shape: str) -> None:
    if tensor.dim() != 2:
        reject(op, argument, f"have shape {shape}", shape_name(tensor))


def _features(op: str, out_features: int, in_features: int) -> None:
    if out_features < 0:
        reject(op, "out_features", "be at least 0", out_features)
    if not 0 <= in_features <= MAX_IN_FEATURES:
        reject(op, "in_features", "be in [0, 16777216]", in_features)


def _quantizer(op: str, qmax: int, eps: float) -> None:
    if qmax not in (127, 128):
        reject(op, "qmax", "be 127 or 128", qmax)
    if not (eps > 2.0**-150 and eps < 3.4028235677973366e38):  # as float32 positive and finite
        reject(op, "eps", "be positive", f"{eps:g}")


def _gamma(op: str, gamma: Tensor, like: Tensor, like_name: str, out_features: int, in_features: int) -> None:
    _typed(op, "gamma", gamma, like, like_name, torch.float32)
    if gamma.dim() == 0 or tuple(gamma.shape) == (out_features,):
        return
    if in_features % GROUP == 0 and tuple(gamma.shape) == (out_features, in_features // GROUP):
        return
    rule = f"have shape [], [{out_features}] or [{out_features}, in_features / 256]"
    reject(op, "gamma", rule, shape_name(gamma))


def _packed(op: str, packed: Tensor, like: Tensor, like_name: str, form: str, out_features, in_features) -> None:
    _typed(op, "packed", packed, like, like_name, packed_dtype(form))
    _shape(op, "packed", packed, *packed_shape(form, out_features, in_features))


def _bias(op: str, bias: Tensor | None, x: Tensor, out_features: int) -> None:
    if bias is None:
        return
    strided(op, "bias", bias)
    device(op, "bias", bias, x, "x")
    if bias.dtype != x.dtype:
        reject(op, "bias", f"be {dtype_name(x.dtype)} like x", dtype_name(bias.dtype))
    _shape(op, "bias", bias, out_features)


def _act_bits(op: str, act_bits: int) -> None:
    if act_bits not in (0, 8):
        reject(op, "act_bits", "be 8 or 0 (not quantized)", act_bits)


def _x(op: str, x: Tensor, in_features: int) -> None:
    if x.shape[-1] != in_features:
        reject(op, "x", f"have in_features = {in_features} columns", shape_name(x))


def quantize_weight(weight, scale, measure, per_row, eps) -> None:
    op = "ternary_quantize_weight"
    floating(op, "weight", weight)
    _matrix(op, "weight", weight, "[out_features, in_features]")
    if scale is not None:
        _typed(op, "scale", scale, weight, "weight", torch.float32)
        _shape(op, "scale", scale, *([weight.shape[0]] if per_row else []))
    if measure not in (0, 1):
        reject(op, "measure", "be 0 (absmean) or 1 (absmedian)", measure)
    if not 0 <= eps < 3.4028235677973366e38 or math.isnan(eps):
        reject(op, "eps", "be at least 0", f"{eps:g}")


def quantize_activation(op, x, qmax, eps) -> None:
    floating(op, "x", x)
    _matrix(op, "x", x, "[tokens, in_features]")
    _quantizer(op, qmax, eps)
    _features(op, 0, x.shape[1])


def repack(source, from_format, to_format, out_features, in_features) -> tuple[str, str]:
    op = "ternary_repack"
    from_name, to_name = check_code(op, "from_format", from_format), check_code(op, "to_format", to_format)
    if from_format == to_format:
        reject(op, "to_format", "differ from from_format", to_format)
    _features(op, out_features, in_features)
    _typed(op, "source", source, source, "source", packed_dtype(from_name))
    _shape(op, "source", source, *packed_shape(from_name, out_features, in_features))
    return from_name, to_name


def linear(x, packed, gamma, bias, form, out_features, in_features, act_bits, qmax, eps, out_dtype) -> None:
    op = "ternary_linear"
    floating(op, "x", x)
    _matrix(op, "x", x, "[tokens, in_features]")
    name = check_code(op, "format", form)
    _features(op, out_features, in_features)
    _x(op, x, in_features)
    _packed(op, packed, x, "x", name, out_features, in_features)
    _gamma(op, gamma, x, "x", out_features, in_features)
    _bias(op, bias, x, out_features)
    _act_bits(op, act_bits)
    _quantizer(op, qmax, eps)
    if out_dtype is not None and out_dtype not in FLOATING:
        reject(op, "out_dtype", _FLOATING_RULE, dtype_name(out_dtype))


def linear_backward_input(grad, packed, gamma, form, in_features) -> None:
    op = "ternary_linear_backward_input"
    floating(op, "grad", grad)
    _matrix(op, "grad", grad, "[tokens, out_features]")
    name = check_code(op, "format", form)
    out_features = grad.shape[1]
    _features(op, out_features, in_features)
    _packed(op, packed, grad, "grad", name, out_features, in_features)
    _gamma(op, gamma, grad, "grad", out_features, in_features)


def bitlinear(x, weight, packed, gamma, bias, act_bits, qmax, eps) -> None:
    op = "bitlinear"
    floating(op, "x", x)
    _matrix(op, "x", x, "[tokens, in_features]")
    floating(op, "weight", weight)
    device(op, "weight", weight, x, "x")
    _matrix(op, "weight", weight, "[out_features, in_features]")
    out_features, in_features = weight.shape
    _features(op, out_features, in_features)
    _x(op, x, in_features)
    _packed(op, packed, x, "x", "t2", out_features, in_features)
    _gamma(op, gamma, x, "x", out_features, in_features)
    _bias(op, bias, x, out_features)
    _act_bits(op, act_bits)
    _quantizer(op, qmax, eps)


def operands(x, weight, bias) -> None:
    """What the op says of its floating arguments, for calls that run composite code instead; x has any leading
    dimensions."""
    op = "bitlinear"
    floating(op, "x", x)
    floating(op, "weight", weight)
    device(op, "weight", weight, x, "x")
    _x(op, x, weight.shape[1])
    _bias(op, bias, x, weight.shape[0])


def backward_weight(grad, quantized, step, dtype) -> None:
    op = "bitlinear_backward_weight"
    floating(op, "grad", grad)
    _matrix(op, "grad", grad, "[tokens, out_features]")
    _typed(op, "quantized", quantized, grad, "grad", torch.int8)
    if quantized.dim() != 2 or quantized.shape[0] != grad.shape[0]:
        reject(op, "quantized", f"have shape [{grad.shape[0]}, in_features]", shape_name(quantized))
    _typed(op, "step", step, grad, "grad", torch.float32)
    _shape(op, "step", step, grad.shape[0])
    if dtype not in FLOATING:
        reject(op, "dtype", _FLOATING_RULE, dtype_name(dtype))
