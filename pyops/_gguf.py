"""Reads GGUF files (versions 2 and 3, little-endian): which tensors there are, and their bytes.

Every count and size in the file is compared with what the file has left before anything is done with it, so that a
file which lies is refused at once and costs no memory.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyops._checks import FormatError

MAGIC = b"GGUF"
#: number: (name, weights of a block, bytes of a block). Types that are not here are listed and not read.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
}
PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_MAX_DIMENSIONS = 4
_MAX_NESTING = 4
_LEAST_BYTES = {"field": 13, "tensor": 24, "string": 8, "array": 12}


class GgufTensor(NamedTuple):
    """A tensor of the file; ``shape`` is in torch's order, ``bytes`` None for a type that is not known."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    bytes: int | None


class _Cursor:
    """A place in the file; no read goes beyond the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def wrong(self, what: str) -> FormatError:
        return FormatError(f"{self.path.name}: {what} at byte {self.at}")

    def skip(self, size: int) -> int:
        """The place of the next ``size`` bytes, which are passed."""
        if size > len(self.data) - self.at:
            raise self.wrong(f"the file must go on for {size} bytes, got {len(self.data) - self.at}")
        start, self.at = self.at, self.at + size
        return start

    def number(self, code: str) -> int:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize(code)))[0]

    def count(self, of: str) -> int:
        """A number of things, each of which takes at least some bytes."""
        found = self.number("Q")
        if found * _LEAST_BYTES[of] > len(self.data) - self.at:
            raise self.wrong(f"the number of {of}s must fit into the file, got {found}")
        return found

    def text(self) -> str:
        size = self.number("Q")
        start = self.skip(size)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError:
            raise self.wrong("text must be UTF-8, got something else") from None

    def value(self, kind: int, depth: int = 0) -> int | None:
        """Passes a metadata value; returns it if it is a uint32."""
        if kind == _UINT32:
            return self.number("I")
        if kind in _SCALAR_BYTES:
            self.skip(_SCALAR_BYTES[kind])
        elif kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY and depth < _MAX_NESTING:
            self._array(depth)
        else:
            raise self.wrong(f"a metadata value must be of a known type, got {kind}")
        return None

    def _array(self, depth: int) -> None:
        kind = self.number("I")
        if kind in _SCALAR_BYTES:
            self.skip(self.number("Q") * _SCALAR_BYTES[kind])
            return
        for _ in range(self.count("string" if kind == _STRING else "array")):
            self.value(kind, depth + 1)


def _alignment(cursor: _Cursor) -> int:
    """Passes the metadata; what the tensors' places are multiples of."""
    alignment = 32
    for _ in range(cursor.count("field")):
        key = cursor.text()
        value = cursor.value(cursor.number("I"))
        if key == "general.alignment":
            if not value or value & (value - 1):
                raise cursor.wrong(f"general.alignment must be a power of two, got {value}")
            alignment = value
    return alignment


def _tensor(cursor: _Cursor) -> GgufTensor:
    """One entry of the table; its offset is still relative."""
    name = cursor.text()
    dimensions = cursor.number("I")
    if dimensions > _MAX_DIMENSIONS:
        raise cursor.wrong(f"{name} must have at most {_MAX_DIMENSIONS} dimensions, got {dimensions}")
    sizes = [cursor.number("Q") for _ in range(dimensions)]
    number, offset = cursor.number("I"), cursor.number("Q")
    kind, block, block_bytes = TYPES.get(number, (f"type {number}", 1, 0))
    if dimensions and sizes[0] % block:
        raise cursor.wrong(f"{name} must have a multiple of {block} columns in {kind}, got {sizes[0]}")
    size = math.prod(sizes) // block * block_bytes if number in TYPES else None
    return GgufTensor(name, kind, tuple(reversed(sizes)), offset, size)


def read_index(path: str | os.PathLike) -> list[GgufTensor]:
    """The tensors of a file; all of their bytes are in the file.

    Raises:
        FormatError: with the byte at which the file is wrong. OSError: no file that can be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < len(MAGIC):
            raise FormatError(f"{path.name}: the file must begin with GGUF, got fewer than 4 bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_index(_Cursor(data, path))


def _read_index(cursor: _Cursor) -> list[GgufTensor]:
    start = cursor.skip(len(MAGIC))
    if cursor.data[start : cursor.at] != MAGIC:
        raise cursor.wrong("the file must begin with GGUF, got something else")
    version = cursor.number("I")
    if version not in (2, 3):
        raise cursor.wrong(f"the version must be 2 or 3 (little-endian), got {version}")
    tensors = cursor.count("tensor")
    alignment = _alignment(cursor)
    found = [_tensor(cursor) for _ in range(tensors)]
    start = -(-cursor.at // alignment) * alignment
    names: set[str] = set()
    for number, tensor in enumerate(found):
        end = start + tensor.offset + (tensor.bytes or 0)
        if tensor.offset % alignment or end > max(len(cursor.data), start):
            rule = f"begin at a multiple of {alignment} and end before byte {len(cursor.data)}"
            raise FormatError(f"{cursor.path.name}: {tensor.name} must {rule}, got {start + tensor.offset} to {end}")
        if tensor.name in names:
            raise FormatError(f"{cursor.path.name}: names must differ, got {tensor.name} twice")
        names.add(tensor.name)
        found[number] = tensor._replace(offset=start + tensor.offset)
    return found


def read_bytes(path: str | os.PathLike, tensor: GgufTensor) -> Tensor:
    """The bytes of a tensor, uint8 of one dimension."""
    with open(path, "rb") as file:
        file.seek(tensor.offset)
        data = bytearray(tensor.bytes)
        if file.readinto(data) != len(data):
            raise FormatError(f"{Path(path).name}: {tensor.name} must have {len(data)} bytes, got fewer")
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
