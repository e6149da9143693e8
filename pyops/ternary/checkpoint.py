"""Published 1.58-bit checkpoints into a model of the user's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyops._checks import FormatError, dtype_name
from pyops._tensor_files import DTYPES, Entry, TensorFolder, read_json
from pyops.ternary import _options
from pyops.ternary.interchange import LINEAR_CLASSES, from_hf
from pyops.ternary.modules import BitLinear, PackedBitLinear

CONFIG = "config.json"
_SCALE, _NORM = "weight_scale", "rms_norm.weight"


class LoadedCheckpoint(NamedTuple):
    """What :func:`load_hf_checkpoint` did, by name: ``packed`` layers, ``copied`` tensors, and with ``strict=False``
    ``missing`` ones, which the model has alone, and ``unexpected`` ones, which the files have alone."""

    packed: list[str]
    copied: list[str]
    missing: list[str]
    unexpected: list[str]


class Quantization(NamedTuple):
    """What the configuration of a checkpoint says."""

    linear_class: str
    online: bool
    norm_eps: float | None  # of a norm in front of every packed layer, or None


def read_quantization(folder: Path, linear_class: str | None = None) -> Quantization:
    """The ``quantization_config`` of a folder's config.json; an argument comes before what the file says."""
    config = read_json(folder / CONFIG).get("quantization_config")
    if not isinstance(config, dict):
        raise FormatError(f"{CONFIG}: quantization_config must be an object, got {type(config).__name__}")

    def choice(key: str, default: str, allowed: tuple[str, ...]) -> str:
        found = config.get(key, default)
        if found not in allowed:
            raise FormatError(f"{CONFIG}: {key} must be one of {', '.join(allowed)}, got {found!r}")
        return found

    choice("quant_method", "", ("bitnet",))
    linear_class = linear_class or choice("linear_class", "bitlinear", LINEAR_CLASSES)
    online = choice("quantization_mode", "offline", ("offline", "online")) == "online"
    eps = config.get("rms_norm_eps", 1e-6) if config.get("use_rms_norm") else None
    if eps is not None and (isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < 1):
        raise FormatError(f"{CONFIG}: rms_norm_eps must be in [0, 1), got {eps!r}")
    return Quantization(linear_class, online, eps)


def key_of(layer: str, last: str) -> str:
    """The name of a layer's tensor; "" is a layer that is the whole model."""
    return f"{layer}.{last}" if layer else last


def packed_names(entries) -> list[str]:
    """Names of the layers that a checkpoint has packed: a uint8 ``weight`` beside a ``weight_scale``."""
    found = []
    for name, entry in entries.items():
        layer, _, last = name.rpartition(".")
        if last == "weight" and entry.dtype == "U8":
            if key_of(layer, _SCALE) not in entries:
                raise FormatError(f"{key_of(layer, _SCALE)}: must be there for the packed {name}, got nothing")
            found.append(layer)
    return found


# ---- what will be done, found without touching the model ---------------------------------------------------------


def _layer_of(model: nn.Module, name: str) -> nn.Linear | PackedBitLinear | None:
    """The linear layer of that name, None if the model has nothing there."""
    from pyops.convert import _obstacle

    try:
        layer = model.get_submodule(name)
    except AttributeError:
        return None
    kind = next((kind for kind in (BitLinear, PackedBitLinear, nn.Linear) if isinstance(layer, kind)), None)
    if kind is None or layer is model:
        where = "a linear layer inside the model" if kind is None else "inside a module that holds it"
        raise FormatError(f"{name or 'weight'}: must be {where}, got {type(layer).__name__}")
    obstacle = _obstacle(layer, kind, [model.get_submodule(name.rpartition(".")[0])])
    if obstacle:
        raise ValueError(f"layer {name} cannot be replaced by a packed one: {obstacle}")
    return layer


