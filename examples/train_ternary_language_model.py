"""A small language model over bytes of real text: float32, and ternary with the mean or the median as scale.

The text is Python's own help (pydoc_data.topics), which every installation has. Each model takes the same steps on the
same batches from the same initial weights at the same learning rate, which was tuned for none of them.

Run: python examples/train_ternary_language_model.py [--steps 150] [--out FOLDER]   (CPU, under two minutes)
"""

import argparse
import math
import time
from pathlib import Path
from pydoc_data import topics

import torch
from torch import nn
from torch.nn import functional

import pyops

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 64, 96, 4, 2, 16
RATE = 3e-3
# name -> options of pyops.nn.BitLinear; None leaves torch's layers in place
SETTINGS = {"float32": None, "ternary, mean": {"measure": "absmean"}, "ternary, median": {"measure": "absmedian"}}


class Block(nn.Module):
    """Causal attention and a feed-forward layer; every matrix product is an nn.Linear, for pyops.convert to find."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-3, -2)
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(-3, -2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.feed_norm(x))))


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_bytes, self.embed_places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.lm_head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1])
        return self.lm_head(self.norm(self.blocks(self.embed_bytes(tokens) + self.embed_places(places))))


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """(training, held-out) bytes; the last tenth is held out."""
    data = torch.frombuffer(bytearray("\n".join(topics.topics.values()).encode()), dtype=torch.uint8).long()
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def batch(data: torch.Tensor, generator: torch.Generator, size: int = BATCH) -> torch.Tensor:
    start = torch.randint(len(data) - CONTEXT, (size, 1), generator=generator)
    return data[start + torch.arange(CONTEXT + 1)]


def loss_of(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, data: torch.Tensor) -> float:
    generator = torch.Generator().manual_seed(2)
    return sum(loss_of(model, batch(data, generator, 64)).item() for _ in range(2)) / 2


def train(setting: str, steps: int) -> dict:
    options = SETTINGS[setting]
    training, held_out = text()
    torch.manual_seed(0)
    model = LanguageModel()
    if options is not None:  # the output layer and the embeddings stay as they are
        pyops.convert(model, pyops.nn.BitLinear, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    curve = []
    start = time.perf_counter()
    for step in range(steps):
        loss = loss_of(model, batch(training, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            curve.append((step + 1, loss.item(), held_out_loss(model, held_out)))
    found = {"curve": curve, "held out": curve[-1][2], "seconds": time.perf_counter() - start}
    if options is not None:
        report = pyops.pack(model)
        found |= {"packed": held_out_loss(model, held_out), "bytes": (report.bytes_before, report.bytes_after)}
    return found


def plot(results: dict[str, dict], folder: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for name, result in results.items():
        steps, training, held_out = zip(*result["curve"], strict=True)
        axes[0].plot(steps, training, marker=".", label=name)
        axes[1].plot(steps, held_out, marker=".", label=name)
    for axis, title in zip(axes, ("training batch", "held out"), strict=True):
        axis.set(title=title, xlabel="step", ylabel="nats per byte")
        axis.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "ternary_language_model.png", dpi=120)
    return folder / "ternary_language_model.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("pyops-demo"))
    arguments = parser.parse_args()
    results = {name: train(name, arguments.steps) for name in SETTINGS}
    for name, result in results.items():
        bits = result["held out"] / math.log(2)
        print(
            f"{name:16s} held out {result['held out']:.3f} nats ({bits:.2f} bits) per byte, {result['seconds']:.0f} s"
        )
        if "packed" in result:
            before, after = result["bytes"]
            print(f"{'':16s} packed   {result['packed']:.3f} nats per byte; weights {before:,} -> {after:,} bytes")
    print("plot:", plot(results, arguments.out))
