"""Published checkpoints into a model, and the command line that shows, verifies and converts files of weights."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pyops
from pyops import FormatError, _gguf
from pyops.cli.main import main
from pyops.nn import BitLinear, PackedBitLinear
from pyops.ternary import from_gguf_blocks, load_hf_checkpoint, pack, to_hf, unpack

WIDTH, INNER, WORDS = 16, 24, 30


class Block(nn.Module):
    def __init__(self, linear=nn.Linear) -> None:
        super().__init__()
        self.up, self.down = linear(WIDTH, INNER), linear(INNER, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """As models are: embedding and head tied, blocks, a head that stays dense, a buffer."""

    def __init__(self, linear=nn.Linear) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(linear), Block(linear)])
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


LAYERS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")]


def published(linear_class: str = "autobitlinear", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of a checkpoint; embed and lm_head are tied, so one of them is stored."""
    torch.manual_seed(7)
    source = Model()
    found = {name: tensor.to(dtype) for name, tensor in source.state_dict().items() if name != "lm_head.weight"}
    found["steps"] = torch.tensor([5, 6, 7])
    for name in LAYERS:
        weight = found.pop(f"{name}.weight")
        T = torch.randint(-1, 2, weight.shape, dtype=torch.int8)
        found[f"{name}.weight"], scale, _ = to_hf(
            pack(T), torch.tensor(0.3), linear_class, in_features=weight.shape[1]
        )  # fmt: skip
        found[f"{name}.weight_scale"] = scale.to(dtype)
    return found


def write(folder: Path, tensors: dict[str, Tensor], shards: int = 1, **config) -> Path:
    folder.mkdir(exist_ok=True)
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline", **config}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def snapshot(model: nn.Module) -> tuple:
    return (
        [(name, type(module), id(module)) for name, module in model.named_modules()],
        {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()},
    )


def same(before: tuple, after: tuple) -> bool:
    (modules, tensors), (modules_after, tensors_after) = before, after
    return modules == modules_after and tensors.keys() == tensors_after.keys() and all(
        tensors[name][0] == tensors_after[name][0] and torch.equal(tensors[name][1], tensors_after[name][1])
        for name in tensors
    )  # fmt: skip


def expected_output(tensors: dict[str, Tensor], words: Tensor, linear_class: str) -> Tensor:
    """The published layers in float64, but for the rounding of activations, which is part of the definition."""

    def linear(name: str, x: Tensor) -> Tensor:
        T = (torch.cat([(tensors[f"{name}.weight"] >> shift) & 3 for shift in (0, 2, 4, 6)]).double()) - 1
        T, scale = T[: {"up": INNER, "down": WIDTH}[name[9:]]], tensors[f"{name}.weight_scale"].double()
        bias = tensors.get(f"{name}.bias", torch.zeros(1)).double()
        x = x.float()
        s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        q = (x * s).round().clamp(-128, 127).double()
        if linear_class == "autobitlinear":
            return ((q / s.double()) @ T.T + bias) * scale
        return (q @ T.T) / (s.double() * scale) + bias

    x = tensors["embed.weight"].double()[words]
    for i in (0, 1):
        parts = (tensors[f"blocks.{i}.norm.{part}"].double() for part in ("weight", "bias"))
        normed = nn.functional.layer_norm(x, (WIDTH,), *parts)
        x = x + linear(f"blocks.{i}.down", linear(f"blocks.{i}.up", normed).relu())
    return x @ tensors["embed.weight"].double().T


# ---- loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_loads_and_computes_what_was_published(linear_class, shards, tmp_path):
    tensors = published(linear_class)
    model = Model()
    head, steps = model.lm_head, model.steps
    loaded = load_hf_checkpoint(model, write(tmp_path, tensors, shards, linear_class=linear_class))
    assert sorted(loaded.packed) == sorted(LAYERS)
    assert sorted(loaded.copied) == sorted(
        ["embed.weight", "steps", *(f"blocks.{i}.norm.{part}" for i in (0, 1) for part in ("weight", "bias"))]
    )
    assert loaded.missing == loaded.unexpected == []
    assert [type(module) for block in model.blocks for module in (block.up, block.down)] == [PackedBitLinear] * 4
    assert model.lm_head is head
    assert model.lm_head.weight is model.embed.weight
    assert model.steps is steps
    assert steps.tolist() == [5, 6, 7]
    words = torch.arange(WORDS)
    expected = expected_output(tensors, words, linear_class)
    # float32 moves an activation across a rounding step now and then; another scale or order of weights moves all.
    error = (model(words).double() - expected).abs()
    assert error.mean() < 1e-4 * expected.abs().mean()