def _packed_layer(files: TensorFolder, name: str, old: nn.Module, quantization: Quantization) -> PackedBitLinear:
    """The layer that takes the place of ``old``."""
    rows, columns = old.out_features, old.in_features
    shape = ((rows + 3) // 4, columns)
    if files[f"{name}.weight"].shape != shape:
        got = list(files[f"{name}.weight"].shape)
        raise FormatError(f"{name}.weight: must have shape {list(shape)} for {rows} x {columns} weights, got {got}")
    has_bias = old.bias is not None and f"{name}.bias" in files
    bias = files.tensor(f"{name}.bias").float() if has_bias else None
    try:
        weight, scale = files.tensor(f"{name}.weight"), files.tensor(f"{name}.{_SCALE}")
        packed, gamma, bias = from_hf(weight, scale, quantization.linear_class, out_features=rows, bias=bias)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None
    if bias is None and old.bias is not None:  # not strict
        bias = old.bias.detach()
    own = old.weight_packed if isinstance(old, PackedBitLinear) else old.weight
    device = torch.device("cpu") if own.is_meta else own.device
    dtype = old.dtype if isinstance(old, PackedBitLinear) else own.dtype
    options = _options_of(old)
    if quantization.norm_eps is not None:
        options["norm"] = nn.RMSNorm(columns, eps=quantization.norm_eps, device=device, dtype=dtype)
    return PackedBitLinear.from_packed(
        packed.to(device), gamma.to(device), None if bias is None else bias.to(device, dtype, copy=True), fmt="t2",
        in_features=columns, out_features=rows, dtype=dtype, **options,
    ).train(old.training)  # fmt: skip


def _options_of(layer: nn.Module) -> dict:
    """How a layer of ours treats activations; a Linear says nothing, and gets what the published layers do."""
    if isinstance(layer, BitLinear):
        return {"qmax": layer.qmax, "eps": layer.eps, "norm": layer.norm, "act": "int8" if layer.act_bits else None}
    if isinstance(layer, PackedBitLinear):
        return {"qmax": layer.qmax, "eps": layer.eps, "norm": layer.norm, "act": layer.act}
    return {}


def _check_fits(name: str, entry: Entry, target: Tensor) -> None:
    if entry.shape != tuple(target.shape):
        raise FormatError(f"{name}: must have shape {list(target.shape)}, got {list(entry.shape)}")
    dtype = DTYPES.get(entry.dtype)
    if dtype is None or dtype.is_floating_point != target.dtype.is_floating_point:
        raise FormatError(f"{name}: must be convertible to {dtype_name(target.dtype)}, got {entry.dtype}")


class _Plan:
    """New layers, and which tensor each other name of the files goes to; made without touching the model."""

    def __init__(self, model: nn.Module, files: TensorFolder, quantization: Quantization) -> None:
        self.new_of: dict[int, nn.Module] = {}
        self.packed: list[str] = []
        self.targets: dict[str, Tensor] = {}
        self.own = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
        self.missing: list[str] = []
        self._replaced: set[str] = set()  # of the model's names
        used: set[str] = set()  # of the files' names
        names = list(model.named_modules(remove_duplicate=False))
        for name in packed_names(files):
            old = _layer_of(model, name)
            if old is not None:
                aliases = [alias for alias, module in names if module is old]
                used |= self._plan_layer(files, name, old, aliases, quantization)
        for name in files:
            if name in self.own and name not in self._replaced:
                self.targets[name] = self.own[name]
        for name, target in self.targets.items():
            _check_fits(name, files[name], target)
        self.unexpected = [name for name in files if name not in used and name not in self.targets]
        loaded = {id(target) for target in self.targets.values()}  # one of several tied tensors is enough
        self.missing += [
            name for name, tensor in self.own.items() if name not in self._replaced and id(tensor) not in loaded
        ]

    def _plan_layer(self, files, name: str, old: nn.Module, aliases: list[str], quantization) -> set[str]:
        """Names of the files that the new layer takes in."""
        new = self.new_of[id(old)] = _packed_layer(files, name, old, quantization)
        self.packed.append(name)
        used = {f"{name}.weight", f"{name}.{_SCALE}"}
        if old.bias is not None and f"{name}.bias" in files:
            used.add(f"{name}.bias")
        elif old.bias is not None:
            self.missing.append(f"{name}.bias")
        for alias in aliases:
            self._replaced |= {f"{alias}.{key}" for key in (*old._parameters, *old._buffers)}
        if quantization.norm_eps is not None:
            self._replaced |= {key for alias in aliases for key in self.own if key.startswith(f"{alias}.norm.")}
            if f"{name}.{_NORM}" in files:
                self.targets[f"{name}.{_NORM}"] = new.norm.weight
            else:
                self.missing.append(f"{name}.{_NORM}")
        return used

    def check_complete(self) -> None:
        """FormatError that names what the files lack and what the model lacks."""
        for what, names in (("lack", self.missing), ("have, and the model lacks,", self.unexpected)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise FormatError(f"load_hf_checkpoint: the files {what} {', '.join(sorted(names)[:5])}{more}")


# ---- doing it ----------------------------------------------------------------------------------------------------


def _replace_tensors(model: nn.Module, new_of: dict[int, Tensor]) -> None:
    """Tensors without storage cannot be written to: new ones take their places, tied ones together."""
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({name: new_of[id(tensor)] for name, tensor in own.items() if id(tensor) in new_of})


@torch.no_grad()
def _carry_out(model: nn.Module, files: TensorFolder, plan: _Plan) -> None:
    from pyops.convert import _choose_encoder_paths

    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in plan.new_of:
                parent._modules[name] = plan.new_of[id(child)]
    _choose_encoder_paths(model)
    without_storage: dict[int, Tensor] = {}
    for name, target in plan.targets.items():
        value = files.tensor(name)
        if not target.is_meta:
            target.copy_(value)
            continue
        value = value.to(target.dtype)
        parameter = isinstance(target, nn.Parameter)
        without_storage[id(target)] = nn.Parameter(value, target.requires_grad) if parameter else value
    _replace_tensors(model, without_storage)


# ---- public function ---------------------------------------------------------------------------------------------


def load_hf_checkpoint(
    model: nn.Module, folder: str | os.PathLike, linear_class: str | None = None, strict: bool = True
) -> LoadedCheckpoint:
    """Fills a model from a published 1.58-bit checkpoint: a folder with ``config.json`` (``quant_method: bitnet``) and
    ``model.safetensors``, or shards and ``model.safetensors.index.json``.

    A ``torch.nn.Linear``, ``BitLinear`` or ``PackedBitLinear`` whose weight the files have packed becomes a
    :class:`pyops.nn.PackedBitLinear` of the same weights (:func:`from_hf`); every other tensor is copied and cast to
    the dtype it has in the model, or put there if the model is on the meta device.

    Args:
        model: its names are those of the checkpoint. A BitLinear keeps what it says of activations (norm, qmax, eps,
            act_bits); a Linear gets what the published layers do: 127, 1e-5, no norm, or with ``use_rms_norm`` in the
            configuration a ``torch.nn.RMSNorm`` of the layer's own.
        folder: only names in it are opened, only as safetensors (package safetensors: the extra ``formats``).
        linear_class: ``"autobitlinear"`` or ``"bitlinear"``, see :func:`from_hf`; None for what ``config.json`` says,
            or ``"bitlinear"``, the published default, if it says nothing.
        strict: every tensor of the model must be in the files and the reverse; False reports them instead. A tensor
            tied to one that was loaded is not missing.

    Returns:
        ``LoadedCheckpoint(packed, copied, missing, unexpected)``: lists of names.

    Raises:
        FormatError: files that are missing, damaged, or of another method; shapes and dtypes that do not fit; with
        ``strict`` missing and unexpected names. ValueError, TypeError: an option, a layer with hooks or
        parametrizations, or an "online" checkpoint (float weights that are quantized in every call) for a model
        without BitLinear. ImportError without the package safetensors. The model is then as it was.

    Example:
        >>> import json, pathlib, tempfile, torch, pyops
        >>> from safetensors.torch import save_file
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> published = {"fc.weight": torch.tensor([[0b10010010, 0b01100001]], dtype=torch.uint8),
        ...              "fc.weight_scale": torch.tensor([0.5])}
        >>> save_file(published, folder / "model.safetensors")
        >>> config = {"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"}}
        >>> _ = (folder / "config.json").write_text(json.dumps(config))
        >>> model = torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 4, bias=False)})
        >>> pyops.ternary.load_hf_checkpoint(model, folder).packed
        ['fc']
        >>> model["fc"]
        PackedBitLinear(in_features=2, out_features=4, bias=False, fmt=t2, granularity=tensor)
    """
    op = "load_hf_checkpoint"
    if not isinstance(model, nn.Module):
        raise TypeError(f"pyops::{op}: model must be a Module, got {type(model).__name__}")
    _options.choice(op, "strict", strict, (True, False))
    if linear_class is not None:
        _options.choice(op, "linear_class", linear_class, LINEAR_CLASSES)
    folder = Path(folder)
    quantization = read_quantization(folder, linear_class)
    files = TensorFolder(folder)
    if quantization.online and not any(isinstance(module, BitLinear) for module in model.modules()):
        raise ValueError(
            f"pyops::{op}: model must have BitLinear layers for a checkpoint of quantization_mode 'online', got none: "
            "pyops.convert(model, pyops.nn.BitLinear) puts them there"
        )
    plan = _Plan(model, files, quantization)
    if strict:
        plan.check_complete()
    _carry_out(model, files, plan)
    return LoadedCheckpoint(plan.packed, list(plan.targets), plan.missing, plan.unexpected)
