"""The header of packed states: every corruption is found, named, and leaves the layer as it was."""

from __future__ import annotations

import json
import random
import resource
import zlib

import pytest
import torch
from torch import Tensor

import pyops
from pyops import FormatError, _environment, _packed_state
from pyops.ternary import PackedBitLinear, _state, pack

CORRUPTIONS = 200  # of each kind


def layer(fmt: str = "t2", granularity: str = "row", bias: bool = True, seed: int = 0) -> PackedBitLinear:
    """12 x 512, all of whose weights and scales depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    T = torch.randint(-1, 2, (12, 512), generator=generator, dtype=torch.int8)
    gamma = torch.rand({"tensor": (), "row": (12,), "group": (12, 2)}[granularity], generator=generator) + 0.1
    own_bias = torch.randn(12, generator=generator) if bias else None
    return PackedBitLinear.from_packed(
        pack(T, fmt), gamma, own_bias, fmt=fmt, in_features=512, out_features=12
    )  # fmt: skip


def state_of(made: PackedBitLinear) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in made.state_dict().items()}


def header(**changed) -> Tensor:
    """A header with its own checksum right, whatever else is changed; None leaves a field out."""
    fields = json.loads(bytes(state_of(layer())["weight_header"].tolist()))
    fields = {key: value for key, value in {**fields, **changed}.items() if value is not None}
    if isinstance(fields.get("crc32"), dict):
        sums = fields["crc32"] = {key: value for key, value in fields["crc32"].items() if key != "header"}
        sums["header"] = f"{zlib.crc32(canonical(fields)):08x}"
    return as_tensor(canonical(fields))


def canonical(fields: dict) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def as_tensor(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


# ---- what is written ---------------------------------------------------------------------------------------------


def test_header_by_hand():
    """Every field, and checksums of the bytes as zlib has them."""
    weight = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    gamma = torch.tensor(0.5)
    made = _packed_state.make_header(
        family="ternary", layout="t2", shape=(2, 7), granularity="tensor", block=(1, 4),
        tensors={"weight_packed": weight, "weight_gamma": gamma, "bias": None},
    )  # fmt: skip
    assert made.dtype == torch.uint8
    text = bytes(made.tolist())
    others = {
        "weight_packed": f"{zlib.crc32(bytes([1, 2, 3, 4])):08x}",
        "weight_gamma": f"{zlib.crc32(bytes([0, 0, 0, 0x3F])):08x}",
    }
    fields = {
        "magic": "pyops", "version": 1, "family": "ternary", "layout": "t2", "shape": [2, 7], "block": [1, 4],
        "granularity": "tensor", "scale": "multiply", "writer": f"pyops {pyops.__version__}", "crc32": others,
    }  # fmt: skip
    own = f"{zlib.crc32(canonical(fields)):08x}"
    assert text == canonical({**fields, "crc32": {**others, "header": own}})
    assert _packed_state.parse_header(made)["shape"] == [2, 7]


GOLDEN = (
    b'{"block":[1,4],"crc32":{"header":"483eae18","weight_gamma":"9722f221","weight_packed":"b63cfbcd"},'
    b'"family":"ternary","granularity":"tensor","layout":"t2","magic":"pyops","scale":"multiply","shape":[2,7],'
    b'"version":1,"writer":"pyops 0.1.0"}'
)


def test_version_1_is_read_for_ever():
    tensors = {"weight_packed": torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8), "weight_gamma": torch.tensor(0.5)}
    fields = _packed_state.check_header(as_tensor(GOLDEN), tensors, family="ternary")
    assert (fields["layout"], fields["shape"], fields["writer"]) == ("t2", [2, 7], "pyops 0.1.0")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6, dtype=torch.bfloat16).view(2, 3).T,
        torch.arange(12.0)[::3],
        torch.tensor(True),
        torch.empty(0, 3),
        torch.randn(2, dtype=torch.complex64),
        torch.ones(3).expand(2, 3),
    ],
)
def test_checksum_is_of_the_elements_in_row_major_order(tensor):
    data = tensor.clone(memory_format=torch.contiguous_format).untyped_storage().tolist()
    assert _packed_state.checksum(tensor) == f"{zlib.crc32(bytes(data)):08x}"


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("fmt", ["t2", "t5"])
def test_state_round_trip(fmt, granularity):
    made, other = layer(fmt, granularity), layer(fmt, granularity, seed=1)
    state = state_of(made)
    fields = _state.check_state(state)
    assert fields == {
        **fields, "layout": fmt, "granularity": granularity, "shape": [12, 512], "block": [1, {"t2": 4, "t5": 5}[fmt]],
    }  # fmt: skip
    other.load_state_dict(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in state_of(other).items())


# ---- corruption --------------------------------------------------------------------------------------------------


def _flip_bit(state: dict, pick: random.Random) -> str:
    """Of any entry, the header too."""
    key = pick.choice(list(state))
    data = state[key].view(-1).view(torch.uint8)
    at = pick.randrange(data.numel())
    data[at] ^= 1 << pick.randrange(8)
    return f"bit of {key} byte {at}"


def _truncate(state: dict, pick: random.Random) -> str:
    key = pick.choice([key for key in state if state[key].dim()])
    length = len(state[key])
    state[key] = state[key][: pick.randrange(length)].clone()
    return f"{key} of {length} cut to {len(state[key])}"


def _wrong_version(state: dict, pick: random.Random) -> str:
    version = pick.choice([0, -1, 2, 3, 1 << 62, 1.5, 1.0, "1", True, [1], {"version": 1}, pick.randrange(2, 10**9)])
    state["weight_header"] = header(version=version)
    return f"version {version}"


def _wrong_shape(state: dict, pick: random.Random) -> str:
    """In the header, checksum and all; or of a tensor."""
    if pick.random() < 0.5:
        sizes = [11, 13, 24, 0, -1, 6, 511, 513, 256, 1 << 62, 12.0, "12", True, None]
        shape = pick.choice([[pick.choice(sizes), 512], [12, pick.choice(sizes)], [12], [12, 512, 1], 12, "12x512"])
        state["weight_header"] = header(shape=shape)
        return f"shape {shape}"
    key = pick.choice(["weight_packed", "weight_gamma", "bias"])
    shapes = {"weight_packed": [(24, 64), (6, 256), (1536,)], "weight_gamma": [(12, 1), (1, 12), (4, 3)],
              "bias": [(12, 1), (3, 4), (1, 12)]}  # fmt: skip
    state[key] = state[key].reshape(pick.choice(shapes[key]))
    return f"{key} {list(state[key].shape)}"


def _swap(state: dict, pick: random.Random) -> str:
    """Two tensors of a layer, or one with that of another layer."""
    if pick.random() < 0.3:
        first, second = pick.sample(list(state), 2)
        state[first], state[second] = state[second], state[first]
        return f"{first} and {second}"
    key = pick.choice(list(state))
    state[key] = state_of(layer(seed=pick.randrange(1, 10**6)))[key]
    return f"{key} of another layer"


def error_of(function, argument, what: object) -> str:
    """The text of the FormatError that a call must raise."""
    try:
        function(argument)
    except FormatError as error:
        return str(error)
    pytest.fail(f"not found: {what}")


@pytest.mark.row("R40")
@pytest.mark.parametrize("corrupt", [_flip_bit, _truncate, _wrong_version, _wrong_shape, _swap])
def test_corruption_is_found_and_changes_nothing(corrupt, count_cases):
    """By load_state_dict and, where it depends on the state alone, by the check of a file."""
    pick = random.Random(0)
    good, own = state_of(layer()), layer(seed=99)
    before = state_of(own)
    for _ in range(CORRUPTIONS):
        bad = {key: tensor.clone() for key, tensor in good.items()}
        what = corrupt(bad, pick)
        assert "PackedBitLinear: " in error_of(own.load_state_dict, bad, what)
        assert error_of(_state.check_state, bad, what)
    assert all(torch.equal(tensor, before[key]) for key, tensor in state_of(own).items())
    own.load_state_dict(good)
    assert torch.equal(own.weight_packed, good["weight_packed"])
    count_cases(CORRUPTIONS)


@pytest.mark.row("R40")
def test_every_bit_of_the_header(count_cases):
    good = state_of(layer())
    tensors = {key: tensor for key, tensor in good.items() if key != "weight_header"}
    for at in range(len(good["weight_header"])):
        for bit in range(8):
            bad = good["weight_header"].clone()
            bad[at] ^= 1 << bit
            error_of(lambda bad: _packed_state.check_header(bad, tensors, family="ternary"), bad, (at, bit))
    count_cases(8 * len(good["weight_header"]))


SUMS = {"weight_packed": "0" * 8, "weight_gamma": "0" * 8, "bias": "0" * 8}
BAD_HEADERS = {
    "no tensor": (lambda: b"text", "header must be a uint8 tensor, got bytes"),
    "dtype": (lambda: header().to(torch.int8), r"header must be uint8 \[bytes\], got int8"),
    "dimensions": (lambda: header()[None], r"header must be uint8 \[bytes\], got uint8 \[1, "),
    "meta": (lambda: torch.empty(9, dtype=torch.uint8, device="meta"), "header must have data"),
    "empty": (lambda: as_tensor(b""), "have 1 to 65536 bytes, got 0"),
    "too long": (lambda: torch.full((65537,), 0x20, dtype=torch.uint8), "have 1 to 65536 bytes, got 65537"),
    "not UTF-8": (lambda: as_tensor(b'{"magic":"\xff"}'), "header must be JSON, got 'utf-8' codec"),
    "not JSON": (lambda: as_tensor(b"magic: pyops"), "header must be JSON, got Expecting value"),
    "truncated": (lambda: header()[:-1], "header must be JSON"),
    "nested": (lambda: as_tensor(b"[" * 60000), "header must be JSON, got"),
    "huge number": (lambda: as_tensor(b'{"version":' + b"9" * 60000 + b"}"), "header must be JSON, got"),
    "a list": (lambda: as_tensor(b"[]"), "header must be a JSON object, got list"),
    "spaces": (lambda: as_tensor(b" " + bytes(header().tolist())), "canonical JSON"),
    "twice": (lambda: as_tensor(b'{"magic":"pyops","magic":"pyops"}'), "a key stands twice"),
    "no magic": (lambda: header(magic=None), "magic must be 'pyops', got None"),
    "magic": (lambda: header(magic="pyopz"), "magic must be 'pyops', got 'pyopz'"),
    "newer": (lambda: header(version=2), r"version must be at most 1 \(a newer pyops wrote this\), got 2"),
    "version 0": (lambda: header(version=0), "version must be a whole number from 1, got 0"),
    "missing": (lambda: header(granularity=None), r"without \['granularity'\]"),
    "extra": (lambda: header(comment="hello"), r"with \['comment'\]"),
    "family": (lambda: header(family="spherical"), "family must be 'ternary', got 'spherical'"),
    "family kind": (lambda: header(family=["ternary"]), "family must be text"),
    "layout": (lambda: header(layout="t2x16"), "layout must be one of t2, t5, got 't2x16'"),
    "layout t5": (lambda: header(layout="t5"), r"block must be \[1, 5\], got \[1, 4\]"),
    "granularity": (lambda: header(granularity="column"), "granularity must be 'tensor', 'row' or 'group'"),
    "other granularity": (lambda: header(granularity="tensor"), r"weight_gamma must have shape \[\], got \[12\]"),
    "group": (lambda: header(granularity="group"), r"weight_gamma must have shape \[12, 2\], got \[12\]"),
    "scale": (lambda: header(scale="divide"), "scale must be 'multiply', got 'divide'"),
    "shape": (lambda: header(shape=[13, 512]), r"weight_packed must have shape \[13, 128\], got \[12, 128\]"),
    "shape kind": (lambda: header(shape=[12.0, 512]), "shape must be two whole numbers"),
    "negative": (lambda: header(shape=[-12, 512]), "shape must be in"),
    "2^62": (lambda: header(shape=[1 << 62, 1 << 62]), r"shape must be in \[0, 281474976710656\]"),
    "2^48": (lambda: header(shape=[1 << 48, 512]), "weight_packed must have shape"),
    "columns": (lambda: header(shape=[12, 1 << 30]), "shape must have at most 16777216 columns"),
    "block": (lambda: header(block=[2, 2]), r"block must be \[1, 4\]"),
    "block 0": (lambda: header(block=[0, 4]), "block must be in"),
    "no sums": (lambda: header(crc32=[]), "crc32 must be eight hexadecimal digits"),
    "sum kind": (lambda: header(crc32={**SUMS, "bias": 7}), "crc32 must be eight hexadecimal digits"),
    "sum case": (lambda: header(crc32={**SUMS, "bias": "0000000A"}), "crc32 must be eight hexadecimal digits"),
    "sums of others": (lambda: header(crc32={"weight": "0" * 8}), r"keys must be \['weight'\], as in the header"),
    "wrong sums": (lambda: header(crc32=SUMS), "weight_packed must have the checksum 00000000, got"),
    "edited": (lambda: as_tensor(bytes(header().tolist()).replace(b"[12,512]", b"[12,511]")), "header must have the"),
}


@pytest.mark.row("R13", "R42")
@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused(case):
    """With the layer and the field; without memory for what they claim; and nothing is loaded."""
    make, text = BAD_HEADERS[case]
    own, good = layer(seed=99), state_of(layer())
    before = state_of(own)
    bad = make()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=text) as caught:
        _state.check_state({**good, "weight_header": bad}, "blocks.0") if isinstance(bad, Tensor) else (
            _packed_state.parse_header(bad, "blocks.0")
        )
    assert str(caught.value).startswith("blocks.0: ")
    assert len(str(caught.value)) < 300
    if isinstance(bad, Tensor):
        with pytest.raises(FormatError, match=text):
            own.load_state_dict({**good, "weight_header": bad})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 64 << 10  # KiB
    assert all(torch.equal(tensor, before[key]) for key, tensor in state_of(own).items())


def with_sums(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with a header that has the right checksums of what it holds now."""
    sums = {key: _packed_state.checksum(tensor) for key, tensor in state.items() if key != "weight_header"}
    return {**state, "weight_header": header(crc32=sums)}