def test_other_linear_class_is_another_model(tmp_path):
    """The argument comes before the configuration; the published default is bitlinear."""
    folder = write(tmp_path, published())
    gammas = {}
    for asked in (None, "autobitlinear", "bitlinear"):
        model = Model()
        load_hf_checkpoint(model, folder, asked)
        gammas[asked] = model.blocks[0].up.weight_gamma.item()
    assert gammas[None] == gammas["autobitlinear"] == torch.tensor(0.3).item()
    assert gammas["bitlinear"] == (1 / torch.tensor(0.3)).item()
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitnet"}}))
    model = Model()
    load_hf_checkpoint(model, folder)
    assert model.blocks[0].up.weight_gamma.item() == gammas["bitlinear"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_the_model(dtype, tmp_path):
    """A bfloat16 scale is used as it is; a bias is scaled before it is rounded."""
    tensors = published(dtype=torch.bfloat16)
    model = Model().to(dtype)
    load_hf_checkpoint(model, write(tmp_path, tensors))
    up = model.blocks[1].up
    scale = tensors["blocks.1.up.weight_scale"].float()
    assert up.weight_gamma.dtype == torch.float32
    assert up.weight_gamma.item() == scale.item()
    assert torch.equal(up.bias, (tensors["blocks.1.up.bias"].float() * scale).to(dtype))
    assert model.embed.weight.dtype == model.blocks[0].down(torch.ones(1, INNER, dtype=dtype)).dtype == dtype


def test_a_model_on_the_meta_device_is_filled(tmp_path):
    tensors = published()
    with torch.device("meta"):
        model = Model()
    model.lm_head.weight.requires_grad_(False)
    load_hf_checkpoint(model, write(tmp_path, tensors))
    assert model.lm_head.weight is model.embed.weight
    assert not model.embed.weight.requires_grad
    there = Model()
    load_hf_checkpoint(there, tmp_path)
    words = torch.arange(WORDS)
    assert torch.equal(model(words), there(words))


def test_layers_of_ours_keep_how_they_treat_activations(tmp_path):
    """norm, qmax, eps, act_bits of a BitLinear and of a PackedBitLinear; and loading twice is loading once."""

    def made(columns, rows, bias=True):
        return BitLinear(columns, rows, bias, qmax=128, eps=1e-3, norm=nn.RMSNorm(columns), act_bits=None)

    tensors = published()
    model = Model(made)
    names = {name for name in model.state_dict() if ".norm." in name and ("up" in name or "down" in name)}
    tensors |= {name: torch.rand(model.state_dict()[name].shape) for name in names}
    folder = write(tmp_path, tensors)
    for _ in range(2):
        norm = model.blocks[0].up.norm
        load_hf_checkpoint(model.eval(), folder)
        up = model.blocks[0].up
        assert type(up) is PackedBitLinear
        assert (up.qmax, up.eps, up.act, up.training) == (128, 1e-3, None, False)
        assert up.norm is norm
        assert torch.equal(up.norm.weight, tensors["blocks.0.up.norm.weight"])


def test_published_norms(tmp_path):
    """use_rms_norm: every packed layer has a norm of its own in front, named rms_norm in the files."""
    tensors, widths = published(), {"up": WIDTH, "down": INNER}
    tensors |= {f"{name}.rms_norm.weight": torch.rand(widths[name[9:]]) for name in LAYERS}
    folder = write(tmp_path, tensors, use_rms_norm=True, rms_norm_eps=1e-2)
    model, plain = Model(), Model()
    load_hf_checkpoint(model, folder)
    load_hf_checkpoint(plain, write(tmp_path / "plain", published()))
    x, weight = torch.randn(3, WIDTH), tensors["blocks.0.up.rms_norm.weight"]
    normed = nn.functional.rms_norm(x, (WIDTH,), weight, eps=1e-2)
    assert torch.equal(model.blocks[0].up(x), plain.blocks[0].up(normed))
    del tensors["blocks.1.down.rms_norm.weight"]
    with pytest.raises(FormatError, match=r"lack blocks\.1\.down\.rms_norm\.weight"):
        load_hf_checkpoint(Model(), write(tmp_path, tensors, use_rms_norm=True))
    with pytest.raises(FormatError, match=r"rms_norm_eps must be in \[0, 1\), got '1'"):
        load_hf_checkpoint(Model(), write(tmp_path, tensors, use_rms_norm=True, rms_norm_eps="1"))


def test_rows_that_are_no_multiple_of_four(tmp_path):
    T = torch.randint(-1, 2, (6, 5), dtype=torch.int8)
    weight, scale, _ = to_hf(pack(T), torch.tensor(0.5), "autobitlinear", in_features=5)
    folder = write(tmp_path, {"fc.weight": weight, "fc.weight_scale": scale})
    model = nn.ModuleDict({"fc": nn.Linear(5, 6, bias=False)})
    load_hf_checkpoint(model, folder)
    assert torch.equal(unpack(model["fc"].weight_packed, "t2", 5), T)


def test_one_layer_in_two_places(tmp_path):
    """As two blocks that share a layer: one packed layer stands in both, and is stored once or twice."""
    for stored in (["0.up"], ["0.up", "1.up"]):
        T = torch.randint(-1, 2, (8, 4), dtype=torch.int8)
        weight, scale, _ = to_hf(pack(T), torch.tensor(0.5), "autobitlinear", in_features=4)
        tensors = {f"{name}.weight": weight.clone() for name in stored}
        tensors |= {f"{name}.weight_scale": scale.clone() for name in stored}
        shared = nn.Linear(4, 8, bias=False)
        model = nn.Sequential(nn.ModuleDict({"up": shared}), nn.ModuleDict({"up": shared}))
        load_hf_checkpoint(model, write(tmp_path, tensors))
        assert type(model[0]["up"]) is PackedBitLinear
        assert model[0]["up"] is model[1]["up"]


def test_online_checkpoints_need_layers_that_quantize(tmp_path):
    """Their weights are floats, quantized in every call."""
    source = Model(BitLinear)
    tensors = {name: tensor.clone() for name, tensor in source.state_dict().items() if name != "lm_head.weight"}
    folder = write(tmp_path, tensors, quantization_mode="online")
    plain = Model()
    before = snapshot(plain)
    with pytest.raises(ValueError, match=r"model must have BitLinear layers .* 'online', got none: pyops\.convert"):
        load_hf_checkpoint(plain, folder)
    assert same(before, snapshot(plain))
    model = Model(BitLinear)
    assert load_hf_checkpoint(model, folder).packed == []
    words = torch.arange(WORDS)
    assert torch.equal(model(words), source(words))


def test_not_strict_reports_what_does_not_match(tmp_path):
    tensors = published()
    del tensors["blocks.0.norm.weight"], tensors["blocks.1.up.bias"]
    tensors["other.weight"], tensors["blocks.0.down.bias"] = torch.ones(3), torch.ones(WIDTH)
    folder = write(tmp_path, tensors)
    model = Model()
    before, own_bias, own_norm = snapshot(model), model.blocks[1].up.bias.detach().clone(), model.blocks[0].norm.weight
    with pytest.raises(FormatError, match=r"the files lack blocks.0.norm.weight, blocks.1.up.bias$"):
        load_hf_checkpoint(model, folder)
    assert same(before, snapshot(model))
    loaded = load_hf_checkpoint(model, folder, strict=False)
    assert sorted(loaded.missing) == ["blocks.0.norm.weight", "blocks.1.up.bias"]
    assert sorted(loaded.unexpected) == ["blocks.0.down.bias", "other.weight"]
    assert torch.equal(model.blocks[1].up.bias, own_bias)
    assert model.blocks[0].norm.weight is own_norm
    assert model.blocks[0].down.bias is None


# ---- what is refused, and changes nothing ------------------------------------------------------------------------


def change_tensor(name: str, change) -> object:
    return lambda folder, tensors: write(folder, {**tensors, name: change(tensors[name])})


def without(name: str) -> object:
    return lambda folder, tensors: write(folder, {k: v for k, v in tensors.items() if k != name})


def change_config(**config) -> object:
    return lambda folder, tensors: write(folder, tensors, **config)


def change_bytes(name: str, change) -> object:
    def run(folder: Path, tensors: dict) -> None:
        write(folder, tensors)
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return run


def index(weight_map: object) -> object:
    def run(folder: Path, tensors: dict) -> None:
        write(folder, tensors, shards=2)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return run


def remove(name: str) -> object:
    def run(folder: Path, tensors: dict) -> None:
        write(folder, tensors)
        (folder / name).unlink()

    return run


UP = "blocks.0.up.weight"
BAD_FOLDERS = {
    "code 3": (change_tensor(UP, lambda t: t | 3), r"blocks.0.up: pyops::from_hf: packed must hold the codes 0, 1 and"),
    "scale 0": (change_tensor(UP + "_scale", lambda t: t * 0), "blocks.0.up: .* weight_scale must be positive and fin"),
    "scale nan": (change_tensor(UP + "_scale", lambda t: t * float("nan")), "weight_scale must be .* got nan"),
    "scales": (change_tensor(UP + "_scale", lambda t: t.expand(4).clone()), "weight_scale must be one number"),
    "no scale": (without(UP + "_scale"), "blocks.0.up.weight_scale: must be there for the packed blocks.0.up.weight"),
    "packed shape": (
        change_tensor(UP, lambda t: t[:-1].clone()),
        r"must have shape \[6, 16\] for 24 x 16 weights, got",
    ),
    "bias shape": (change_tensor("blocks.0.up.bias", lambda t: t[:-1].clone()), r"bias must have shape \[24\], got"),
    "shape": (
        change_tensor("embed.weight", lambda t: t[:-1].clone()),
        r"embed.weight: must have shape \[30, 16\], got",
    ),
    "kind": (change_tensor("steps", lambda t: t.float()), "steps: must be convertible to int64, got F32"),
    "missing": (without("blocks.1.norm.bias"), "the files lack blocks.1.norm.bias"),
    "missing layer": (without("blocks.1.down.weight"), "the files lack blocks.1.down.weight"),
    "method": (change_config(quant_method="gptq"), "quant_method must be one of bitnet, got 'gptq'"),
    "class": (
        change_config(linear_class="linear"),
        "linear_class must be one of autobitlinear, bitlinear, got 'linear'",
    ),
    "class kind": (change_config(linear_class=["bitlinear"]), "linear_class must be one of"),
    "mode": (change_config(quantization_mode="both"), "quantization_mode must be one of offline, online, got 'both'"),
    "no configuration": (remove("config.json"), "config.json: must be a file that can be read, got: No such file"),
    "not quantized": (change_bytes("config.json", lambda b: b"{}"), "quantization_config must be an object, got None"),
    "not JSON": (change_bytes("config.json", lambda b: b[:-1]), "config.json: must be JSON, got"),
    "JSON list": (change_bytes("config.json", lambda b: b"[]"), "config.json: must be a JSON object, got list"),
    "JSON nested": (change_bytes("config.json", lambda b: b"[" * 200_000), "config.json: must be JSON, got"),
    "no weights": (remove("model.safetensors"), "must hold model.safetensors or model.safetensors.index.json, got nei"),
    "truncated": (change_bytes("model.safetensors", lambda b: b[:-1]), "model.safetensors: must be a safetensors file"),
    "longer": (change_bytes("model.safetensors", lambda b: b + b"0"), "must be a safetensors file, got: "),
    "empty": (change_bytes("model.safetensors", lambda b: b""), "must be a safetensors file, got: "),
    "no map": (index(None), "weight_map must give a file name for each tensor"),
    "map of lists": (index({"embed.weight": ["model.safetensors"]}), "weight_map must give a file name"),
    "no shard": (index({"embed.weight": "model-00009-of-00009.safetensors"}), "must be a file, got nothing"),
    "not in shard": (index({"x": "model-00001-of-00002.safetensors"}), "must hold 'x', as model.safetensors.index"),
}


@pytest.mark.row("R13", "R40")
@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_checkpoints_are_refused_and_change_nothing(case, tmp_path):
    spoil, text = BAD_FOLDERS[case]
    spoil(tmp_path, published())
    model = Model()
    before = snapshot(model)
    with pytest.raises(FormatError, match=text):
        load_hf_checkpoint(model, tmp_path)
    assert same(before, snapshot(model))


@pytest.mark.row("R42")
@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "sub/model.safetensors", "..", "",
     ".hidden.safetensors", "..\\outside.safetensors", "model.bin", "outside.safetensors\0.bin", "C:x.safetensors"],
)  # fmt: skip
def test_an_index_leads_nowhere_else(name, tmp_path):
    save_file(published(), tmp_path / "outside.safetensors")
    folder = tmp_path / "folder"
    write(folder, published(), shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"embed.weight": name}}))
    with pytest.raises(FormatError, match=r"'embed.weight' must lie in a \.safetensors file of the folder, got "):
        load_hf_checkpoint(Model(), folder)


