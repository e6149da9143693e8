"""``selftest``: every op, every backend and CPU level that is here, against the float64 reference.

It ships in the wheel and needs neither pytest nor the source tree: it answers "does this installation compute
the right numbers on this machine" in seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

# Triton serves CPU tensors only interpreted, and reads this when a kernel is defined.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import Tensor

import pyops
from pyops import _dispatch, _environment, _lib
from pyops.spherical import reference

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


@contextmanager
def _cpu_level(level: str) -> Iterator[None]:
    _lib.native.force_isa(level)
    try:
        yield
    finally:
        _lib.native.force_isa(None)


def backends(device: str) -> Iterator[tuple[str, Callable]]:
    """(label, context manager factory) of everything that can run on ``device``."""
    if device == "cpu":
        allowed = _environment.ISA_LEVELS.index(_lib.native.current_isa())
        for level in _lib.KERNEL_LEVELS:
            if _environment.ISA_LEVELS.index(level) <= allowed:
                yield f"cpu:{level}", lambda level=level: _cpu_level(level)
    elif not _lib.cuda_unavailable():
        yield "cuda", nullcontext
    if not _dispatch.triton_unavailable():
        yield "triton", lambda: pyops.use_backend("triton")
    yield "reference", lambda: pyops.use_backend("reference")


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


def run(arguments: argparse.Namespace) -> int:
    """Prints one line per backend; status 1 when any case fails or none ran."""
    start, rows, failures = time.perf_counter(), [], []
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for device in devices:
        for label, context in backends(device):
            shapes = FULL_SHAPES if arguments.full else QUICK_SHAPES
            if label == "triton" and device == "cpu":
                shapes = TRITON_SHAPES
            ran = 0
            for name, dtype, shape, options in itertools.product(FUNCTIONS, dtypes, shapes, (0, 1)):
                if label == "triton" and device == "cpu" and dtype in (torch.float16, torch.float64) and options:
                    continue
                problem = check(name, dtype, shape, device, options, context)
                ran += 1
                if problem:
                    failures.append(f"{device} {label} {name} {dtype} {shape} options {options}: {problem}")
            rows.append({"device": device, "backend": label, "cases": ran})
            if not arguments.json:
                print(f"{device:5s} {label:14s} {ran:4d} cases")
    seconds = time.perf_counter() - start
    result = {"rows": rows, "failures": failures, "seconds": round(seconds, 1)}
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print("\n".join(failures) or f"all {sum(row['cases'] for row in rows)} cases passed in {seconds:.1f} s")
    return 1 if failures or not rows else 0
