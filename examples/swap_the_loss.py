"""Swap one line: train a small classifier with F.cross_entropy, pyops.cross_entropy and pyops.z_loss.

Run: python examples/swap_the_loss.py   (CPU, a few seconds)
"""

import time

import torch
from torch.nn import functional

import pyops

CLASSES, FEATURES, ROWS, STEPS = 5_000, 64, 256, 60


def batches(generator: torch.Generator):
    """Points around one random centre per class."""
    centres = torch.randn(CLASSES, FEATURES, generator=generator)
    while True:
        target = torch.randint(CLASSES, (ROWS,), generator=generator)
        yield centres[target] + 0.5 * torch.randn(ROWS, FEATURES, generator=generator), target


def train(loss_function) -> tuple[float, float]:
    """Returns (top-1 accuracy on fresh batches, seconds per step)."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(FEATURES, CLASSES)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    data = batches(torch.Generator().manual_seed(1))
    start = time.perf_counter()
    for _ in range(STEPS):
        features, target = next(data)
        optimizer.zero_grad()
        loss_function(layer(features), target).backward()
        optimizer.step()
    seconds = (time.perf_counter() - start) / STEPS
    with torch.no_grad():
        hits = [
            (layer(features).argmax(1) == target).float().mean() for features, target in (next(data) for _ in range(8))
        ]
    return torch.stack(hits).mean().item(), seconds


if __name__ == "__main__":
    losses = {
        "F.cross_entropy": functional.cross_entropy,
        "pyops.cross_entropy": pyops.cross_entropy,
        "pyops.z_loss(b=10)": lambda logits, target: pyops.z_loss(logits, target, b=10.0),
    }
    for name, function in losses.items():
        accuracy, seconds = train(function)
        print(f"{name:22s} top-1 {accuracy:.3f}   {1e3 * seconds:.2f} ms per step")
