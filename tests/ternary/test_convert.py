"""Conversion of whole models: which layers, what the report says, and the way back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from contract import assert_same_bits
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import pyops
from pyops.convert import Report
from pyops.nn import BitLinear, PackedBitLinear


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(functional.relu(self.up(x)))


class Model(nn.Module):
    """A small language model whose head is tied to its embedding, and which uses one block twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(11, 32)
        self.embed_projection = nn.Linear(32, 32)
        block = Block(32)
        self.blocks = nn.ModuleList([block, Block(32), block])
        self.lm_head = nn.Linear(32, 11, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, indices):
        x = self.embed_projection(self.embed_tokens(indices))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


INDICES = torch.arange(10).reshape(2, 5)
INNER = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
ALL = [*INNER, "blocks.2.up", "blocks.2.down"]


def rows(report: Report) -> dict[str, tuple[str, str]]:
    return {row.name: (row.action, row.reason) for row in report.rows}


def kinds(model: nn.Module) -> list[str]:
    names = ("Linear", "BitLinear", "PackedBitLinear")
    return [type(layer).__name__ for layer in model.modules() if type(layer).__name__ in names]


# ---- there and back --------------------------------------------------------------------------------------------


def test_convert_pack_revert():
    """Parameters stay the same objects until packed; packing keeps every bit of the outputs."""
    model = Model().eval()
    parameters, dense = dict(model.named_parameters()), model(INDICES)
    report = pyops.convert(model, BitLinear)
    assert report.model is model
    assert [name for name in report.converted] == [
        "blocks.0.up",
        "blocks.2.up",
        "blocks.0.down",
        "blocks.2.down",
        *INNER[2:],
    ]
    assert model.blocks[0] is model.blocks[2]
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    ternary = model(INDICES)
    assert not torch.equal(ternary, dense)

    reverted = copy.deepcopy(model)
    assert set(pyops.revert(reverted).converted) == set(ALL)
    assert set(kinds(reverted)) == {"Linear"}
    assert_same_bits(reverted(INDICES), dense)

    before, after = (report := pyops.pack(model)).bytes_before, report.bytes_after
    assert set(report.converted) == set(ALL)
    assert sum(kind == "PackedBitLinear" for kind in kinds(model)) == 4
    assert_same_bits(model(INDICES), ternary)
    assert before == sum(4 * (64 * 32 * 2 + 64) for _ in range(2))
    assert after < before / 6  # headers count among so few weights
    assert model.lm_head.weight is model.embed_tokens.weight

    pyops.revert(model)
    assert set(kinds(model)) == {"Linear"}
    weight = model.blocks[1].up.weight
    assert weight.unique().numel() == 3
    assert torch.equal(weight.sign(), pyops.ternary.quantize_weight(parameters["blocks.1.up.weight"])[0])
    assert model.training is False