def safetensors_bytes(header: dict | bytes, size: int | None = None, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(shape: list, begin: int, end: int, dtype: str = "U8") -> dict:
    return {UP: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


HUGE = {
    "header": safetensors_bytes(b"{}", 1 << 62),
    "header of 2^64": safetensors_bytes(b"{}", (1 << 64) - 1),
    "data": safetensors_bytes(entry([1 << 62], 0, 1 << 62)),
    "product": safetensors_bytes(entry([1 << 32, 1 << 32], 0, 0)),
    "product of F32": safetensors_bytes(entry([1 << 62], 0, 0, "F32")),
    "more than there is": safetensors_bytes(entry([1 << 40], 0, 1 << 40), data=b"0" * 64),
    "backwards": safetensors_bytes(entry([4], 8, 4), data=b"0" * 8),
    "no sizes": safetensors_bytes({UP: {}}),
}


def limited(command: list, megabytes: int = 4096) -> subprocess.CompletedProcess:
    """A process that dies if it asks for more memory than torch itself needs."""
    limit = f'ulimit -v {megabytes << 10}; exec "$@"'
    return subprocess.run(
        ["bash", "-c", limit, "-", *map(str, command)], capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip


@pytest.mark.row("R42")
@pytest.mark.parametrize("case", HUGE)
def test_huge_declared_sizes_are_refused(case, tmp_path):
    write(tmp_path, published())
    (tmp_path / "model.safetensors").write_bytes(HUGE[case])
    with pytest.raises(FormatError, match=r"model\.safetensors: must be a safetensors file, got: "):
        load_hf_checkpoint(Model(), tmp_path)


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.row("R41")
@pytest.mark.parametrize("where", ["pytorch_model.bin", "model.safetensors", "config.json", "shard", "header"])
def test_malicious_pickles_are_refused_and_not_run(where, tmp_path, capsys):
    mark, folder = tmp_path / "ran", tmp_path / "folder"
    data = pickle.dumps(Malicious(mark))
    write(folder, published(), shards=2 if where == "shard" else 1)
    file = {"shard": "model-00001-of-00002.safetensors"}.get(where, where)
    if where == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save({"embed.weight": Malicious(mark)}, folder / file)
    elif where == "header":
        state = nn.Sequential(BitLinear(4, 4)).eval()
        pyops.pack(state)
        bad = {**state.state_dict(), "0.weight_header": torch.tensor(list(data), dtype=torch.uint8)}
        with pytest.raises(FormatError, match="0: header must be JSON"):
            state.load_state_dict(bad)
        save_file(bad, folder / "model.safetensors")
    else:
        (folder / file).write_bytes(data)
    with pytest.raises(
        FormatError, match="pickle files are never read" if where == "pytorch_model.bin" else "must be|lack|have"
    ):
        load_hf_checkpoint(Model(), folder)
    path = folder / ("model.safetensors" if where == "header" else file)
    assert main(["ckpt", "verify", str(path)]) == 1
    assert not mark.exists()
    assert capsys.readouterr().err.startswith("pyops ckpt: ")
    pickle.loads(data)  # the pickle does what it should not
    assert mark.exists()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda model: (None, {}), TypeError, "model must be a Module, got NoneType"),
        (lambda model: (model, {"linear_class": "linear"}), ValueError, "linear_class must be one of"),
        (lambda model: (model, {"strict": "yes"}), ValueError, "strict must be one of"),
        (lambda model: (hooked(model), {}), ValueError, "layer blocks.0.up cannot be replaced .*: it has hooks"),
        (lambda model: (swapped(model), {}), FormatError, "blocks.0.up: must be a linear layer inside the model, got"),
    ],
)
def test_bad_arguments(change, error, text, tmp_path):
    folder = write(tmp_path, published())
    model, options = change(Model())
    with pytest.raises(error, match=text):
        load_hf_checkpoint(model, folder, **options)


