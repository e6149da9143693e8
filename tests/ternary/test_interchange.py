"""Foreign formats of ternary weights: byte by byte against the definitions, and against the package gguf."""

from __future__ import annotations

import doctest
import struct

import gguf
import pytest
import torch
from torch import Tensor

from pyops import FormatError
from pyops.ternary import (
    from_gguf_blocks,
    from_hf,
    from_i2s,
    linear_packed,
    load_hf_checkpoint,
    pack,
    to_gguf_blocks,
    to_hf,
    to_i2s,
    unpack,
)
from pyops.ternary.reference import dequantized, quantize_activation

TQ = {"TQ1_0": gguf.GGMLQuantizationType.TQ1_0, "TQ2_0": gguf.GGMLQuantizationType.TQ2_0}
HALF = torch.tensor(0.5)


def ternary(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)


# ---- the definitions, weight by weight ---------------------------------------------------------------------------


def hf_bytes(T: Tensor) -> list[list[int]]:
    """Weight (n, k) is at bits 2 i of byte (n - i R, k), i = n // R, R = ceil(N / 4)."""
    rows = (len(T) + 3) // 4
    found = [[0] * T.shape[1] for _ in range(rows)]
    for n, row in enumerate(T.tolist()):
        for k, t in enumerate(row):
            found[n % rows][k] |= (t + 1) << 2 * (n // rows)
    return found


def tq2_bytes(block: list[int]) -> list[int]:
    found = [0] * 64
    for j in range(2):
        for m in range(32):
            for field in range(4):
                found[32 * j + m] |= (block[128 * j + 32 * field + m] + 1) << 2 * field
    return found


def tq1_bytes(block: list[int]) -> list[int]:
    places = [[32 * n + m for n in range(5)] for m in range(32)]
    places += [[160 + 16 * n + m for n in range(5)] for m in range(16)]
    places += [[240 + 4 * n + j for n in range(4)] for j in range(4)]
    found = []
    for weights in places:
        value = 0
        for k in weights:
            value = 3 * value + block[k] + 1
        value *= 3 ** (5 - len(weights))
        found.append(-(-256 * value // 243))
    return found


def i2s_bytes(T: Tensor, group: int) -> list[int]:
    flat, quarter = T.flatten().tolist(), group // 4
    found = [0] * (len(flat) // 4)
    for k, t in enumerate(flat):
        field, place = k % group // quarter, k % quarter
        found[k // group * quarter + place] |= (t + 1) << (6 - 2 * field)
    return found


# ---- published safetensors ---------------------------------------------------------------------------------------


def test_hf_by_hand():
    """Five rows: R = 2, so that byte (0, k) holds rows 0, 2, 4 and byte (1, k) rows 1, 3."""
    T = torch.tensor([[1, -1], [0, 0], [-1, 1], [1, 1], [0, -1]], dtype=torch.int8)
    published, scale, bias = to_hf(pack(T), HALF, "autobitlinear", in_features=2)
    assert published.tolist() == [[0b01_00_10, 0b00_10_00], [0b10_01, 0b10_01]]
    assert scale.tolist() == [0.5]
    assert bias is None
    packed, gamma, _ = from_hf(published, scale, "autobitlinear", out_features=5)
    assert packed.tolist() == pack(T).tolist()
    assert (gamma.shape, gamma.dtype, gamma.item()) == ((), torch.float32, 0.5)


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_hf_all_small_shapes(linear_class, count_cases):
    """Bytes as defined, and back, for every number of rows and columns; bits of rows that are not there are noise."""
    for rows in range(1, 14):
        for columns in (1, 2, 3, 4, 5, 9):
            T = ternary(rows, columns, rows)
            for fmt in ("t2", "t5"):
                published, scale, _ = to_hf(pack(T, fmt), HALF, linear_class, in_features=columns, fmt=fmt)
                assert published.tolist() == hf_bytes(T)
                assert scale.item() == (0.5 if linear_class == "autobitlinear" else 2.0)
            for n in range(rows, 4 * len(published)):
                published[n % len(published)] |= 3 << 2 * (n // len(published))
            packed, gamma, _ = from_hf(published, scale, linear_class, out_features=rows)
            assert torch.equal(packed, pack(T))
            assert gamma.item() == 0.5
    count_cases(13 * 6)


def test_hf_without_weights():
    packed, gamma, _ = from_hf(torch.empty(0, 7, dtype=torch.uint8), HALF, "bitlinear")
    assert packed.shape == (0, 2)
    assert gamma.item() == 2.0
    assert from_hf(torch.empty(2, 0, dtype=torch.uint8), HALF, "bitlinear")[0].shape == (8, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_hf_gives_what_the_published_layer_computes(linear_class, dtype):
    """In float64: autobitlinear (x_q @ T^T + b) scale, bitlinear acc / (s scale) + b. The scale is used as stored."""
    T, x = ternary(8, 20), torch.randn(3, 20)
    scale, bias = torch.tensor([0.3]).to(dtype), torch.randn(8)
    q, step = (part.double() for part in quantize_activation(x))
    if linear_class == "autobitlinear":
        expected = ((q * step) @ T.double().T + bias.double()) * scale.double()
    else:
        expected = (q @ T.double().T) * step / scale.double() + bias.double()
    published = torch.tensor(hf_bytes(T), dtype=torch.uint8)
    packed, gamma, own_bias = from_hf(published, scale, linear_class, bias=bias)
    y = linear_packed(x, packed, gamma, own_bias, in_features=20)
    assert gamma.item() == (1 / scale.float() if linear_class == "bitlinear" else scale.float()).item()
    # Each of the three roundings of float32, and that of the bias, moves a result by half an ulp of its largest part.
    assert ((y.double() - expected).abs() <= 4 * 2**-23 * (expected.abs() + bias.abs().double())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hf_bias(dtype):
    """autobitlinear: scaled in float32, then rounded once to its dtype; bitlinear: as it is. And back."""
    T, bias, gamma = ternary(6, 4), torch.randn(6).to(dtype), torch.tensor(0.3)
    published = to_hf(pack(T), gamma, "autobitlinear", in_features=4)[0]
    scaled = from_hf(published, gamma, "autobitlinear", out_features=6, bias=bias)[2]
    assert scaled.dtype == dtype
    assert torch.equal(scaled, (bias.float() * gamma).to(dtype))
    assert from_hf(published, gamma, "bitlinear", out_features=6, bias=bias)[2] is bias
    exact = torch.tensor(0.25)
    there = from_hf(published, exact, "autobitlinear", out_features=6, bias=bias)
    assert torch.equal(to_hf(there[0], exact, "autobitlinear", in_features=4, bias=there[2])[2], bias)


def test_hf_scale_of_several_equal_gammas():
    T = ternary(4, 256)
    for gamma in (torch.full((4,), 0.5), torch.full((4, 1), 0.5)):
        assert to_hf(pack(T), gamma, "bitlinear", in_features=256)[1].tolist() == [2.0]


# ---- GGUF --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("type", "definition"), [("TQ1_0", tq1_bytes), ("TQ2_0", tq2_bytes)])
def test_gguf_blocks_by_definition(type, definition):
    T = ternary(3, 512)
    blocks = to_gguf_blocks(pack(T), HALF, in_features=512, type=type)
    scale = list(struct.pack("<e", 0.5))
    expected = [definition(row[:256]) + scale + definition(row[256:]) + scale for row in T.tolist()]
    assert blocks.tolist() == expected
    packed, gamma = from_gguf_blocks(bytes(blocks.flatten().tolist()), 3, 512, type)
    assert torch.equal(packed, pack(T))
    assert gamma.item() == 0.5


def test_gguf_by_hand():
    """All weights -1 but a few: TQ2_0 bits, and TQ1_0 values v as ceil(256 v / 243)."""
    T = torch.full((1, 256), -1, dtype=torch.int8)
    T[0, 0], T[0, 32], T[0, 128 + 96] = 1, 0, 1
    blocks = to_gguf_blocks(pack(T), HALF, in_features=256)[0].tolist()
    assert blocks == [0b00_00_01_10] + [0] * 31 + [0b10_00_00_00] + [0] * 31 + [0x00, 0x38]
    T[0, 128 + 96], T[0, 240] = -1, 1
    blocks = to_gguf_blocks(pack(T), HALF, in_features=256, type="TQ1_0")[0].tolist()
    first, high = -(-256 * (2 * 81 + 27) // 243), -(-256 * 2 * 81 // 243)
    assert blocks == [first] + [0] * 47 + [high, 0, 0, 0] + [0x00, 0x38]


def gammas(rows: int, groups: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"tensor": (), "row": (rows,), "group": (rows, groups)}
    return {name: torch.rand(shape, generator=generator) + 0.01 for name, shape in shapes.items()}


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("type", TQ)
def test_gguf_blocks_are_those_of_the_package_gguf(type, granularity):
    """Bytes of its quantizer; values of its dequantizer, exactly; and the granularity that went in."""
    T = ternary(5, 768)
    T[3], T[1, 256:512] = 0, 0
    gamma = gammas(5, 3)[granularity]
    half = gamma.half().float()
    theirs = torch.from_numpy(gguf.quants.quantize(dequantized(T, half, torch.float32).numpy(), TQ[type]))
    for fmt in ("t2", "t5"):
        assert torch.equal(to_gguf_blocks(pack(T, fmt), gamma, in_features=768, type=type, fmt=fmt), theirs)
    packed, found = from_gguf_blocks(theirs, 5, 768, type)
    assert found.dim() == gamma.dim()
    used = {"tensor": half.bool(), "row": (T != 0).any(1), "group": (T.view(5, 3, 256) != 0).any(2)}[granularity]
    assert torch.equal(found, torch.where(used, half, torch.tensor(1e-5)))
    values = torch.from_numpy(gguf.quants.dequantize(theirs.numpy(), TQ[type]))
    assert torch.equal(dequantized(unpack(packed, "t2", 768), found, torch.float32), values)


def test_gguf_every_value_of_tq1_0():
    """All 243 values of five digits, and all 81 of four, as bytes of the definition."""
    codes = torch.arange(243).view(-1, 1) // 3 ** torch.arange(4, -1, -1) % 3 - 1
    T = torch.zeros(243, 256, dtype=torch.int8)
    for place in (0, 31, 160, 175):  # first and last byte of each part
        step = 32 if place < 160 else 16
        T[:, [place + step * n for n in range(5)]] = codes.to(torch.int8)
    T[:, [243 + 4 * n for n in range(4)]] = codes[:, 1:].to(torch.int8)
    blocks = to_gguf_blocks(pack(T), HALF, in_features=256, type="TQ1_0")
    assert blocks[:, :52].tolist() == [tq1_bytes(row) for row in T.tolist()]
    assert torch.equal(from_gguf_blocks(blocks, 243, 256, "TQ1_0")[0], pack(T))


def test_gguf_every_byte_of_tq1_0():
    """Also the 13 bytes that no encoder writes: as the package gguf reads them."""
    qs = torch.arange(256, dtype=torch.uint8).repeat_interleave(52).view(256, 52)
    data = torch.cat([qs, torch.tensor([[0x00, 0x3C]], dtype=torch.uint8).expand(256, 2)], 1)
    packed, gamma = from_gguf_blocks(data, 256, 256, "TQ1_0")
    theirs = torch.from_numpy(gguf.quants.dequantize(data.contiguous().numpy(), TQ["TQ1_0"]))
    assert gamma.item() == 1.0
    assert torch.equal(unpack(packed, "t2", 256).float(), theirs)


def test_gguf_coarsest_granularity():
    """Blocks of zeros have no say, whatever their scale; nor does a row of them."""
    T = ternary(3, 512).clamp(min=0) | 1  # all weights 1
    T[0, :256] = 0
    blocks = to_gguf_blocks(pack(T), HALF, in_features=512).view(3, 2, 66)

    def scales(*each: float) -> Tensor:
        values = torch.tensor(each).half().view(3, 2, 1).view(torch.uint8)
        return from_gguf_blocks(torch.cat([blocks[..., :64], values], 2), 3, 512)[1]

    assert scales(9, 2, 2, 2, 2, 2).tolist() == 2
    assert scales(0, 2, 2, 2, 2, 2).tolist() == 2
    assert scales(9, 2, 3, 3, 4, 4).tolist() == [2, 3, 4]
    assert torch.equal(scales(9, 2, 3, 3, 4, 5), torch.tensor([[1e-5, 2], [3, 3], [4, 5]]))
    zeros = to_gguf_blocks(pack(T * 0), HALF, in_features=512)
    assert zeros[:, 64:66].tolist() == [[0, 0]] * 3
    assert from_gguf_blocks(zeros, 3, 512)[1].item() == torch.tensor(1e-5).item()


def test_gguf_rounds_the_scale_and_nothing_else():
    T = ternary(4, 256)
    gamma = torch.tensor([0.1, 1 / 3, 1e-6, 65000.0])
    packed, found = from_gguf_blocks(to_gguf_blocks(pack(T), gamma, in_features=256), 4, 256)
    assert torch.equal(packed, pack(T))
    assert torch.equal(found, gamma.half().float())
    assert not torch.equal(found, gamma)


def test_gguf_without_weights():
    for type in TQ:
        assert from_gguf_blocks(b"", 0, 512, type)[0].shape == (0, 128)
        assert from_gguf_blocks(b"", 3, 0, type)[0].shape == (3, 0)
        assert to_gguf_blocks(torch.empty(3, 0, dtype=torch.uint8), HALF, in_features=0, type=type).shape == (3, 0)


# ---- i2_s --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "group"), [("x86", 128), ("arm", 64)])
def test_i2s(arch, group):
    for rows, columns in ((1, group), (3, 2 * group), (5, 3 * group)):
        T, gamma = ternary(rows, columns, rows), torch.tensor(0.3)
        data = to_i2s(pack(T), gamma, arch, in_features=columns)
        size = rows * columns // 4
        assert data[:size].tolist() == i2s_bytes(T, group)
        assert bytes(data[size:].tolist()) == struct.pack("<f", gamma.item()) + bytes(28)
        for stored in (data, data[: size + 4], bytes(data.tolist()), data.view(-1, 4)):
            packed, found = from_i2s(stored, rows, columns, arch)
            assert torch.equal(packed, pack(T))
            assert found.item() == gamma.item()


def test_i2s_by_hand():
    T = torch.full((1, 128), -1, dtype=torch.int8)
    T[0, 0], T[0, 32], T[0, 127] = 1, 0, 1
    data = to_i2s(pack(T), HALF, "x86", in_features=128).tolist()
    assert data[:32] == [0b10_01_00_00] + [0] * 30 + [0b00_00_00_10]
    T[0, 32], T[0, 16] = -1, 0
    data = to_i2s(pack(T), HALF, "arm", in_features=128).tolist()
    assert data[:32] == [0b10_01_00_00] + [0] * 30 + [0b00_00_00_10]


def test_i2s_other_architecture_is_another_matrix():
    T = ternary(2, 128)
    assert not torch.equal(from_i2s(to_i2s(pack(T), HALF, "x86", in_features=128), 2, 128, "arm")[0], pack(T))


# ---- what is refused ---------------------------------------------------------------------------------------------


def u8(*shape: int, value: int = 0x55) -> Tensor:
    return torch.full(shape, value, dtype=torch.uint8)


def tq(value: float | int, code: int = 0xAA, type: str = "TQ2_0") -> bytes:
    """One block, all of whose bytes are ``code``; an int is the bits of its scale."""
    scale = struct.pack("<H", value) if isinstance(value, int) else struct.pack("<e", value)
    return bytes([code] * {"TQ1_0": 52, "TQ2_0": 64}[type]) + scale


def one_bad(data: bytes, at: int) -> bytes:
    return data[:at] + b"\xff" + data[at + 1 :]


BAD_FILES = {
    "hf code 3": (lambda: from_hf(u8(2, 4).fill_(0xD5), HALF, "bitlinear"), "got 3 at byte 0"),
    "hf code 3 later": (
        lambda: from_hf(torch.tensor([[0x55, 0x55], [0x55, 0x75]], dtype=torch.uint8), HALF, "bitlinear"),
        "got 3 at byte 3",
    ),
    "hf dtype": (lambda: from_hf(u8(2, 4).to(torch.int8), HALF, "bitlinear"), "packed must be uint8, got int8"),
    "hf dimensions": (lambda: from_hf(u8(8), HALF, "bitlinear"), r"must have shape \[ceil"),
    "hf rows": (lambda: from_hf(u8(2, 4), HALF, "bitlinear", out_features=9), "3 rows for 9 out_features, got 2"),
    "hf scale 0": (lambda: from_hf(u8(1, 4), HALF * 0, "bitlinear"), "weight_scale must be positive and finite, got 0"),
    "hf scale negative": (lambda: from_hf(u8(1, 4), -HALF, "autobitlinear"), "finite, got -0.5"),
    "hf scale inf": (lambda: from_hf(u8(1, 4), HALF / 0, "autobitlinear"), "finite, got inf"),
    "hf scale nan": (lambda: from_hf(u8(1, 4), HALF * float("nan"), "bitlinear"), "finite, got nan"),
    "hf inverse inf": (lambda: from_hf(u8(1, 4), HALF * 4e-39, "bitlinear"), "1 / weight_scale must be .* got inf"),
    "hf scales": (lambda: from_hf(u8(1, 4), torch.ones(4), "bitlinear"), r"weight_scale must be one number, got \[4\]"),
    "hf scale dtype": (lambda: from_hf(u8(1, 4), torch.tensor(1), "bitlinear"), "floating-point, got int64"),
    "hf bias": (lambda: from_hf(u8(1, 4), HALF, "bitlinear", bias=torch.ones(3)), r"bias must have shape \[4\]"),
    "tq2 code 3": (lambda: from_gguf_blocks(one_bad(tq(1.0), 5), 1, 256), "got 3 at byte 5"),
    "tq2 code 3 later": (lambda: from_gguf_blocks(tq(1.0) + one_bad(tq(1.0), 40), 2, 256), "got 3 at byte 106"),
    "tq length": (lambda: from_gguf_blocks(tq(1.0)[:-1], 1, 256), r"66 bytes \(1 x 1 blocks of 66\), got 65"),
    "tq longer": (lambda: from_gguf_blocks(tq(1.0) + b"0", 1, 256), "got 67"),
    "tq other type": (lambda: from_gguf_blocks(tq(1.0), 1, 256, "TQ1_0"), "have 54 bytes"),
    "tq columns": (lambda: from_gguf_blocks(tq(1.0), 1, 255), "K must be a multiple of 256, got 255"),
    "tq dtype": (lambda: from_gguf_blocks(torch.zeros(66), 1, 256), "data must be uint8, got float32"),
    "tq scale 0": (lambda: from_gguf_blocks(tq(0.0), 1, 256), "got 0 at byte 64"),
    "tq scale negative": (lambda: from_gguf_blocks(tq(1.0) + tq(-1.0), 2, 256), "got -1 at byte 130"),
    "tq scale inf": (lambda: from_gguf_blocks(tq(0x7C00), 1, 256), "got inf at byte 64"),
    "tq scale nan": (lambda: from_gguf_blocks(tq(0x7E00, type="TQ1_0"), 1, 256, "TQ1_0"), "got nan at byte 52"),
    "tq scale nan of zeros": (lambda: from_gguf_blocks(tq(0x7E00, 0x55), 1, 256), "got nan at byte 64"),
    "i2s code 3": (lambda: from_i2s(one_bad(bytes(32), 7) + struct.pack("<f", 1), 1, 128, "x86"), "got 3 at byte 7"),
    "i2s arm code 3": (lambda: from_i2s(one_bad(bytes(32), 20) + struct.pack("<f", 1), 1, 128, "arm"), "at byte 20"),
    "i2s length": (lambda: from_i2s(bytes(35), 1, 128, "x86"), "have 36 or 64 bytes .* got 35"),
    "i2s columns": (lambda: from_i2s(bytes(20), 1, 64, "x86"), "K must be a multiple of 128, got 64"),
    "i2s arm columns": (lambda: from_i2s(bytes(12), 1, 32, "arm"), "K must be a multiple of 64, got 32"),
    "i2s scale 0": (lambda: from_i2s(bytes(36), 1, 128, "x86"), "scale at byte 32 must be positive and finite, got 0"),
    "i2s scale nan": (lambda: from_i2s(bytes(32) + b"\xff" * 4, 1, 128, "x86"), "got nan"),
}


@pytest.mark.row("R13")
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(case):
    call, text = BAD_FILES[case]
    with pytest.raises(FormatError, match=text) as caught:
        call()
    assert str(caught.value).startswith("pyops::from_")


@pytest.mark.row("R13")
def test_not_strict_leaves_a_code_3_to_the_op_that_packs():
    """Which refuses it as well: the weight +2 is nobody's."""
    calls = (
        lambda: from_hf(u8(2, 4, value=0xD5), HALF, "bitlinear", strict=False),
        lambda: from_gguf_blocks(one_bad(tq(1.0), 5), 1, 256, strict=False),
        lambda: from_i2s(one_bad(bytes(32), 7) + struct.pack("<f", 1), 1, 128, "x86", strict=False),
    )
    for call in calls:
        with pytest.raises(FormatError, match="pyops::ternary_repack: source must hold -1, 0 and 1 only, got 2 at"):
            call()


PACKED = pack(torch.ones(4, 256, dtype=torch.int8))
BAD_EXPORTS = {
    "hf rows": (
        lambda: to_hf(PACKED, torch.tensor([1.0, 1, 1, 2]), "bitlinear", in_features=256),
        "same for the whole",
    ),
    "hf gamma 0": (lambda: to_hf(PACKED, HALF * 0, "bitlinear", in_features=256), "gamma must be positive"),
    "hf code 3": (lambda: to_hf(PACKED | 3, HALF, "bitlinear", in_features=256), "codes 0, 1 and 2 only, got 3"),
    "hf gamma dtype": (lambda: to_hf(PACKED, HALF.double(), "bitlinear", in_features=256), "gamma must be float32"),
    "hf gamma shape": (lambda: to_hf(PACKED, torch.ones(5), "bitlinear", in_features=256), r"gamma must have shape \["),
    "hf bias": (lambda: to_hf(PACKED, HALF, "bitlinear", in_features=256, bias=torch.ones(5)), "bias must have shape"),
    "tq columns": (lambda: to_gguf_blocks(PACKED[:, :63], HALF, in_features=252), "in_features must be a multiple"),
    "tq underflow": (lambda: to_gguf_blocks(PACKED, HALF * 1e-9, in_features=256), "finite in float16, got 5e-10"),
    "tq overflow": (lambda: to_gguf_blocks(PACKED, HALF * 2e5, in_features=256), "finite in float16, got 100000"),
    "tq gamma nan": (lambda: to_gguf_blocks(PACKED, HALF * float("nan"), in_features=256), "finite, got nan"),
    "i2s columns": (lambda: to_i2s(PACKED[:, :16], HALF, "x86", in_features=64), "in_features must be a multiple"),
    "i2s rows": (lambda: to_i2s(PACKED, torch.arange(1.0, 5), "arm", in_features=256), "the format has one"),
}  # fmt: skip


@pytest.mark.row("R13")
@pytest.mark.parametrize("case", BAD_EXPORTS)
def test_bad_exports_are_refused(case):
    call, text = BAD_EXPORTS[case]
    with pytest.raises(FormatError, match=text):
        call()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: from_hf(u8(1, 4), HALF, "bitlinear158"), ValueError, "linear_class must be one of 'autobitlinear', "),
        (lambda: from_hf(u8(1, 4), HALF, 1.5), TypeError, "linear_class must be one of"),
        (lambda: from_hf(b"abcd", HALF, "bitlinear"), TypeError, "packed must be a Tensor, got bytes"),
        (lambda: from_hf(u8(1, 4), 0.5, "bitlinear"), TypeError, "weight_scale must be a Tensor, got float"),
        (lambda: from_hf(u8(1, 4), HALF, "bitlinear", out_features=-1), ValueError, "out_features must be at least 0"),
        (lambda: to_hf(PACKED, HALF, "bitlinear", in_features=256, fmt="t2x16"), ValueError, "fmt must be one of"),
        (lambda: to_hf(PACKED, HALF, "bitlinear", in_features=255.0), TypeError, "in_features must be an int"),
        (lambda: to_hf(PACKED, HALF, "bitlinear", in_features=200), RuntimeError, "source must have shape"),
        (lambda: from_gguf_blocks(tq(1.0), 1, 256, "TQ3_0"), ValueError, "type must be one of 'TQ1_0', 'TQ2_0'"),
        (lambda: from_gguf_blocks("data", 1, 256), TypeError, "data must be a Tensor or bytes, got str"),
        (lambda: from_gguf_blocks(tq(1.0), -1, 256), ValueError, "N must be at least 0, got -1"),
        (lambda: from_gguf_blocks(tq(1.0), 1, 1 << 62), ValueError, r"K must be in \[0, 16777216\]"),
        (lambda: from_gguf_blocks(tq(1.0), True, 256), TypeError, "N must be an int, got bool"),
        (lambda: from_i2s(bytes(36), 1, 128, "riscv"), ValueError, "arch must be one of 'x86', 'arm'"),
    ],
)
def test_bad_options_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.row("R42")
def test_sizes_that_no_machine_has_are_refused_at_once():
    for rows in (1 << 40, 1 << 62, 1 << 70):
        with pytest.raises(FormatError, match="bytes"):
            from_gguf_blocks(tq(1.0), rows, 256)
        with pytest.raises(FormatError, match="bytes"):
            from_i2s(bytes(36), rows, 128, "x86")
        with pytest.raises(FormatError, match="rows for"):
            from_hf(u8(1, 4), HALF, "bitlinear", out_features=rows)


@pytest.mark.row("R1")
def test_strided_bytes():
    wide = u8(4, 12, value=0x99)
    assert torch.equal(from_hf(wide[::2, ::3], HALF, "bitlinear")[0], from_hf(wide[:2, :4], HALF, "bitlinear")[0])
    data = torch.tensor(list(tq(1.0)), dtype=torch.uint8)
    padded = torch.stack([data, data * 0], 1)
    assert torch.equal(from_gguf_blocks(padded[:, 0], 1, 256)[0], from_gguf_blocks(data, 1, 256)[0])


# ---- docstrings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [from_hf, to_hf, from_gguf_blocks, to_gguf_blocks, from_i2s, to_i2s, load_hf_checkpoint],
    ids=lambda function: function.__name__,
)
def test_docstring_examples(function):
    (example,) = doctest.DocTestFinder(recurse=False).find(function, globs={})
    assert doctest.DocTestRunner().run(example).failed == 0
    assert len(example.examples) >= 3
