"""The calls of ternary ops whose traffic the ledger holds: the product at the shapes of published models, and the parts
of a training step. In a process where backend "cuda" serves CPU tensors; see ledger_traffic.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from pyops.ternary._formats import FORMATS, packed_shape

# (out_features, in_features); numbers of tokens: a vector, a small batch, a larger one, prefill.
SHAPES = ((2560, 2560), (6912, 2560), (2560, 6912), (4096, 14336))
TOKENS = (1, 8, 64, 512)
FIRST = SHAPES[0]
EPS = 1e-5
T2, T2MMA = FORMATS.index("t2"), FORMATS.index("t2mma")


class Case(NamedTuple):
    """``tiled``: blocks read what they share again. ``whole``: all blocks must run, not a sample."""

    name: str
    op: str
    arguments: tuple
    bytes: int
    flops: int = 0
    tiled: bool = False
    whole: bool = False


def _draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _zeros(form: int, shape: tuple[int, int]) -> torch.Tensor:
    """Packed: every kernel reads as much of any weights."""
    return torch.full(packed_shape(FORMATS[form], *shape), 0x55, dtype=torch.uint8)


def _product(tokens: int, shape: tuple[int, int], act_bits: int) -> Case:
    x, packed, gamma = _draw(tokens, shape[1]), _zeros(T2MMA, shape), torch.tensor(1.0)
    return Case(
        name=f"ternary_linear {tokens}x{shape[0]}x{shape[1]} {'int8' if act_bits else 'bfloat16'}",
        op="ternary_linear",
        arguments=(x, packed, gamma, None, T2MMA, *shape, act_bits, 127, EPS, None),
        bytes=packed.numel() + 2 * tokens * sum(shape),
        flops=2 * tokens * shape[0] * shape[1],
        tiled=True,
    )


def _activations(tokens: int, columns: int, dtype: torch.dtype) -> Case:
    x = _draw(tokens, columns, dtype=dtype)
    name = f"quantize_activation {tokens}x{columns} {str(dtype).removeprefix('torch.')}"
    return Case(name, "ternary_quantize_activation", (x, 127, EPS), x.numel() * (x.element_size() + 1))


def _weight(measure: int, per_row: bool, shape: tuple[int, int], passes: int, whole: bool = False) -> Case:
    """``passes`` over the weight, and a quarter of a byte for each."""
    weight = _draw(*shape)
    name = f"quantize_weight {('absmean', 'absmedian')[measure]} {('tensor', 'row')[per_row]} {shape[0]}x{shape[1]}"
    arguments = (weight, None, measure, per_row, EPS, False)
    return Case(
        name, "ternary_quantize_weight", arguments, 2 * passes * weight.numel() + weight.numel() // 4, whole=whole
    )


def _gradients(tokens: int, shape: tuple[int, int]) -> list[Case]:
    rows, columns = shape
    grad, packed = _draw(tokens, rows), _zeros(T2MMA, shape)
    q, step = torch.zeros(tokens, columns, dtype=torch.int8), torch.ones(tokens)
    size = f"{tokens}x{rows}x{columns}"
    flops, moved = 2 * tokens * rows * columns, packed.numel() + 2 * tokens * (rows + columns)
    cases = [
        Case(f"backward_input {size} gamma per {what}", "ternary_linear_backward_input",
             (grad, packed, gamma, T2MMA, columns), moved, flops, tiled=True)
        for what, gamma in (("tensor", torch.tensor(1.0)), ("row", torch.ones(rows)))
    ]  # fmt: skip
    moved = 2 * tokens * rows + tokens * columns + 2 * rows * columns
    arguments = (grad, q, step, torch.bfloat16)
    return [*cases, Case(f"backward_weight {size}", "bitlinear_backward_weight", arguments, moved, flops, tiled=True)]


def cases() -> Iterator[Case]:
    for shape in SHAPES:
        for tokens in TOKENS:
            yield _product(tokens, shape, 8)
    yield _product(8, FIRST, 0)
    yield _product(512, FIRST, 0)
    yield _activations(512, 2560, torch.bfloat16)
    yield _activations(512, 2560, torch.float32)
    yield _weight(0, False, FIRST, passes=2)
    yield _weight(0, True, FIRST, passes=2)
    # A choice of digits needs all of them counted: small, and whole.
    yield _weight(1, False, (512, 1024), passes=4, whole=True)
    yield _weight(1, True, (64, 2560), passes=4, whole=True)
    repacked = _zeros(T2, FIRST)
    yield Case("repack t2 to t2mma 2560x2560", "ternary_repack", (repacked, T2, T2MMA, *FIRST), 2 * repacked.numel())
    yield from _gradients(512, FIRST)
