"""Benchmark cases of output layers whose logits are never formed: a whole training step, upkeep as it falls due.

A "step" is forward, backward and SGD on the weight; shapes are rows x features x classes. Rivals do the same on the
same inputs: softmax cross-entropy, which these layers replace, and ``z_loss`` on logits that are formed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pyops._bench.harness import Case, Prepared, Timed
from torch import Tensor, nn

import pyops

RATE = 0.1


def _dense(loss: Callable[[Tensor, nn.Linear, Tensor], Tensor], weight: Tensor, h: Tensor, target: Tensor) -> Timed:
    """A dense layer, SGD, and a loss of (h, layer, target)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD(linear.parameters(), lr=RATE)

    def step(_):
        optimizer.zero_grad()
        loss(h, linear, target).backward()
        optimizer.step()

    return Timed(step)


def _adaptive(features: int, classes: int, h: Tensor, target: Tensor) -> Timed:
    """Clusters as in the module's paper: frequent classes in the head; targets here are uniform, its worst case."""
    cutoffs = [c for c in (1000, 10000, 100000) if c < classes]
    layer = nn.AdaptiveLogSoftmaxWithLoss(features, classes, cutoffs)
    optimizer = torch.optim.SGD(layer.parameters(), lr=RATE)

    def step(_):
        optimizer.zero_grad()
        layer(h, target).loss.backward()
        optimizer.step()

    return Timed(step)


def _factored(weight: Tensor, h: Tensor, target: Tensor, dtype: torch.dtype) -> Timed:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    layer = pyops.nn.FactoredSphericalLinear.from_linear(linear, lr=RATE, state_dtype=dtype)
    return Timed(lambda _: layer(h, target).backward())


# op -> loss of (h, layer, target) on a dense weight
LOSSES = {
    "spherical_linear_loss": lambda h, layer, target: pyops.spherical_linear_loss(h, layer.weight, target),
    "linear_cross_entropy": lambda h, layer, target: pyops.linear_cross_entropy(h, layer.weight, target),
}
FACTORED = {"factored_linear": torch.float64, "factored_linear_float32_state": torch.float32}


def build(case: Case, compiled: bool) -> Prepared:
    rows, features, classes = case.shape
    generator = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, features, generator=generator).div_(features**0.5)
    h = torch.randn(rows, features, generator=generator).requires_grad_()
    target = torch.randint(0, classes, (rows,), generator=generator)
    if case.op in FACTORED:
        ours = _factored(weight, h, target, FACTORED[case.op])
    else:
        ours = _dense(LOSSES[case.op], weight, h, target)
    rivals = {
        "cross_entropy": lambda h, layer, target: F.cross_entropy(layer(h), target),
        "chunked linear_cross_entropy": lambda h, layer, target: F.linear_cross_entropy(
            h, layer.weight, target, options=nn.LinearCrossEntropyOptions()
        ),
        "z_loss": lambda h, layer, target: pyops.z_loss(layer(h), target),
    }
    return Prepared(
        target=ours,
        rivals={name: _dense(loss, weight, h, target) for name, loss in rivals.items()}
        | {"adaptive softmax": _adaptive(features, classes, h, target)},
        exact=lambda: pyops.z_loss((h.double() @ weight.double().T), target),
        comparable=(),
        backend="cpu" if case.op in FACTORED else "torch operations",
    )


def cases() -> list[Case]:
    """None gates yet: two of the three still run on torch's operations."""
    shapes = {
        "factored_linear": [(128, 256, n) for n in (2000, 10000, 100000)] + [(256, 512, n) for n in (10000, 100000)],
        "factored_linear_float32_state": [(128, 256, 10000), (128, 256, 100000), (256, 512, 100000)],
        "spherical_linear_loss": [(512, 256, 20000), (128, 256, 20000), (64, 256, 20000)],
        "linear_cross_entropy": [(512, 256, 20000)],
    }
    return [Case(op, shape, "float32", "step", 1, "", 0, build) for op in shapes for shape in shapes[op]]
