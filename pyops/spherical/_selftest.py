"""What ``python -m pyops selftest`` runs of this family: losses and gradients, by the accuracy rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import pyops
from pyops import _lib
from pyops.spherical import reference

LEVELS = _lib.KERNEL_LEVELS

# name -> (public function, reference taking the same keyword arguments)
FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "z_loss": (pyops.z_loss, lambda *a, **k: reference.spherical_loss(*a, loss="z", **k)),
    "taylor_softmax_loss": (
        pyops.taylor_softmax_loss,
        lambda *a, **k: reference.spherical_loss(*a, loss="taylor_softmax", **k),
    ),
    "spherical_softmax_loss": (
        pyops.spherical_softmax_loss,
        lambda *a, **k: reference.spherical_loss(*a, loss="spherical_softmax", eps=0.1, **k),
    ),
    "mse_onehot_loss": (
        pyops.mse_onehot_loss,
        lambda *a, **k: reference.spherical_loss(*a, loss="mse_onehot", **k),
    ),
    "cross_entropy": (
        lambda *a, **k: pyops.cross_entropy(*a, lse_square_scale=1e-2, **k),
        lambda *a, **k: reference.cross_entropy(*a, lse_square_scale=1e-2, **k)[0],
    ),
}
QUICK_SHAPES = ((1, 1), (3, 7), (5, 33), (4, 4097))
FULL_SHAPES = (*QUICK_SHAPES, (2, 100_003), (257, 1000), (1, 300_001))
TRITON_SHAPES = ((3, 7), (2, 100))  # interpreted: about 0.1 s each
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _inputs(rows: int, classes: int, dtype: torch.dtype, device: str, options: int) -> tuple[Tensor, Tensor, dict]:
    generator = torch.Generator().manual_seed(rows * 1009 + classes)
    logits = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 2 + 1).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=generator)
    if options == 0:
        return logits.to(device), target.to(device), {}
    weight = (torch.rand(classes, generator=generator, dtype=torch.float64) + 0.1).to(dtype)
    target[0] = -100
    extra = {"weight": weight.to(device), "label_smoothing": 0.1, "reduction": "sum"}
    return logits.to(device), target.to(device), extra


def _run(function: Callable, logits: Tensor, target: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits, target, **options)
    loss.backward()
    return loss.detach().double(), logits.grad.double()


def _error(value: Tensor, exact: Tensor) -> float:
    return (value - exact).abs().max().item() if exact.numel() else 0.0


def check(name: str, dtype: torch.dtype, shape: tuple[int, int], device: str, options: int, context) -> str:
    """Empty when the accuracy rule holds: error at most twice that of torch code in the same dtype."""
    function, same = FUNCTIONS[name]
    logits, target, keywords = _inputs(*shape, dtype, device, options)
    wide = {key: value.double() if isinstance(value, Tensor) else value for key, value in keywords.items()}
    exact = _run(same, logits.double(), target, wide)
    plain = _run(same, logits, target, keywords)
    with context():
        ours = _run(function, logits, target, keywords)
    for part, value, torch_value, truth in zip(("loss", "gradient"), ours, plain, exact, strict=True):
        floor = 4 * torch.finfo(dtype).eps * max(truth.abs().max().item(), torch.finfo(dtype).tiny)
        # A row of one or two classes has gradients that cancel exactly: their scale is that of the logits.
        floor += torch.finfo(dtype).eps if part == "gradient" and shape[1] <= 2 else 0
        if not _error(value, truth) <= 2 * _error(torch_value, truth) + floor:
            return f"{part} error {_error(value, truth):.3g}, torch's own {_error(torch_value, truth):.3g}"
    return ""


def cases(label: str, device: str, full: bool) -> Iterator[tuple[str, Callable]]:
    """(name, check): the check takes the context of a backend and says what is wrong, if anything."""
    interpreted = label == "triton" and device == "cpu"
    shapes = TRITON_SHAPES if interpreted else FULL_SHAPES if full else QUICK_SHAPES
    for name, dtype, shape, options in itertools.product(FUNCTIONS, DTYPES, shapes, (0, 1)):
        if interpreted and dtype in (torch.float16, torch.float64) and options:
            continue
        text = f"{name} {dtype} {shape} options {options}"
        yield text, lambda context, case=(name, dtype, shape, device, options): check(*case, context)