BAD_TENSORS = {
    "code 3": ("weight_packed", lambda t: t | 3, "weight_packed must hold the codes 0, 1 and 2 only, got byte"),
    "packed dtype": ("weight_packed", lambda t: t.to(torch.int8), "weight_packed must be uint8, got int8"),
    "gamma dtype": ("weight_gamma", lambda t: t.double(), "weight_gamma must be float32, got float64"),
    "gamma 0": ("weight_gamma", lambda t: t * 0, "weight_gamma must be positive and finite, got 0 at element 0"),
    "gamma negative": ("weight_gamma", lambda t: -t, "weight_gamma must be positive and finite, got -"),
    "gamma inf": ("weight_gamma", lambda t: t / 0, "got inf"),
    "gamma nan": ("weight_gamma", lambda t: t * float("nan"), "got nan"),
    "bias dtype": ("bias", lambda t: t.to(torch.int32), "bias must be floating-point, got int32"),
    "bias size": ("bias", lambda t: t[:5], r"bias must have shape \[12\], got \[5\]"),
    "no bias": ("bias", lambda t: None, "keys must be"),
    "no packed": ("weight_packed", lambda t: None, "weight_packed must be there, got nothing"),
    "no header": ("weight_header", lambda t: None, "weight_header must be there, got nothing"),
}


