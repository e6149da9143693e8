"""The header that goes with packed weights in a state_dict: what they are, and checksums that find any change.

A header is a uint8 tensor of UTF-8 JSON in canonical form (sorted keys, no spaces)::

    {"block": [1, 4],               rows x columns that share one stored unit of the layout
     "crc32": {"header": "...", "weight_packed": "...", ...},
     "family": "ternary",
     "granularity": "row",          what has a scale of its own
     "layout": "t2",
     "magic": "pyops",
     "scale": "multiply",           the scale multiplies; the other convention is never stored
     "shape": [2560, 6912],         of the matrix that the packed tensors stand for
     "version": 1,
     "writer": "pyops 0.1.0"}

``crc32`` holds the CRC-32 of the little-endian bytes of each tensor, in row-major order, as eight hexadecimal digits;
its own entry ``header`` is that of the header's text without that entry. Headers are checked when a state is loaded,
never in a forward. ``PYOPS_VERIFY=0`` leaves out the checksums, not the other checks. Nothing is ever allocated
according to what a header says.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyops import _environment
from pyops._checks import FormatError, dtype_name, shape_name

MAGIC = "pyops"
VERSION = 1
MAX_BYTES = 1 << 16
MAX_SIZE = 1 << 48  # of one dimension
_OWN = "header"
_FIELDS = ("block", "crc32", "family", "granularity", "layout", "magic", "scale", "shape", "version", "writer")
_HEX = re.compile(r"[0-9a-f]{8}")


def _bad(name: str, field: str, rule: str, got: object) -> FormatError:
    text = str(got)
    return FormatError(f"{name}: {field} must {rule}, got {text if len(text) <= 80 else text[:77] + '...'}")


def _canonical(fields: Mapping) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def _own_checksum(fields: Mapping) -> str:
    others = {key: value for key, value in fields["crc32"].items() if key != _OWN}
    return f"{zlib.crc32(_canonical({**fields, 'crc32': others})):08x}"


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's elements in row-major order, as eight hexadecimal digits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{zlib.crc32(flat.view(torch.uint8).numpy()):08x}"


# ---- writing ---------------------------------------------------------------------------------------------------


def make_header(
    *,
    family: str,
    layout: str,
    shape: Sequence[int],
    granularity: str,
    tensors: Mapping[str, Tensor | None],
    block: Sequence[int] = (1, 1),
) -> Tensor:
    """The header of a packed state; ``tensors`` are its other entries by key, None for those that it does without.

    Returns:
        uint8 ``[bytes]`` on the CPU.
    """
    from pyops import __version__

    fields = {
        "block": [int(size) for size in block],
        "crc32": {key: checksum(tensor) for key, tensor in tensors.items() if tensor is not None},
        "family": family,
        "granularity": granularity,
        "layout": layout,
        "magic": MAGIC,
        "scale": "multiply",
        "shape": [int(size) for size in shape],
        "version": VERSION,
        "writer": f"pyops {__version__}",
    }
    fields["crc32"][_OWN] = _own_checksum(fields)
    return torch.frombuffer(bytearray(_canonical(fields)), dtype=torch.uint8)


# ---- reading ---------------------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, object]]) -> dict:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice")
    return fields


def _decoded(header: Tensor, name: str) -> dict:
    """The JSON object in a header, whatever it says."""
    if not isinstance(header, Tensor):
        raise _bad(name, "header", "be a uint8 tensor", type(header).__name__)
    if header.dtype != torch.uint8 or header.dim() != 1:
        raise _bad(name, "header", "be uint8 [bytes]", f"{dtype_name(header.dtype)} {shape_name(header)}")
    if header.is_meta:
        raise _bad(name, "header", "have data", "a meta tensor")
    if not 0 < header.numel() <= MAX_BYTES:
        raise _bad(name, "header", f"have 1 to {MAX_BYTES} bytes", header.numel())
    text = header.detach().cpu().numpy().tobytes()
    try:
        fields = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad(name, "header", "be JSON", error) from None
    if not isinstance(fields, dict):
        raise _bad(name, "header", "be a JSON object", type(fields).__name__)
    if _canonical(fields) != text:
        raise _bad(name, "header", "be canonical JSON (sorted keys, no spaces)", "another spelling")
    return fields


def _check_sizes(fields: dict, field: str, name: str, low: int) -> None:
    sizes = fields[field]
    if not isinstance(sizes, list) or not all(type(size) is int for size in sizes) or len(sizes) != 2:
        raise _bad(name, field, "be two whole numbers", sizes)
    if not all(low <= size <= MAX_SIZE for size in sizes):
        raise _bad(name, field, f"be in [{low}, {MAX_SIZE}]", sizes)


def parse_header(header: Tensor, name: str = "packed state") -> dict:
    """The fields of a header, all of them there and of the right kind, its own checksum right.

    Raises:
        FormatError: anything else; its text begins with ``name`` and says which field is wrong.
    """
    fields = _decoded(header, name)
    if fields.get("magic") != MAGIC:
        raise _bad(name, "magic", f"be {MAGIC!r}", repr(fields.get("magic")))
    version = fields.get("version")
    if type(version) is not int or version < 1:
        raise _bad(name, "version", "be a whole number from 1", repr(version))
    if version > VERSION:
        raise _bad(name, "version", f"be at most {VERSION} (a newer pyops wrote this)", version)
    if tuple(fields) != _FIELDS:
        missing, extra = set(_FIELDS) - set(fields), set(fields) - set(_FIELDS)
        raise _bad(name, "fields", f"be {', '.join(_FIELDS)}", f"without {sorted(missing)}, with {sorted(extra)}")
    for field in ("family", "granularity", "layout", "writer"):
        if not isinstance(fields[field], str):
            raise _bad(name, field, "be text", fields[field])
    if fields["scale"] != "multiply":
        raise _bad(name, "scale", "be 'multiply'", repr(fields["scale"]))
    _check_sizes(fields, "shape", name, 0)
    _check_sizes(fields, "block", name, 1)
    sums = fields["crc32"]
    if not isinstance(sums, dict) or not all(isinstance(v, str) and _HEX.fullmatch(v) for v in sums.values()):
        raise _bad(name, "crc32", "be eight hexadecimal digits for each key", sums)
    if _OWN not in sums:
        raise _bad(name, "crc32", f"have an entry {_OWN!r}", sorted(sums))
    if verifying() and sums[_OWN] != _own_checksum(fields):
        raise _bad(name, "header", f"have the checksum {sums[_OWN]}", _own_checksum(fields))
    return fields


def verifying() -> bool:
    """Whether checksums are compared (PYOPS_VERIFY)."""
    return _environment.values["PYOPS_VERIFY"] != "0"


def check_header(
    header: Tensor, tensors: Mapping[str, Tensor | None], *, family: str, name: str = "packed state"
) -> dict:
    """The fields of a header that belongs to these tensors: the family, the set of keys and every checksum are right.

    ``tensors`` are the other entries of the state by key, None for those that it does without. Shapes and dtypes are
    the family's to compare with ``layout``, ``shape`` and ``granularity``.

    Raises:
        FormatError: with the field or key that is wrong; nothing is changed.
    """
    fields = parse_header(header, name)
    if fields["family"] != family:
        raise _bad(name, "family", f"be {family!r}", repr(fields["family"]))
    given = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    stored = set(fields["crc32"]) - {_OWN}
    if stored != set(given):
        raise _bad(name, "keys", f"be {sorted(stored)}, as in the header", sorted(given))
    for key, tensor in given.items():
        if tensor.is_meta:
            raise _bad(name, key, "have data", "a meta tensor")
        if verifying() and checksum(tensor) != fields["crc32"][key]:
            raise _bad(name, key, f"have the checksum {fields['crc32'][key]}", f"{checksum(tensor)}: it was changed")
    return fields