def hooked(model: Model) -> Model:
    model.blocks[0].up.register_forward_hook(lambda *args: None)
    return model


def swapped(model: Model) -> Model:
    model.blocks[0].up = nn.Conv1d(WIDTH, INNER, 1)
    return model


def test_a_model_that_is_the_layer_itself(tmp_path):
    folder = write(tmp_path, {"weight": torch.zeros(1, 2, dtype=torch.uint8), "weight_scale": torch.ones(1)})
    with pytest.raises(FormatError, match="weight: must be inside a module that holds it, got Linear"):
        load_hf_checkpoint(nn.Linear(2, 4), folder)


def test_without_the_package_safetensors(monkeypatch, tmp_path):
    write(tmp_path, published())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"need the package safetensors: pip install 'pyops-kernels\[formats\]'"):
        load_hf_checkpoint(Model(), tmp_path)


# ---- GGUF --------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, quantized: str = "TQ2_0") -> dict[str, numpy.ndarray]:
    """By the package gguf: a layer with rows of different scales, its bias, a dense tensor; the values it holds."""
    T = torch.randint(-1, 2, (4, 512)).float() * torch.tensor([[0.5], [1.0], [2.0], [0.25]])
    values = {"blk.0.up.weight": T.numpy(), "blk.0.up.bias": numpy.arange(4, dtype=numpy.float32)}
    values["norm.weight"] = numpy.linspace(0, 1, 6, dtype=numpy.float16).reshape(2, 3)
    kind = gguf.GGMLQuantizationType[quantized]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["one", "two", "three"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_bool("flag", True)
    writer.add_custom_alignment(64)
    writer.add_tensor("blk.0.up.weight", gguf.quants.quantize(values["blk.0.up.weight"], kind), raw_dtype=kind)
    writer.add_tensor("blk.0.up.bias", values["blk.0.up.bias"])
    writer.add_tensor("norm.weight", values["norm.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("quantized", ["TQ1_0", "TQ2_0", "Q8_0"])
def test_gguf_index_is_that_of_the_package_gguf(quantized, tmp_path):
    write_gguf(tmp_path / "a.gguf", quantized)
    theirs = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    ours = _gguf.read_index(tmp_path / "a.gguf")
    assert [(t.name, t.type, t.offset, t.bytes) for t in ours] == [
        (t.name, t.tensor_type.name, t.data_offset, t.n_bytes) for t in theirs
    ]
    assert [list(t.shape) for t in ours] == [t.shape.tolist()[::-1] for t in theirs]
    for own, other in zip(ours, theirs, strict=True):
        assert bytes(_gguf.read_bytes(tmp_path / "a.gguf", own).tolist()) == other.data.tobytes()


def test_gguf_types_are_those_of_the_package_gguf():
    for number, (name, *sizes) in _gguf.TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, tuple(sizes)) == (name, gguf.GGML_QUANT_SIZES[kind])


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_bytes(
    *,
    version: int = 3,
    tensors: int | None = None,
    fields: int | None = None,
    metadata: list[bytes] = [],  # noqa: B006
    table: list[bytes] = [],  # noqa: B006
    data: bytes = b"",
) -> bytes:
    counts = len(table) if tensors is None else tensors, len(metadata) if fields is None else fields
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(metadata) + b"".join(table)
    return head + bytes(-len(head) % 32) + data


def in_table(sizes: list[int], kind: int = 35, offset: int = 0, name: str = "fc.weight") -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


BLOCK = bytes(64) + struct.pack("<e", 1.0)
BAD_GGUF = {
    "version": (gguf_bytes(version=1), "the version must be 2 or 3"),
    "big endian": (gguf_bytes(version=0x03000000), "the version must be 2 or 3"),
    "fields": (gguf_bytes(fields=1 << 62), r"the number of fields must fit into the file, got 4611686018427387904"),
    "tensors": (gguf_bytes(tensors=1 << 62), "the number of tensors must fit into the file"),
    "key": (gguf_bytes(metadata=[struct.pack("<QQ", 1 << 62, 0)]), "the file must go on for 4611686018427387904 bytes"),
    "key encoding": (gguf_bytes(metadata=[struct.pack("<Q", 2) + b"\xff\xff" + bytes(8)]), "text must be UTF-8"),
    "string": (gguf_bytes(metadata=[text("a") + struct.pack("<IQ", 8, 1 << 62)]), "the file must go on for"),
    "array": (gguf_bytes(metadata=[text("a") + struct.pack("<IIQ", 9, 4, 1 << 62)]), "the file must go on for"),
    "strings": (
        gguf_bytes(metadata=[text("a") + struct.pack("<IIQ", 9, 8, 1 << 62)]),
        "the number of strings must fit",
    ),
    "arrays": (gguf_bytes(metadata=[text("a") + struct.pack("<IIQ", 9, 9, 1 << 62)]), "the number of arrays must fit"),
    "nesting": (
        gguf_bytes(metadata=[text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 2000]),
        "a metadata value must be of a known type, got 9",
    ),
    "value": (gguf_bytes(metadata=[text("a") + struct.pack("<IQ", 13, 0)]), "of a known type, got 13"),
    "alignment 0": (gguf_bytes(metadata=[text("general.alignment") + struct.pack("<II", 4, 0)]), "power of two, got 0"),
    "alignment": (gguf_bytes(metadata=[text("general.alignment") + struct.pack("<II", 4, 33)]), "power of two, got 33"),
    "dimensions": (gguf_bytes(table=[in_table([256] * 5)]), "fc.weight must have at most 4 dimensions, got 5"),
    "sizes": (gguf_bytes(table=[in_table([1 << 62, 1 << 62])], data=BLOCK), "fc.weight must begin at a multiple of 32"),
    "size": (gguf_bytes(table=[in_table([256, 2])], data=BLOCK), "and end before byte 162, got 96 to 228"),
    "offset": (
        gguf_bytes(table=[in_table([256, 1], offset=1 << 63)], data=BLOCK),
        "must begin at a multiple of 32 and",
    ),
    "not aligned": (gguf_bytes(table=[in_table([256, 1], offset=1)], data=BLOCK + b"0"), "must begin at a multiple of"),
    "columns": (gguf_bytes(table=[in_table([255, 1])], data=BLOCK), "a multiple of 256 columns in TQ2_0, got 255"),
    "twice": (gguf_bytes(table=[in_table([256, 1])] * 2, data=BLOCK), "names must differ, got fc.weight twice"),
    "truncated": (gguf_bytes(table=[in_table([256, 1])])[:70], "the file must go on for"),
    "code 3": (gguf_bytes(table=[in_table([256, 1])], data=b"\xff" + BLOCK[1:]), "fc.weight: .* got 3 at byte 0"),
    "scale": (gguf_bytes(table=[in_table([256, 1])], data=BLOCK[:-1] + b"\x7f"), "fc.weight: .* got nan at byte 64"),
    "three dimensions": (gguf_bytes(table=[in_table([256, 1, 1])], data=BLOCK), "fc.weight: must have two dimensions"),
}


@pytest.mark.row("R13", "R42")
@pytest.mark.parametrize("case", BAD_GGUF)
def test_bad_gguf_files_are_refused(case, tmp_path, capsys):
    data, message = BAD_GGUF[case]
    (tmp_path / "a.gguf").write_bytes(data)
    for verb in ("verify", "show"):
        assert main(["ckpt", verb, str(tmp_path / "a.gguf")]) == 1
        said = capsys.readouterr().err
        assert said.startswith("pyops ckpt: ")
        assert re.search(message, said), said


# ---- the command line --------------------------------------------------------------------------------------------


def ckpt(*arguments: object) -> int:
    return main(["ckpt", *map(str, arguments)])


def rows_of(capsys, path: Path) -> dict[str, dict]:
    capsys.readouterr()
    assert ckpt("show", path, "--json") == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize("fmt", ["t2", "t5"])
@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_published_to_packed_and_back(linear_class, fmt, tmp_path, capsys):
    """From a folder whose configuration says the class; the state loads into packed layers; and back to the bytes."""
    tensors = published(linear_class)
    folder = write(tmp_path / "folder", tensors, 2, linear_class=linear_class)
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    assert ckpt("convert", folder, ours, "--fmt", fmt) == 0
    assert capsys.readouterr().out == f"{ours}: 4 weights as packed, {len(load_file(ours))} tensors\n"
    assert ckpt("verify", ours) == 0
    assert capsys.readouterr().out == f"{ours}: {len(load_file(ours))} tensors, 4 packed weights verified\n"
    model, same_model = Model(), Model()
    load_hf_checkpoint(model, folder)
    pyops.pack(pyops.convert(same_model, BitLinear).model, fmt)
    missing = same_model.load_state_dict(load_file(ours), strict=False).missing_keys
    assert missing == ["lm_head.weight"]
    words = torch.arange(WORDS)
    assert torch.equal(model(words), same_model(words))
    rows = rows_of(capsys, ours)
    assert rows["blocks.0.up"]["format"] == fmt
    assert rows["blocks.0.up"]["shape"] == [INNER, WIDTH]
    assert rows["embed.weight"] == {
        "name": "embed.weight", "format": "F32", "shape": [WORDS, WIDTH], "granularity": "", "bytes": 4 * WORDS * WIDTH,
    }  # fmt: skip
    assert ckpt("convert", ours, back, "--linear-class", linear_class) == 0
    again = load_file(back)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if name.endswith(".bias") and "norm" not in name:  # scaled and divided in float32
            assert torch.allclose(again[name], tensor, rtol=2**-22, atol=0)
        else:
            assert torch.equal(again[name], tensor), name
    assert rows_of(capsys, back)["blocks.0.up"]["format"] == "bitnet"
    assert ckpt("verify", back, "--json") == 0
    assert sorted(json.loads(capsys.readouterr().out)["verified"]) == sorted(LAYERS)


@pytest.mark.parametrize("quantized", ["TQ1_0", "TQ2_0"])
def test_gguf_to_packed(quantized, tmp_path, capsys):
    source, target = tmp_path / "a.gguf", tmp_path / "a.safetensors"
    values = write_gguf(source, quantized)
    shown = rows_of(capsys, source)
    assert shown["blk.0.up.weight"] == {
        "name": "blk.0.up.weight", "format": quantized, "shape": [4, 512], "granularity": "row",
        "bytes": 8 * {"TQ1_0": 54, "TQ2_0": 66}[quantized],
    }  # fmt: skip
    assert shown["norm.weight"]["format"] == "F16"
    assert ckpt("verify", source) == 0
    assert ckpt("convert", source, target) == 0
    state = load_file(target)
    assert numpy.array_equal(state.pop("norm.weight").numpy(), values["norm.weight"])
    layer = PackedBitLinear(512, 4, granularity="row")
    layer.load_state_dict({name.removeprefix("blk.0.up."): tensor for name, tensor in state.items()})
    assert numpy.array_equal(layer.to_linear().weight.detach().numpy(), values["blk.0.up.weight"])
    assert numpy.array_equal(layer.bias.numpy(), values["blk.0.up.bias"])
    raw = _gguf.read_bytes(source, _gguf.read_index(source)[0])
    assert torch.equal(layer.weight_packed, from_gguf_blocks(raw, 4, 512, quantized)[0])


def test_gguf_with_other_types(tmp_path, capsys):
    source, target = tmp_path / "a.gguf", tmp_path / "a.safetensors"
    source.write_bytes(
        gguf_bytes(table=[in_table([256, 1]), in_table([32], 8, 96, "out"), in_table([8], 36, 96, "i2s")],
                   data=BLOCK + bytes(30 + 34))
    )  # fmt: skip
    assert rows_of(capsys, source)["i2s"]["format"] == "type 36"
    assert ckpt("convert", source, target) == 1
    assert "out: must be of a type that torch has, got Q8_0 (--skip-others leaves it out)" in capsys.readouterr().err
    assert not target.exists()
    assert ckpt("convert", source, target, "--skip-others") == 0
    assert sorted(load_file(target)) == ["fc.weight_gamma", "fc.weight_header", "fc.weight_packed"]


def test_show_prints_a_table(tmp_path, capsys):
    write_gguf(tmp_path / "a.gguf")
    assert ckpt("show", tmp_path / "a.gguf") == 0
    assert capsys.readouterr().out.splitlines() == [
        "tensor           format  shape  scale per  bytes",
        "blk.0.up.weight  TQ2_0   4x512  row          528",
        "blk.0.up.bias    F32     4                    16",
        "norm.weight      F16     2x3                  12",
        "3 entries, 556 bytes",
    ]


def packed_file(path: Path, change=lambda state: state) -> Path:
    torch.manual_seed(3)
    model = nn.Sequential(BitLinear(8, 4), nn.ReLU(), BitLinear(4, 4, bias=False))
    pyops.pack(model)
    save_file(change(model.state_dict()), path)
    return path


def test_one_layer_without_a_name(tmp_path, capsys):
    layer = BitLinear(8, 4).pack()
    save_file(layer.state_dict(), tmp_path / "a.safetensors")
    assert rows_of(capsys, tmp_path / "a.safetensors")[""]["shape"] == [4, 8]
    assert ckpt("verify", tmp_path / "a.safetensors") == 0
    assert ckpt("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--linear-class", "bitlinear") == 0
    assert sorted(load_file(tmp_path / "b.safetensors")) == ["bias", "weight", "weight_scale"]


BAD_STATES = {
    "bit": (lambda s: {**s, "0.weight_packed": s["0.weight_packed"] ^ 1}, "0: weight_packed must have the checksum"),
    "swapped": (lambda s: {**s, "0.weight_gamma": s["2.weight_gamma"]}, "0: weight_gamma must have the checksum"),
    "no bias": (lambda s: {k: v for k, v in s.items() if k != "0.bias"}, "0: keys must be"),
    "no weights": (lambda s: {k: v for k, v in s.items() if k != "2.weight_packed"}, "2: weight_packed must be there"),
    "shape": (lambda s: {**s, "0.weight_packed": s["0.weight_packed"].view(2, 4)}, r"must have shape \[4, 2\]"),
}


@pytest.mark.row("R40")
@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states_are_refused_by_verify_and_convert(case, tmp_path, capsys):
    change, message = BAD_STATES[case]
    target = tmp_path / "b.safetensors"

    def spoiled(state: dict) -> dict:
        return {name: tensor.clone() for name, tensor in change(state).items()}

    path = packed_file(tmp_path / "a.safetensors", spoiled)
    for arguments in (["verify", path], ["convert", path, target, "--linear-class", "bitlinear"]):
        assert ckpt(*arguments) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("pyops ckpt: ")
        assert re.search(message, said.err), said.err
    assert not target.exists()


def test_usage(tmp_path, capsys):
    """Status 2, nothing written; a file that is there is replaced only when asked for."""
    folder = write(tmp_path / "folder", published())
    single, target = folder / "model.safetensors", tmp_path / "b.safetensors"
    packed = packed_file(tmp_path / "a.safetensors")
    for arguments in ([single, target], [packed, target]):
        assert ckpt("convert", *arguments) == 2
        assert "pyops ckpt convert: --linear-class must be given" in capsys.readouterr().err
    assert ckpt("convert", single, packed, "--linear-class", "bitlinear") == 2
    assert "is there already; --force replaces it" in capsys.readouterr().err
    assert not target.exists()
    assert ckpt("convert", single, packed, "--linear-class", "bitlinear", "--force") == 0
    assert "blocks.0.up.weight_header" in load_file(packed)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    for arguments in ([], ["show"], ["convert", single], ["show", single, "--linear-class", "x"], ["delete", single]):
        with pytest.raises(SystemExit) as caught:
            ckpt(*arguments)
        assert caught.value.code == 2


@pytest.mark.row("R42")
def test_files_that_are_not_what_they_should_be(tmp_path, capsys):
    """Status 1 and a sentence: no file, an empty one, a folder without weights, a zip that would be a gigabyte."""
    (tmp_path / "empty").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("data.pkl", bytes(1 << 24))
    cases = {
        tmp_path / "none": "No such file",
        tmp_path / "empty": "must be a safetensors file",
        tmp_path: "must hold model.safetensors",
        tmp_path / "bomb.pt": "got a pickle or zip: these are never read",
    }
    for path, message in cases.items():
        for verb in ("show", "verify"):
            assert ckpt(verb, path) == 1
            said = capsys.readouterr()
            assert message in said.err
            assert "Traceback" not in said.err
    write(tmp_path / "dense", {"fc.weight": torch.ones(2, 2)})
    assert ckpt("verify", tmp_path / "dense") == 0
    assert "1 tensors, 0 packed weights verified" in capsys.readouterr().out
    assert ckpt("convert", tmp_path / "dense", tmp_path / "b.safetensors") == 1
    assert "must hold packed ternary weights, got none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: BitLinear(8, 6).pack(), "0: must have a multiple of 4 rows"),
        (lambda: BitLinear(8, 4).pack(lorc_rank=2), "no low-rank correction"),
        (lambda: BitLinear(8, 4, granularity="row").pack(), "0: pyops::to_hf: gamma must be the same"),
    ],
)
def test_states_that_the_published_format_has_no_place_for(layer, message, tmp_path, capsys):
    save_file(nn.Sequential(layer()).state_dict(), tmp_path / "a.safetensors")
    assert ckpt("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--linear-class", "bitlinear") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.row("R42")
def test_files_that_lie_take_no_memory(tmp_path):
    """In a process that may have little more than torch needs; nor time."""
    paths = []
    for name in ("fields", "tensors", "array", "strings", "sizes"):
        paths.append(tmp_path / f"{name}.gguf")
        paths[-1].write_bytes(BAD_GGUF[name][0])
    for name in ("data", "product", "header"):
        paths.append(tmp_path / f"{name}.safetensors")
        paths[-1].write_bytes(HUGE[name])
    script = """
import sys
from pyops.cli.main import main
sys.exit(any([main(["ckpt", "verify", path]) != 1 for path in sys.argv[1:]]))
"""
    done = limited([sys.executable, "-c", script, *paths])
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(paths), done.stderr
