"""What ``python -m pyops selftest`` runs of this family: packing, rounding and products to the last bit of their
definition, gradients by the accuracy rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import pyops
from pyops import _lib
from pyops.ternary import reference, reference_ops
from pyops.ternary._formats import FORMATS
from pyops.ternary.linear import linear_packed
from pyops.ternary.quantize_activation import quantize_act
from pyops.ternary.repack import repack

LEVELS = _lib.PRODUCT_LEVELS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUICK_SHAPES = ((1, 1, 1), (1, 40, 2561), (3, 17, 130), (8, 33, 333), (40, 50, 515))  # tokens, out, in
FULL_SHAPES = (*QUICK_SHAPES, (2, 3000, 999), (13, 700, 4097), (129, 300, 2048))
TRITON_SHAPES = ((1, 1, 1), (3, 17, 130), (20, 33, 70))


def _operands(tokens: int, out_features: int, in_features: int, dtype: torch.dtype, device: str) -> tuple:
    generator = torch.Generator().manual_seed(tokens * 1009 + out_features * 31 + in_features)
    ternary = torch.randint(-1, 2, (out_features, in_features), generator=generator, dtype=torch.int8)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    return ternary.to(device), x.to(device), bias.to(device)


def _same(name: str, found: Tensor, wanted: Tensor) -> str:
    if found.dtype == wanted.dtype and torch.equal(found, wanted):
        return ""
    return f"{name} is not that of the definition, first difference at {(found != wanted).nonzero()[:1].tolist()}"


def _check_packing(shape, dtype, device, context) -> str:
    ternary = _operands(*shape, dtype, device)[0]
    for fmt in FORMATS[1:]:
        wanted = reference_ops.encode(ternary, fmt)
        with context():
            packed = repack(ternary, "int8", fmt, *ternary.shape)
            back = repack(wanted, fmt, "int8", *ternary.shape)
        problem = _same(f"packed {fmt}", packed, wanted) or _same(f"unpacked {fmt}", back, ternary)
        if problem:
            return problem
    return ""


def _check_rounding(shape, dtype, device, context) -> str:
    x = _operands(*shape, dtype, device)[1]
    q, step = reference.quantize_activation(x, 127, 1e-5)
    with context():
        ours, our_step = quantize_act(x)
    return _same("q", ours, q) or _same("step", our_step, step)


def _check_product(shape, dtype, device, context) -> str:
    ternary, x, bias = _operands(*shape, dtype, device)
    gamma = torch.tensor(0.37, device=device)
    wanted = reference_ops.ternary_linear(
        x, ternary, gamma, bias, FORMATS.index("int8"), *ternary.shape, 8, 127, 1e-5, None
    )
    for fmt in FORMATS:
        packed = ternary if fmt == "int8" else reference_ops.encode(ternary, fmt)
        with context():
            y = linear_packed(
                x, packed, gamma, bias, fmt=fmt, in_features=ternary.shape[1], out_features=ternary.shape[0]
            )
        problem = _same(f"y from {fmt}", y, wanted)
        if problem:
            return problem
    return ""


def _check_training(shape, dtype, device, context) -> str:
    """The median is an element, and so the same everywhere; then y is, and the gradients are sums of floats."""
    ternary, x, bias = _operands(*shape, dtype, device)
    weight = (ternary.float() * 0.3 + torch.linspace(-0.2, 0.2, ternary.numel(), device=device).view_as(ternary)).to(
        dtype
    )
    grad = torch.cos(torch.arange(x.shape[0] * bias.numel(), device=device)).view(x.shape[0], -1).to(dtype)
    codes, gamma = reference.quantize_weight(weight, measure="absmedian")
    q, step = reference.quantize_activation(x, 127, 1e-5)
    y = reference_ops.ternary_linear(x, codes, gamma, bias, FORMATS.index("int8"), *codes.shape, 8, 127, 1e-5, None)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    with context():
        ours = pyops.bitlinear(*leaves, weight_measure="absmedian")
        found = torch.autograd.grad(ours, leaves, grad)
    problem = _same("y", ours.detach(), y)
    if problem:
        return problem

    def gradients(wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        g, weights, tokens = grad.to(wide), codes.to(wide) * gamma.to(wide), q.to(wide) * step.to(wide)
        return tuple(
            part.to(dtype if wide != torch.float64 else wide) for part in (g @ weights, g.T @ tokens, g.sum(0))
        )

    for name, value, plain, exact in zip("xwb", found, gradients(torch.float32), gradients(torch.float64), strict=True):
        floor = 4 * torch.finfo(dtype).eps * exact.abs().max().item()
        error, torchs = ((part.double() - exact).abs().max().item() for part in (value, plain))
        if not error <= 2 * torchs + floor:
            return f"gradient of {name}: error {error:.3g}, torch's own {torchs:.3g}"
    return ""


CHECKS = {
    "pack": _check_packing,
    "quantize_act": _check_rounding,
    "linear_packed": _check_product,
    "bitlinear": _check_training,
}


def cases(label: str, device: str, full: bool) -> Iterator[tuple[str, Callable]]:
    """(name, check): the check takes the context of a backend and says what is wrong, if anything."""
    interpreted = label == "triton" and device == "cpu"
    shapes = TRITON_SHAPES if interpreted else FULL_SHAPES if full else QUICK_SHAPES
    for (name, check), dtype, shape in itertools.product(CHECKS.items(), DTYPES, shapes):
        if name == "pack" and dtype != torch.float32:
            continue
        yield f"{name} {dtype} {shape}", lambda context, check=check, case=(shape, dtype, device): check(*case, context)