def test_an_optimizer_goes_on():
    """Steps of an optimizer made before the conversion reach the converted layers."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pyops.convert(model, BitLinear)
    before = model.blocks[0].up.weight.clone()
    losses = []
    for _ in range(30):
        loss = functional.cross_entropy(model(INDICES).flatten(0, 1), INDICES.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(model.blocks[0].up.weight, before)


def test_straight_to_packed():
    model, twice = Model(), Model()
    pyops.convert(model, PackedBitLinear, fmt="t5", granularity="row", norm="rmsnorm")
    pyops.convert(twice, BitLinear, granularity="row", norm="rmsnorm")
    expected = twice(INDICES)
    assert_same_bits(model(INDICES), expected)
    pyops.pack(twice, "t5")
    assert_same_bits(twice(INDICES), expected)
    assert model.blocks[0].up.fmt == "t5"
    assert rows(pyops.revert(model))["blocks.0.up"] == ("converted", "its norm is gone")
    other = Model()
    other.load_state_dict(Model().state_dict())
    pyops.convert(other, PackedBitLinear, fmt="t5", granularity="row", norm="rmsnorm")
    state = {name: tensor for name, tensor in twice.state_dict().items()}
    other.load_state_dict(state)
    assert_same_bits(other(INDICES), expected)


def test_converting_again_changes_nothing():
    model = Model()
    pyops.convert(model, BitLinear)
    layers = list(model.modules())
    report = pyops.convert(model, BitLinear)
    assert report.converted == []
    assert rows(report)["blocks.0.up"] == ("skipped", "it is a BitLinear")
    assert all(one is other for one, other in zip(model.modules(), layers, strict=True))
    assert pyops.revert(Model()).rows == []
    assert pyops.pack(Model()).rows == []


@pytest.mark.parametrize("options", [{}, {"lorc_rank": 4}], ids=str)
def test_the_model_itself_is_a_layer(options):
    linear = nn.Linear(8, 4)
    report = pyops.convert(linear, BitLinear)
    assert type(report.model) is BitLinear
    assert report.model.weight is linear.weight
    assert rows(report) == {"": ("converted", "")}
    assert str(report).splitlines()[1].startswith("(the model)  converted")
    packed = pyops.pack(report.model, **options).model
    assert type(packed) is PackedBitLinear
    assert type(pyops.revert(packed).model) is nn.Linear


# ---- which layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "converted"),
    [
        ({}, ALL),
        ({"include": ("*.up",)}, [name for name in ALL if name.endswith("up")]),
        ({"include": ("up",)}, [name for name in ALL if name.endswith("up")]),
        ({"include": "blocks.1.*"}, INNER[2:]),
        ({"include": ("blocks.1.up", "down")}, ["blocks.0.down", "blocks.2.down", "blocks.1.up", "blocks.1.down"]),
        ({"exclude": "down"}, ["embed_projection", "blocks.0.up", "blocks.2.up", "blocks.1.up", "lm_head"]),
        ({"exclude": ()}, ["embed_projection", *ALL, "lm_head"]),
        ({"exclude": ("blocks.2.*", "lm_*", "embed*")}, INNER[2:]),  # the same layers as blocks.0
        ({"include": ("blocks.2.*",)}, ["blocks.0.up", "blocks.0.down", "blocks.2.up", "blocks.2.down"]),
        ({"include": ("UP",)}, []),
        ({"include": ()}, []),
    ],
    ids=str,
)
def test_patterns(patterns, converted):
    model = Model()
    report = pyops.convert(model, BitLinear, **patterns)
    assert sorted(report.converted) == sorted(converted)
    for name in ("embed_projection", *ALL, "lm_head"):
        assert (type(model.get_submodule(name)) is BitLinear) == (name in converted), name
    assert model.blocks[0] is model.blocks[2]


def test_reasons_for_skipping():
    found = rows(pyops.convert(Model(), BitLinear, include=("blocks.*",)))
    assert found["lm_head"] == ("skipped", "excluded by 'lm_head'")
    assert found["embed_projection"] == ("skipped", "excluded by 'embed*'")
    assert found["blocks.2.up"] == ("converted", "the same layer as blocks.0.up")
    assert rows(pyops.convert(Model(), BitLinear, include="lm_head"))["blocks.0.up"] == ("skipped", "not included")


def test_a_layer_registered_twice_is_converted_once():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    report = pyops.convert(model, BitLinear)
    assert model[0] is model[2]
    assert type(model[0]) is BitLinear
    assert report.bytes_before == report.bytes_after == 4 * 72
    pyops.pack(model)
    assert model[0] is model[2]
    assert type(model[0]) is PackedBitLinear


class Subclass(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(register: str) -> nn.Linear:
    layer = nn.Linear(8, 8)
    getattr(layer, register)(lambda *_: None)
    return layer


def replaced_forward() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: hooked("register_forward_hook"), "it has hooks, which would be lost"),
        (lambda: hooked("register_forward_pre_hook"), "it has hooks, which would be lost"),
        (lambda: hooked("register_full_backward_hook"), "it has hooks, which would be lost"),
        (lambda: hooked("register_full_backward_pre_hook"), "it has hooks, which would be lost"),
        (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "it has parametrizations of weight"),
        (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), "it has parametrizations of weight"),
        (lambda: Subclass(8, 8), "Subclass is a subclass of Linear, with a meaning of its own"),
        (replaced_forward, "its forward was replaced"),
        (lambda: nn.Linear(8, 8, dtype=torch.float64), "its dtype is float64"),
        (lambda: nn.Linear(8, 8, dtype=torch.complex64), "its dtype is complex64"),
    ],
    ids=[
        "hook", "pre-hook", "backward hook", "backward pre-hook", "weight norm", "spectral norm", "subclass", "forward",
        "float64", "complex64",
    ],
)  # fmt: skip
def test_refused(make, reason):
    layer = make()
    model = nn.Sequential(layer, nn.Linear(8, 8))
    report = pyops.convert(model, BitLinear)
    assert rows(report) == {"0": ("refused", reason), "1": ("converted", "")}
    assert model[0] is layer
    assert reason in str(report)


def test_refused_when_packed_or_reverted():
    model = nn.Sequential(BitLinear(8, 8), BitLinear(8, 8))
    model[0].register_forward_hook(lambda *_: None)
    assert rows(pyops.pack(model))["0"] == ("refused", "it has hooks, which would be lost")
    assert rows(pyops.revert(model)) == {"0": ("refused", "it has hooks, which would be lost"), "1": ("converted", "")}


# ---- nothing half done -----------------------------------------------------------------------------------------


def test_dry_run_changes_nothing():
    model = Model()
    layers = list(model.modules())
    for report, real in (
        (pyops.convert(model, BitLinear, dry_run=True), pyops.convert(Model(), BitLinear)),
        (
            pyops.convert(model, PackedBitLinear, dry_run=True, lorc_rank=2),
            pyops.convert(Model(), PackedBitLinear, lorc_rank=2),
        ),
    ):
        assert report.rows == real.rows
        assert all(one is other for one, other in zip(model.modules(), layers, strict=True))
    pyops.convert(model, BitLinear)
    before = kinds(model)
    assert pyops.pack(model, dry_run=True).bytes_after < pyops.revert(model, dry_run=True).bytes_after
    assert kinds(model) == before
    layer = nn.Linear(8, 4)
    assert pyops.convert(layer, BitLinear, dry_run=True).model is layer


def test_errors_leave_the_model_as_it_was():
    """A bad option, or a bad weight in the last layer: nothing is replaced, and the layer is named."""
    model = Model()
    with pytest.raises(ValueError, match=r"^layer blocks.0.up: pyops::BitLinear: norm must be"):
        pyops.convert(model, BitLinear, norm="batchnorm")
    with pytest.raises(TypeError, match="unexpected keyword argument 'fmt'"):
        pyops.convert(model, BitLinear, fmt="t2")
    assert set(kinds(model)) == {"Linear"}
    pyops.convert(model, BitLinear)
    with torch.no_grad():
        model.blocks[1].down.weight[3, 5] = float("nan")
    with pytest.raises(
        ValueError, match=r"^layer blocks.1.down: pyops::pack: weight must be finite, got nan at \[3, 5"
    ):
        pyops.pack(model)
    assert "PackedBitLinear" not in kinds(model)
    with torch.no_grad():
        model.blocks[1].down.weight[3, 5] = 0
    model.blocks[0].up.lambda_ = 0.5
    with pytest.raises(ValueError, match=r"^layer blocks.0.up: pyops::pack: lambda_ must be 1, got 0.5"):
        pyops.pack(model)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: pyops.convert(torch.zeros(2), BitLinear), TypeError, "model must be a Module, got Tensor"),
        (lambda: pyops.convert(Model(), nn.Conv2d), TypeError, "LayerClass must be a class of pyops.nn"),
        (lambda: pyops.convert(Model(), BitLinear(2, 2)), TypeError, "LayerClass must be a class"),
        (lambda: pyops.convert(Model(), BitLinear, include=(1,)), TypeError, r"include must be patterns, got \(1,\)"),
        (lambda: pyops.convert(Model(), BitLinear, norm=nn.LayerNorm(32)), ValueError, "norm must not be a Module"),
        (lambda: pyops.pack(nn.Sequential(BitLinear(2, 2)), "t3"), ValueError, "layer 0: pyops::pack: fmt must be"),
    ],
)
def test_bad_calls(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_the_report_is_a_table():
    model = nn.ModuleDict({"fc": nn.Linear(64, 32), "odd": Subclass(2, 2), "lm_head": nn.Linear(32, 10)})
    report = pyops.convert(model, BitLinear)
    lines = str(report).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["layer", "action"], ["fc", "converted"], ["odd", "refused"], ["lm_head", "skipped"], ["total", "1"],
    ]  # fmt: skip
    assert lines[-1].split()[3:] == ["9,664", "9,664"]
    assert repr(report) == "Report(1 of 3 layers converted)"
    assert report.bytes_before == sum(row.bytes_before for row in report.rows) == 8320 + 24 + 1320
    assert pickle.loads(pickle.dumps(report)).rows == report.rows


# ---- torch's own blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["encoder", "layer"])
@pytest.mark.parametrize("kind", [BitLinear, PackedBitLinear])
def test_transformer_encoders_call_the_layers(kind, whole):
    """In eval mode torch's encoders would compute with the float weights behind the back of a converted layer."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = (nn.TransformerEncoder(layer, 2) if whole else layer).eval()
    x = torch.randn(2, 6, 32)
    masks = {"src_key_padding_mask": torch.tensor([[False] * 6, [False] * 4 + [True] * 2])}
    with torch.no_grad():
        dense, padded = model(x), model(x, **masks)
        report = pyops.convert(model, kind)
        first = model.layers[0] if whole else model
        calls = []
        handle = first.linear1.register_forward_hook(lambda *_: calls.append(1))
        model(x)
        handle.remove()
        ours = model(x)
        assert calls == [1]
        assert not torch.allclose(ours, dense, atol=1e-3)
        real = ~masks["src_key_padding_mask"]
        masked = model(x, **masks)
        assert torch.allclose(masked[0], ours[0], atol=1e-6)  # its tokens are all real
        assert not torch.allclose(masked[real], padded[real], atol=1e-3)
        assert all(
            model.get_submodule(f"{name}.self_attn.out_proj").weight is not None for name in ("layers.0",) if whole
        )
        found = rows(report)
        prefix = "layers.0." if whole else ""
        reason = "nn.MultiheadAttention reads the weight without calling the layer"
        assert found[f"{prefix}self_attn.out_proj"] == ("refused", reason)
        pyops.revert(model)
        assert first.activation_relu_or_gelu == 1
        assert not any("before_conversion" in name for module in model.modules() for name in vars(module))
        if whole:
            assert model.use_nested_tensor
        if kind is BitLinear:
            assert_same_bits(model(x), dense)


def test_meta_models():
    with torch.device("meta"):
        model = Model()
    pyops.convert(model, BitLinear)
    pyops.pack(model)
    assert all(parameter.is_meta for parameter in (*model.parameters(), *model.buffers()))
    source = Model()
    pyops.convert(source, PackedBitLinear)
    model.load_state_dict(source.state_dict(), assign=True)
    assert_same_bits(model(INDICES), source(INDICES))