@pytest.mark.row("R13")
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_with_right_checksums_and_wrong_values_are_refused(case):
    key, change, text = BAD_TENSORS[case]
    state = state_of(layer())
    changed = change(state[key])
    if changed is None:
        del state[key]
    else:
        state = with_sums({**state, key: changed})
    with pytest.raises(FormatError, match=text):
        _state.check_state(state)


@pytest.mark.row("R13")
@pytest.mark.parametrize("field", range(4))
def test_code_3_is_found_in_each_field(field):
    packed = state_of(layer())["weight_packed"]
    packed[2, 9] = packed[2, 9] & ~(3 << 2 * field) | 3 << 2 * field
    with pytest.raises(FormatError, match=f"got byte {packed[2, 9]} at byte 265"):
        _state.check_codes(packed, "t2", "weight_packed")


@pytest.mark.row("R13")
def test_groups_are_whole():
    tensors = {"weight_packed": torch.full((2, 75), 0x55, dtype=torch.uint8), "weight_gamma": torch.ones(2, 1)}
    made = _state.make_header(*tensors.values(), None, fmt="t2", shape=(2, 300))
    with pytest.raises(FormatError, match="shape must have whole groups of 256 columns, got 300"):
        _state.check_state({**tensors, "weight_header": made})


@pytest.mark.row("R13")
def test_t5_bytes_above_242_are_refused():
    state = state_of(layer("t5"))
    state["weight_packed"][3, 5] = 243
    with pytest.raises(FormatError, match="got byte 243 at byte 314"):
        _state.check_codes(state["weight_packed"], "t5", "weight_packed")


# ---- PYOPS_VERIFY ------------------------------------------------------------------------------------------------


def test_verify_0_leaves_out_checksums_and_nothing_else(monkeypatch):
    state, own = state_of(layer()), layer(seed=1)
    state["bias"] += 1
    with pytest.raises(FormatError, match=r"bias must have the checksum [0-9a-f]{8}, got [0-9a-f]{8}: it was changed"):
        own.load_state_dict(state)
    monkeypatch.setitem(_environment.values, "PYOPS_VERIFY", "0")
    own.load_state_dict(state)
    assert torch.equal(own.bias, state["bias"])
    edited = bytes(state["weight_header"].tolist()).replace(b"pyops 0", b"pyops 9")
    own.load_state_dict({**state, "weight_header": as_tensor(edited)})
    for bad in ("magic", "2^62", "truncated", "layout", "shape", "newer"):
        with pytest.raises(FormatError, match=BAD_HEADERS[bad][1]):
            own.load_state_dict({**state, "weight_header": BAD_HEADERS[bad][0]()})
    state["weight_packed"][0, 0] = 0xFF
    with pytest.raises(FormatError, match="codes 0, 1 and 2"):
        own.load_state_dict(state)
