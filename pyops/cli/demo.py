"""``demo``: trains a next-token model on real text with z_loss and with cross_entropy, then times every op.

The text is on every machine that has torch: the Python sources of the installed torch package, tokenised with the
standard library. Every step is taken by each loss in turn, on the same batch, from the same initial weights, so
that step times are paired and both losses see the same text.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyops

SEED = 20_000
CLASSES = 20_000
IGNORED = -100
TRAIN_TOKENS = 1_200_000
HELD_OUT_TOKENS = 150_000
TOKENS_PER_FILE = 20_000  # torch has generated tables of numbers: uncapped, one of them was a third of the held-out text
CONTEXT, EMBEDDING, HIDDEN = 12, 48, 192
BATCH = 512
STEPS = 300
MINUTES = 3.0
SECONDS_FOR_ROWS = 45  # of MINUTES, kept for the table of ops
RIVAL_EVERY = 8  # F.cross_entropy differs from pyops.cross_entropy by time only: timed every 8th step


# ---- text --------------------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """Token ids; ``CLASSES`` is the id of every token outside the vocabulary."""

    train: Tensor
    held_out: Tensor
    files: int
    distinct: int
    unknown_share: float
    rarest: int  # how often the rarest word of the vocabulary occurs in the training text


def _tokens(path: Path) -> Iterator[str]:
    """Tokens of one source file; comments are skipped, layout becomes words of its own."""
    layout = {tokenize.NEWLINE: "<newline>", tokenize.INDENT: "<indent>", tokenize.DEDENT: "<dedent>"}
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)
    yield "<file>"
    try:
        with tokenize.open(path) as source:
            for token in tokenize.generate_tokens(source.readline):
                if token.type not in skipped:
                    yield layout.get(token.type, token.string)
    except (tokenize.TokenError, SyntaxError, UnicodeDecodeError):
        return  # a template or a test of broken syntax: keep what was read


def _ordered_files(root: Path) -> list[Path]:
    """All sources in an order that does not depend on the file system and mixes the folders."""
    keys = {path: path.relative_to(root).as_posix().encode() for path in root.rglob("*.py")}
    return sorted(keys, key=lambda path: hashlib.sha256(keys[path]).digest())


def read_corpus(progress) -> Corpus:
    """Every eighth file is held out, as a whole, until there are tokens enough."""
    train: list[str] = []
    held_out: list[str] = []
    files = 0
    for index, path in enumerate(_ordered_files(Path(torch.__file__).parent)):
        into, limit = (held_out, HELD_OUT_TOKENS) if index % 8 == 0 else (train, TRAIN_TOKENS)
        if len(into) >= limit:
            continue
        before = len(into)
        into.extend(itertools.islice(_tokens(path), TOKENS_PER_FILE))
        files += 1
        progress(len(into) - before)
        if len(train) >= TRAIN_TOKENS and len(held_out) >= HELD_OUT_TOKENS:
            break
    counts = Counter(train)
    words = counts.most_common(CLASSES)
    if len(words) < CLASSES:
        raise RuntimeError(f"the torch sources here have only {len(words)} distinct tokens, {CLASSES} are needed")
    number = {word: index for index, (word, _) in enumerate(words)}
    ids = [torch.tensor([number.get(word, CLASSES) for word in words]) for words in (train, held_out)]
    return Corpus(*ids, files, len(counts), (ids[1] == CLASSES).float().mean().item(), words[-1][1])


def _windows(ids: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """(contexts, next tokens) for positions; unknown words are no targets."""
    window = ids[at.unsqueeze(1) + torch.arange(CONTEXT + 1)]
    target = window[:, -1]
    return window[:, :-1], torch.where(target == CLASSES, IGNORED, target)


# ---- training ----------------------------------------------------------------------------------------------


class NextToken(nn.Module):
    """Embeddings of the last ``CONTEXT`` tokens, one hidden layer, logits over ``CLASSES`` words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES + 1, EMBEDDING)
        self.hidden = nn.Sequential(nn.Linear(CONTEXT * EMBEDDING, HIDDEN), nn.GELU(), nn.LayerNorm(HIDDEN))
        self.output = nn.Linear(HIDDEN, CLASSES)

    def forward(self, context: Tensor) -> Tensor:
        return self.output(self.hidden(self.embedding(context).flatten(1)))


@dataclass
class Setting:
    """A loss with its learning rate."""

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    learning_rate: float


SETTINGS = (
    Setting(
        "z_loss",
        lambda logits, target: pyops.z_loss(
            logits, target, a=1.0, b=10.0, ignore_index=IGNORED, inplace_backward=True
        ),
        3e-3,
    ),
    Setting(
        "cross_entropy",
        lambda logits, target: pyops.cross_entropy(logits, target, ignore_index=IGNORED, inplace_backward=True),
        3e-3,
    ),
)
RIVAL = Setting(
    "F.cross_entropy",
    lambda logits, target: F.cross_entropy(logits, target, ignore_index=IGNORED),
    SETTINGS[1].learning_rate,
)


@dataclass
class Trainer:
    """One model with its optimiser and clock."""

    setting: Setting
    steps: int
    step_seconds: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)
    curve: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(SEED)  # the same initial weights for every loss
        self.model = NextToken()
        rate = self.setting.learning_rate
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=0.01, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def _rate(self, step: int) -> float:
        """Warm-up over a twentieth, then a straight line to a twentieth."""
        warm = max(1, self.steps // 20)
        return min((step + 1) / warm, max(0.05, 1 - (step - warm) / (self.steps - warm + 1)))

    def step(self, context: Tensor, target: Tensor) -> None:
        marks = []
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(context)
        logits.register_hook(lambda _: marks.append(time.perf_counter()))  # when the loss has its gradient
        before_loss = time.perf_counter()
        loss = self.setting.loss(logits, target)
        loss.backward()
        self.optimizer.step()
        self.step_seconds.append(time.perf_counter() - start)
        self.loss_seconds.append(marks[0] - before_loss)
        self.schedule.step()

    def note(self, held_out: tuple[Tensor, Tensor]) -> None:
        scores = evaluate(self.model, *held_out)
        self.curve.append({"step": len(self.step_seconds), "seconds": sum(self.step_seconds), **scores})


@torch.no_grad()
def evaluate(model: nn.Module, context: Tensor, target: Tensor) -> dict[str, float]:
    """Ranking metrics in percent (MRR as a fraction); a tie counts against the model."""
    ranks = []
    for some, wanted in zip(context.split(1024), target.split(1024), strict=True):
        logits = model(some)
        ranks.append((logits >= logits.gather(1, wanted.unsqueeze(1))).sum(1))
    rank = torch.cat(ranks)
    top = {f"top{k}": 100 * (rank <= k).float().mean().item() for k in (1, 10, 100)}
    return {**top, "mrr": (1 / rank).mean().item()}
