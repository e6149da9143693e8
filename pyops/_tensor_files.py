"""Reads safetensors files, alone or as the shards of a folder: names, dtypes, shapes first; values on demand.

Nothing here reads a pickle, and no name in a file leads out of the folder.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyops._checks import FormatError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")
_MAX_JSON = 1 << 26
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Entry(NamedTuple):
    """What a file says of a tensor; ``dtype`` is the file's word for it."""

    dtype: str
    shape: tuple[int, ...]


def safetensors(module: str = "safetensors"):
    """The package safetensors or a module of it; ImportError says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        advice = "pip install 'pyops-kernels[formats]'"
        raise ImportError(f"pyops: .safetensors files need the package safetensors: {advice}") from None


class TensorFile(Mapping[str, Entry]):
    """One safetensors file. Opening it checks its header against its length; :meth:`tensor` reads."""

    def __init__(self, path: str | os.PathLike) -> None:
        package = safetensors()
        self.path = Path(path)
        if not self.path.is_file():
            raise FormatError(
                f"{self.path.name}: must be a file, got {'a folder' if self.path.is_dir() else 'nothing'}"
            )
        try:
            self._file = package.safe_open(self.path, "pt")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118  (no iterator)
        except (package.SafetensorError, OSError, ValueError, OverflowError) as error:
            raise FormatError(f"{self.path.name}: must be a safetensors file, got: {error}") from None
        self._entries = {name: Entry(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class TensorFolder(Mapping[str, Entry]):
    """``model.safetensors`` of a folder, or the shards that ``model.safetensors.index.json`` names."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.path = Path(folder)
        self._file_of: dict[str, TensorFile] = {}
        if (self.path / SINGLE).exists():
            single = TensorFile(self.path / SINGLE)
            self._file_of = dict.fromkeys(single, single)
        elif (self.path / INDEX).exists():
            self._open_shards(read_json(self.path / INDEX))
        else:
            pickles = sorted(found.name for pattern in _PICKLES for found in self.path.glob(pattern))
            unread = f" ({', '.join(pickles[:3])}: pickle files are never read)" if pickles else ""
            raise FormatError(f"{self.path.name}: must hold {SINGLE} or {INDEX}, got neither{unread}")

    def _open_shards(self, index: dict) -> None:
        places = index.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
            raise FormatError(f"{INDEX}: weight_map must give a file name for each tensor, got something else")
        shards: dict[str, TensorFile] = {}
        for name, shard in places.items():
            if not _SHARD.fullmatch(shard):
                raise FormatError(f"{INDEX}: {name!r} must lie in a .safetensors file of the folder, got {shard!r}")
            if shard not in shards:
                shards[shard] = TensorFile(self.path / shard)
            if name not in shards[shard]:
                raise FormatError(f"{shard}: must hold {name!r}, as {INDEX} says, got no such tensor")
            self._file_of[name] = shards[shard]

    def __getitem__(self, name: str) -> Entry:
        return self._file_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def tensor(self, name: str) -> Tensor:
        return self._file_of[name].tensor(name)


def read_json(path: Path) -> dict:
    """The JSON object in a file of bounded size."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_JSON + 1)
    except OSError as error:
        raise FormatError(f"{path.name}: must be a file that can be read, got: {error.strerror}") from None
    if len(text) > _MAX_JSON:
        raise FormatError(f"{path.name}: must have at most {_MAX_JSON} bytes, got more")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path.name}: must be JSON, got: {error}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path.name}: must be a JSON object, got {type(found).__name__}")
    return found
