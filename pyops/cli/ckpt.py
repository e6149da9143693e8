"""``ckpt``: shows, verifies and converts files of ternary weights.

Read: safetensors with our packed states or with published 1.58-bit weights (a file, or a folder with config.json), and
GGUF. Pickles are never read. Status 0: done; 1: a file is not what it should be, or cannot be converted; 2: usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyops import _gguf, _packed_state
from pyops._checks import FormatError
from pyops._tensor_files import DTYPES, TensorFile, TensorFolder, safetensors
from pyops.ternary import _state
from pyops.ternary.checkpoint import CONFIG, key_of, packed_names, read_quantization
from pyops.ternary.interchange import GGUF_TYPES, LINEAR_CLASSES, from_gguf_blocks, from_hf, to_hf
from pyops.ternary.modules import PackedBitLinear
from pyops.ternary.repack import repack

_PUBLISHED = "bitnet"  # the format's name in tables
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")


class UsageError(Exception):
    """The command line asks for what makes no sense."""


class Row(NamedTuple):
    """A tensor, or the tensors of one packed layer."""

    name: str
    format: str
    shape: list[int]
    granularity: str
    bytes: int


# ---- what a file holds -------------------------------------------------------------------------------------------


class _Gguf(Mapping[str, _gguf.GgufTensor]):
    """A GGUF file; every packed layer is one tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in _gguf.read_index(path)}

    def __getitem__(self, name: str) -> _gguf.GgufTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def packed(self) -> list[str]:
        return [name for name, tensor in self.items() if tensor.type in GGUF_TYPES]

    def tensor(self, name: str) -> Tensor:
        """A tensor of a type that torch has."""
        found = self[name]
        return _gguf.read_bytes(self.path, found).view(_gguf.PLAIN[found.type]).reshape(found.shape)

    def weights(self, name: str) -> tuple[Tensor, Tensor]:
        """(t2, gamma) of a packed tensor."""
        found = self[name]
        if len(found.shape) != 2:
            raise FormatError(f"{name}: must have two dimensions, got {list(found.shape)}")
        return _named(name, from_gguf_blocks, _gguf.read_bytes(self.path, found), *found.shape, found.type)

    def rows(self) -> Iterator[Row]:
        for name, found in self.items():
            granularity = _state.granularity(self.weights(name)[1]) if found.type in GGUF_TYPES else ""
            yield Row(name, found.type, list(found.shape), granularity, found.bytes or 0)


Files = TensorFile | TensorFolder | _Gguf


def _named(name: str, function, *args, **options):
    """A call whose FormatError begins with the name of the tensor."""
    try:
        return function(*args, **options)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None


def _open(path: Path) -> Files:
    if path.is_dir():
        return TensorFolder(path)
    with path.open("rb") as file:
        start = file.read(4)
    if start == _gguf.MAGIC:
        return _Gguf(path)
    if start.startswith(_PICKLE_STARTS):
        raise FormatError(f"{path.name}: must be a safetensors or GGUF file, got a pickle or zip: these are never read")
    return TensorFile(path)


def _state_names(files: Mapping) -> list[str]:
    """Layers with a packed state of ours; "" for one without a name."""
    header = _state.HEADER
    return [name.removesuffix(header).removesuffix(".") for name in files if name.rpartition(".")[2] == header]


def _keys(name: str, *keys: str) -> list[str]:
    return [key_of(name, key) for key in keys]


def _packed_state_of(files: TensorFile | TensorFolder, name: str) -> dict[str, Tensor]:
    keys = (*_state.KEYS, _state.HEADER)
    present = zip(keys, _keys(name, *keys), strict=True)
    return {key: files.tensor(full) for key, full in present if full in files}


def _published_of(files: TensorFile | TensorFolder, name: str, linear_class: str) -> tuple:
    """(t2, gamma, bias, out_features) of a published layer; its bias tells how many rows it has."""
    weight, scale, bias = _keys(name, "weight", "weight_scale", "bias")
    bias = files.tensor(bias) if bias in files else None
    rows = 4 * files[weight].shape[0] if bias is None else bias.numel()
    options = {"linear_class": linear_class, "out_features": rows, "bias": bias}
    return (*_named(name, from_hf, files.tensor(weight), files.tensor(scale), **options), rows)


