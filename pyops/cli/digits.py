"""The ternary part of ``demo``: scikit-learn's handwritten digits with float32 and with ternary weights.

The same network takes the same steps on the same batches from the same initial weights: as it is, with ternary layers
scaled by the mean, and by the median. Then the ternary ones are packed; their predictions must be the same. On one
thread: for so small a network a second one only waits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyops

SEED = 1797
WIDTH = 512
STEPS = 300
BATCH = 64
RATE = 3e-3
TESTED = 360
SETTINGS = {"float32": None, "ternary, absmean": "absmean", "ternary, absmedian": "absmedian"}


@dataclass
class DigitsResult:
    """What one network reached. The last four are of the packed network, and None for float32."""

    network: str
    accuracy: float
    step_ms: float
    weight_bytes: int
    inference_ms: float
    same_predictions: int | None = None
    tested: int | None = None
    largest_difference: float | None = None
    times_faster: float | None = None


@dataclass
class Digits:
    """All networks with their curves: [(step, accuracy), ...]."""

    results: list[DigitsResult]
    curves: dict[str, list[tuple[int, float]]]

    def as_dict(self) -> dict:
        return {"results": [asdict(result) for result in self.results], "curves": self.curves}


def _data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(training images, their digits, test images, their digits); which are which does not depend on the machine."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.data).float() / 8 - 1
    digits = torch.from_numpy(found.target).long()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(SEED))
    test, train = order[:TESTED], order[TESTED:]
    return images[train], digits[train], images[test], digits[test]


def _network() -> nn.Module:
    torch.manual_seed(SEED)  # the same initial weights for every setting
    return nn.Sequential(
        nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(),
        nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(),
        nn.Linear(WIDTH, 10),
    )  # fmt: skip


@torch.inference_mode()
def _accuracy(model: nn.Module, images: Tensor, digits: Tensor) -> float:
    return 100 * (model(images).argmax(1) == digits).float().mean().item()


def _train(measure: str | None, data: tuple, progress) -> tuple[nn.Module, list[float], list[tuple[int, float]]]:
    images, digits, test_images, test_digits = data
    model = _network()
    if measure is not None:
        pyops.convert(model, pyops.nn.BitLinear, measure=measure)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    batches = torch.Generator().manual_seed(SEED)
    seconds, curve = [], []
    for step in range(1, STEPS + 1):
        chosen = torch.randint(len(digits), (BATCH,), generator=batches)
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images[chosen]), digits[chosen]).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        schedule.step()
        if step % 15 == 0:
            curve.append((step, _accuracy(model, test_images, test_digits)))
        progress(1)
    return model, seconds, curve


def _linear_bytes(model: nn.Module) -> int:
    kinds = (nn.Linear, pyops.nn.PackedBitLinear)
    layers = [layer for layer in model.modules() if isinstance(layer, kinds)]
    return sum(tensor.nbytes for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))


def _times(models: dict[str, nn.Module], images: Tensor) -> dict[str, list[float]]:
    """Seconds of a pass over all test images, the models taking turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(30):
            for name, model in models.items():
                model(images)
                start = time.perf_counter()
                model(images)
                times[name].append(time.perf_counter() - start)
    return times


def run(progress) -> Digits:
    """Trains, packs, compares; raises if a packed network predicts anything else than the one that it was made of."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(progress)
    finally:
        torch.set_num_threads(threads)


def _run(progress) -> Digits:
    data = _data()
    test_images, test_digits = data[2:]
    inference, results, curves = {}, {}, {}
    for name, measure in SETTINGS.items():
        model, seconds, curves[name] = _train(measure, data, progress)
        model.eval()
        result = DigitsResult(name, _accuracy(model, test_images, test_digits), 1e3 * median(seconds), 0, 0.0)
        if measure is not None:
            with torch.inference_mode():
                before = model(test_images)
                pyops.pack(model)
                after = model(test_images)
            result.tested = len(test_digits)
            result.same_predictions = int((before.argmax(1) == after.argmax(1)).sum())
            result.largest_difference = (before - after).abs().max().item()
            if result.same_predictions != result.tested:
                raise RuntimeError(f"{name}: the packed network predicts other digits")
        result.weight_bytes = _linear_bytes(model)
        inference[name], results[name] = model, result
    times = _times(inference, test_images)
    for name, result in results.items():
        result.inference_ms = 1e3 * median(times[name])
        if name != "float32":
            pairs = zip(times["float32"], times[name], strict=True)
            result.times_faster = median(base / own for base, own in pairs)
    return Digits(list(results.values()), curves)


def table_rows(digits: Digits) -> Iterator[dict]:
    base = digits.results[0].weight_bytes
    for result in digits.results:
        packed = result.tested is not None
        yield {
            "network": result.network,
            "accuracy %": f"{result.accuracy:.1f}",
            "step ms": f"{result.step_ms:.2f}",
            "bytes": f"{result.weight_bytes:,}",
            "of float32": f"{100 * result.weight_bytes / base:.0f} %",
            "inference ms": f"{result.inference_ms:.2f}",
            "times faster": f"{result.times_faster:.2f}" if packed else "-",
            "packed = trained": f"{result.same_predictions} of {result.tested}" if packed else "-",
        }


def plot(digits: Digits, folder: Path) -> Path:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in digits.curves.items():
        axis.plot(*zip(*curve, strict=True), marker=".", label=name)
    axis.set(xlabel="step", ylabel="accuracy on test images, %", title="Handwritten digits")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(folder / "digits.png", dpi=120)
    pyplot.close(figure)
    return folder / "digits.png"