def _size(entry) -> int:
    elements = torch.Size(entry.shape).numel()
    return elements * DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else 0


def _rows(files: Files) -> Iterator[Row]:
    if isinstance(files, _Gguf):
        yield from files.rows()
        return
    taken: set[str] = set()
    for name in _state_names(files):
        fields = _packed_state.parse_header(files.tensor(*_keys(name, _state.HEADER)), name or "packed state")
        keys = [key for key in _keys(name, *_state.KEYS, _state.HEADER) if key in files]
        taken.update(keys)
        size = sum(_size(files[key]) for key in keys)
        yield Row(name, fields["layout"], fields["shape"], fields["granularity"], size)
    for name in packed_names(files):
        keys = [key for key in _keys(name, "weight", "weight_scale", "bias") if key in files]
        taken.update(keys)
        rows, columns = files[keys[0]].shape
        yield Row(name, _PUBLISHED, [4 * rows, columns], "tensor", sum(_size(files[key]) for key in keys))
    for name, entry in files.items():
        if name not in taken:
            yield Row(name, entry.dtype, list(entry.shape), "", _size(entry))


# ---- show, verify ------------------------------------------------------------------------------------------------


def _show(arguments: argparse.Namespace) -> int:
    rows = list(_rows(_open(arguments.file)))
    if arguments.json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
        return 0
    table = [("tensor", "format", "shape", "scale per", "bytes")]
    table += [(r.name, r.format, "x".join(map(str, r.shape)), r.granularity, f"{r.bytes:,}") for r in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        left = "  ".join(f"{cell:<{width}}" for cell, width in zip(line[:-1], widths, strict=False))
        print(f"{left}  {line[-1]:>{widths[-1]}}")
    print(f"{len(rows)} entries, {sum(row.bytes for row in rows):,} bytes")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    files = _open(arguments.file)
    if isinstance(files, _Gguf):
        checked = files.packed()
        for name in checked:
            files.weights(name)
    else:
        states, published = _state_names(files), packed_names(files)
        for name in states:
            _state.check_state(_packed_state_of(files, name), name or "packed state")
        for name in published:
            _published_of(files, name, "autobitlinear")
        checked = states + published
    text = f"{arguments.file}: {len(files)} tensors, {len(checked)} packed weights verified"
    print(json.dumps({"tensors": len(files), "verified": checked}, indent=2) if arguments.json else text)
    return 0


# ---- convert -----------------------------------------------------------------------------------------------------


def _state_dict(name: str, packed: Tensor, gamma: Tensor, bias: Tensor | None, shape, fmt: str) -> dict[str, Tensor]:
    """The packed state of a layer, from t2."""
    rows, columns = shape
    packed = repack(packed, "t2", fmt, rows, columns)
    layer = PackedBitLinear.from_packed(packed, gamma, bias, fmt=fmt, in_features=columns, out_features=rows)
    return layer.state_dict(prefix=f"{name}." if name else "")


def _linear_class(arguments: argparse.Namespace) -> str:
    if arguments.linear_class is not None:
        return arguments.linear_class
    if not (arguments.file / CONFIG).is_file():
        raise UsageError(f"--linear-class must be given: there is no {CONFIG} that says whether the scale divides")
    return read_quantization(arguments.file).linear_class


def _published_to_packed(files, arguments: argparse.Namespace) -> tuple[dict[str, Tensor], list[str]]:
    names = packed_names(files)
    linear_class = _linear_class(arguments)
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    for name in names:
        taken.update(_keys(name, "weight", "weight_scale", "bias"))
        packed, gamma, bias, rows = _published_of(files, name, linear_class)
        found |= _state_dict(name, packed, gamma, bias, (rows, files[_keys(name, "weight")[0]].shape[1]), arguments.fmt)
    return found | {name: files.tensor(name) for name in files if name not in taken}, names


def _packed_to_published(files, arguments: argparse.Namespace) -> tuple[dict[str, Tensor], list[str]]:
    names = _state_names(files)
    if arguments.linear_class is None:
        raise UsageError("--linear-class must be given: the published format does not say whether its scale divides")
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    for name in names:
        state = _packed_state_of(files, name)
        fields = _state.check_state(state, name or "packed state")
        rows, columns = fields["shape"]
        if rows % 4 or any(key in files for key in _keys(name, "lowrank_A", "lowrank_B")):
            rule = "have a multiple of 4 rows and no low-rank correction"
            raise FormatError(f"{name}: must {rule} for the published format, got {rows} rows")
        taken.update(_keys(name, *_state.KEYS, _state.HEADER))
        options = {"in_features": columns, "bias": state.get("bias"), "fmt": fields["layout"]}
        tensors = _named(name, to_hf, state["weight_packed"], state["weight_gamma"], arguments.linear_class, **options)
        keys = _keys(name, "weight", "weight_scale", "bias")
        found |= {key: tensor for key, tensor in zip(keys, tensors, strict=True) if tensor is not None}
    return found | {name: files.tensor(name) for name in files if name not in taken}, names


def _gguf_to_packed(files: _Gguf, arguments: argparse.Namespace) -> tuple[dict[str, Tensor], list[str]]:
    found: dict[str, Tensor] = {}
    names = files.packed()
    biases = set()
    for full in names:
        name, _, last = full.rpartition(".")
        if last != "weight":
            raise FormatError(f"{full}: must be named <layer>.weight, got another name")
        packed, gamma = files.weights(full)
        bias = f"{name}.bias"
        has_bias = bias in files and files[bias].type in _gguf.PLAIN
        biases.update([bias] if has_bias else [])
        found |= _state_dict(
            name, packed, gamma, files.tensor(bias) if has_bias else None, files[full].shape, arguments.fmt
        )
    for name, tensor in files.items():
        if name in names or name in biases:
            continue
        if tensor.type in _gguf.PLAIN:
            found[name] = files.tensor(name)
        elif not arguments.skip_others:
            raise FormatError(
                f"{name}: must be of a type that torch has, got {tensor.type} (--skip-others leaves it out)"
            )
    return found, names


def _convert(arguments: argparse.Namespace) -> int:
    if arguments.target.exists() and not arguments.force:
        raise UsageError(f"{arguments.target} is there already; --force replaces it")
    files = _open(arguments.file)
    if isinstance(files, _Gguf):
        kind, convert = "packed", _gguf_to_packed
    elif _state_names(files):
        kind, convert = _PUBLISHED, _packed_to_published
    else:
        kind, convert = "packed", _published_to_packed
    if not (files.packed() if isinstance(files, _Gguf) else _state_names(files) or packed_names(files)):
        raise FormatError(f"{arguments.file.name}: must hold packed ternary weights, got none")
    tensors, names = convert(files, arguments)
    _save(tensors, arguments.target)
    text = f"{arguments.target}: {len(names)} weights as {kind}, {len(tensors)} tensors"
    print(json.dumps({"format": kind, "converted": names}, indent=2) if arguments.json else text)
    return 0


def _save(tensors: dict[str, Tensor], target: Path) -> None:
    """Writes beside the target, then puts it in place: never half a file."""
    save_file = safetensors("safetensors.torch").save_file
    handle, written = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, written, metadata={"format": "pt"})
        os.chmod(written, 0o644)
        os.replace(written, target)
    except BaseException:
        os.unlink(written)
        raise


# ---- command line ------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="show|verify|convert")
    texts = {
        "show": (_show, "list tensors: format, shape, what has a scale of its own, bytes"),
        "verify": (_verify, "check headers, checksums, codes and scales"),
        "convert": (_convert, "published weights or GGUF (TQ1_0, TQ2_0) to packed states, or those to published ones"),
    }
    for verb, (action, text) in texts.items():
        command = verbs.add_parser(verb, help=text, description=text)
        command.set_defaults(action=action)
        command.add_argument("file", type=Path, metavar="FILE", help=".safetensors, .gguf, or a checkpoint's folder")
        command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    command.add_argument("target", type=Path, metavar="TARGET", help=".safetensors file to write")
    command.add_argument("--linear-class", choices=LINEAR_CLASSES, help="whether a published scale divides (bitlinear)")
    command.add_argument("--fmt", choices=("t2", "t5"), default="t2", help="of packed states (default %(default)s)")
    command.add_argument("--skip-others", action="store_true", help="leave out what GGUF has quantized in other types")
    command.add_argument("--force", action="store_true", help="replace TARGET")


def run(arguments: argparse.Namespace) -> int:
    try:
        return arguments.action(arguments)
    except UsageError as error:
        print(f"pyops ckpt {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"pyops ckpt {arguments.verb}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
