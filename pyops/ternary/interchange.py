"""Ternary weights in the formats of other programs: to canonical t2 and gamma without loss, and back.

An importer moves codes; it never rounds a weight again. What it returns goes into
:func:`pyops.ternary.linear_packed` or ``pyops.nn.PackedBitLinear.from_packed``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyops._checks import FormatError, dtype_name, shape_name
from pyops.ternary import _options
from pyops.ternary._formats import CANONICAL, GROUP, MAX_IN_FEATURES
from pyops.ternary._state import check_gamma
from pyops.ternary.repack import pack, unpack

LINEAR_CLASSES = ("autobitlinear", "bitlinear")
ZERO_GAMMA = 1e-5  # of weights that are all 0: what the quantizer gives them
_ZERO = 1  # the code of weight 0


#: Bytes of codes in a block of 256 weights; a float16 scale follows.
GGUF_TYPES = {"TQ1_0": 52, "TQ2_0": 64}
_I2S_GROUPS = {"x86": 128, "arm": 64}
_I2S_TAIL = 32  # bytes after the codes: the float32 scale, then padding
_PLACES = (1, 3, 9, 27, 81)


# ---- shared by all -----------------------------------------------------------------------------------------------


def _require(good: bool, op: str, argument: str, rule: str, got: object, error: type[Exception] = FormatError) -> None:
    if not good:
        raise error(f"pyops::{op}: {argument} must {rule}, got {got}")


def _size(op: str, argument: str, value: object, most: int | None = None) -> int:
    _require(isinstance(value, int) and not isinstance(value, bool), op, argument, "be an int", type(value).__name__,
             TypeError)  # fmt: skip
    rule = "be at least 0" if most is None else f"be in [0, {most}]"
    _require(value >= 0 and (most is None or value <= most), op, argument, rule, value, ValueError)
    return value


def _shape(op: str, N: object, K: object) -> tuple[int, int]:
    return _size(op, "N", N), _size(op, "K", K, MAX_IN_FEATURES)


def _bytes(op: str, data: object, expected: tuple[int, ...], layout: str) -> Tensor:
    """The bytes of a tensor or of a bytes-like object, one of the lengths expected."""
    if isinstance(data, Tensor):
        _require(data.dtype == torch.uint8, op, "data", "be uint8", dtype_name(data.dtype))
        flat = data.contiguous().reshape(-1)
    elif isinstance(data, (bytes, bytearray, memoryview)):
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
    else:
        _require(False, op, "data", "be a Tensor or bytes", type(data).__name__, TypeError)
    lengths = " or ".join(map(str, expected))
    _require(flat.numel() in expected, op, "data", f"have {lengths} bytes ({layout})", flat.numel())
    return flat


def _check_codes(op: str, argument: str, codes: Tensor, byte_of) -> None:
    """Codes as they lie in the file; ``byte_of(position)`` is the byte that an element came from."""
    wrong = codes > 2
    if bool(wrong.any()):
        at = int(wrong.flatten().nonzero()[0])
        where = byte_of(tuple(int(i) for i in torch.unravel_index(torch.tensor(at), codes.shape)))
        value = int(codes.flatten()[at])
        raise FormatError(f"pyops::{op}: {argument} must hold the codes 0, 1 and 2 only, got {value} at byte {where}")


def _packed(codes: Tensor, N: int, K: int) -> Tensor:
    """Codes in row-major order as t2; the op rejects a code 3."""
    return pack(codes.reshape(N, K).to(torch.int8) - 1, "t2")


def _codes(op: str, packed: Tensor, gamma: Tensor, fmt: str, in_features: int) -> Tensor:
    """uint8 codes [N, K] of a canonical format, its gamma checked."""
    _options.choice(op, "fmt", fmt, CANONICAL)
    _size(op, "in_features", in_features, MAX_IN_FEATURES)
    codes = (unpack(packed, fmt, in_features) + 1).to(torch.uint8)
    _options.tensor(op, "gamma", gamma)
    _require(gamma.dtype == torch.float32, op, "gamma", "be float32", dtype_name(gamma.dtype))
    rows, shape = len(codes), tuple(gamma.shape)
    fits = shape in ((), (rows,)) or (in_features % GROUP == 0 and shape == (rows, in_features // GROUP))
    rule = f"have shape [], [{rows}] or [{rows}, in_features / 256]"
    _require(fits, op, "gamma", rule, shape_name(gamma))
    check_gamma(gamma, f"pyops::{op}: gamma")
    return codes


def _one_gamma(op: str, gamma: Tensor) -> Tensor:
    """The one scale of a whole tensor, which is all that some formats have."""
    same = gamma.numel() > 0 and bool((gamma == gamma.flatten()[0]).all())
    _require(same, op, "gamma", "be the same for the whole tensor (the format has one)", shape_name(gamma))
    return gamma.flatten()[0]


# ---- published safetensors (quantization method "bitnet") --------------------------------------------------------


def _check_linear_class(op: str, linear_class: object) -> bool:
    """Whether the stored scale divides."""
    return bool(_options.choice(op, "linear_class", linear_class, LINEAR_CLASSES))


def from_hf(
    packed: Tensor,
    weight_scale: Tensor,
    linear_class: str,
    *,
    out_features: int | None = None,
    bias: Tensor | None = None,
    strict: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights of a published 1.58-bit safetensors checkpoint (``quant_method: bitnet``) as t2 and gamma.

    Bits ``[2i + 1 : 2i]`` of byte ``(r, k)`` are the code of weight ``(i R + r, k)``, ``R = ceil(out_features / 4)``.

    Args:
        packed: uint8 ``[R, in_features]``.
        weight_scale: one positive number, any floating dtype. For ``linear_class="autobitlinear"`` it multiplies
            (``gamma = weight_scale``), for ``"bitlinear"`` it divides (``gamma = 1 / weight_scale``). The file's
            configuration says which; a wrong choice is wrong by ``gamma ** 2``.
        out_features: 4 R by default; bits of rows beyond it are ignored.
        bias: ``[out_features]`` or None. The published loader of ``"autobitlinear"`` adds it before it scales, so
            there it is multiplied by weight_scale (in float32, then rounded to its dtype).
        strict: check the codes here, with the byte in the error. False leaves it to the packing op, which rejects
            them too.

    Returns:
        ``(packed, gamma, bias)``: uint8 ``[out_features, ceil(in_features / 4)]``, float32 ``[]``, bias or None.
        Codes and an "autobitlinear" scale without loss; a "bitlinear" scale is inverted in float32. Not
        differentiable; deterministic.

    Raises:
        FormatError: a code 3, a scale that is not positive and finite, a tensor of another dtype or shape.
        ValueError, TypeError: an option.

    Source: the packing of released b1.58 models, arXiv 2504.12285.

    Example:
        >>> import torch, pyops
        >>> published = torch.tensor([[0b10010010, 0b01100001]], dtype=torch.uint8)
        >>> packed, gamma, _ = pyops.ternary.from_hf(published, torch.tensor([2.0]), "bitlinear")
        >>> pyops.ternary.unpack(packed, "t2", 2).tolist(), gamma.item()
        ([[1, 0], [-1, -1], [0, 1], [1, 0]], 0.5)
    """
    op = "from_hf"
    divides = _check_linear_class(op, linear_class)
    for name, value in (("packed", packed), ("weight_scale", weight_scale)):
        _options.tensor(op, name, value)
    _options.tensor(op, "bias", bias, optional=True)
    _require(packed.dtype == torch.uint8, op, "packed", "be uint8", dtype_name(packed.dtype))
    _require(packed.dim() == 2, op, "packed", "have shape [ceil(out_features / 4), in_features]", shape_name(packed))
    rows, columns = packed.shape
    N = 4 * rows if out_features is None else _size(op, "out_features", out_features)
    _require(rows == (N + 3) // 4, op, "packed", f"have {(N + 3) // 4} rows for {N} out_features", rows)
    _require(columns <= MAX_IN_FEATURES, op, "packed", f"have at most {MAX_IN_FEATURES} columns", columns)
    gamma = _hf_gamma(op, weight_scale, divides)
    if bias is not None:
        _require(tuple(bias.shape) == (N,), op, "bias", f"have shape [{N}]", shape_name(bias))
        _require(bias.is_floating_point(), op, "bias", "be floating-point", dtype_name(bias.dtype))
        bias = bias if divides else (bias.float() * gamma.to(bias.device)).to(bias.dtype)
    codes = torch.cat([(packed >> shift) & 3 for shift in (0, 2, 4, 6)])[:N]
    if strict:
        _check_codes(op, "packed", codes, lambda at: at[0] % rows * columns + at[1])
    return _packed(codes, N, columns), gamma, bias


def _hf_gamma(op: str, weight_scale: Tensor, divides: bool) -> Tensor:
    floating = weight_scale.is_floating_point()
    _require(floating, op, "weight_scale", "be floating-point", dtype_name(weight_scale.dtype))
    _require(weight_scale.numel() == 1, op, "weight_scale", "be one number", shape_name(weight_scale))
    wide = weight_scale.float().reshape(())
    check_gamma(wide, f"pyops::{op}: weight_scale")
    gamma = 1 / wide if divides else wide.clone()
    check_gamma(gamma, f"pyops::{op}: 1 / weight_scale")
    return gamma


def to_hf(
    packed: Tensor,
    gamma: Tensor,
    linear_class: str,
    *,
    in_features: int,
    bias: Tensor | None = None,
    fmt: str = "t2",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of :func:`from_hf`: bytes as the published packer makes them.

    Args:
        packed: weights in the canonical format ``fmt`` (``"t2"`` or ``"t5"``) with ``in_features`` columns.
        gamma: float32, positive; several must be equal, since the format has one scale.
        linear_class: ``"autobitlinear"`` (``weight_scale = gamma``, bias divided by it) or ``"bitlinear"``
            (``weight_scale = 1 / gamma``).
        bias: ``[out_features]`` or None.

    Returns:
        ``(packed, weight_scale, bias)``: uint8 ``[ceil(out_features / 4), in_features]``, float32 ``[1]``, bias or
        None. Bits of rows beyond out_features are 0. The codes come back exactly; a scale that was inverted, or a
        bias that was divided, to the last bit of its dtype.

    Raises:
        FormatError: codes or scales that the format cannot hold. ValueError, TypeError: an option.

    Source: the packing of released b1.58 models, arXiv 2504.12285.

    Example:
        >>> import torch, pyops
        >>> packed = pyops.ternary.pack(torch.tensor([[1, 0], [-1, -1], [0, 1], [1, 0]], dtype=torch.int8))
        >>> published, scale, _ = pyops.ternary.to_hf(packed, torch.tensor(0.5), "bitlinear", in_features=2)
        >>> [bin(byte) for byte in published[0].tolist()], scale.item()
        (['0b10010010', '0b1100001'], 2.0)
    """
    op = "to_hf"
    divides = _check_linear_class(op, linear_class)
    codes = _codes(op, packed, gamma, fmt, in_features)
    scale = _one_gamma(op, gamma)
    if bias is not None:
        _options.tensor(op, "bias", bias)
        _require(tuple(bias.shape) == codes.shape[:1], op, "bias", f"have shape [{len(codes)}]", shape_name(bias))
        bias = bias if divides else (bias.float() / scale.to(bias.device)).to(bias.dtype)
    rows = (len(codes) + 3) // 4
    fields = torch.nn.functional.pad(codes, (0, 0, 0, 4 * rows - len(codes))).view(4, rows, in_features)
    published = fields[0] | (fields[1] << 2) | (fields[2] << 4) | (fields[3] << 6)
    weight_scale = (1 / scale if divides else scale).reshape(1)
    check_gamma(weight_scale, f"pyops::{op}: weight_scale")
    return published, weight_scale, bias


# ---- GGUF blocks -------------------------------------------------------------------------------------------------


def _tq2_codes(qs: Tensor) -> Tensor:
    """[blocks, 64] bytes as codes [blocks, 256]: half j, field l, byte m is weight 128 j + 32 l + m."""
    halves = qs.view(-1, 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=qs.device).view(1, 1, 4, 1)
    return ((halves >> shifts) & 3).reshape(-1, 256)


def _tq2_bytes(codes: Tensor) -> Tensor:
    fields = codes.view(-1, 2, 4, 32)
    return (fields[:, :, 0] | fields[:, :, 1] << 2 | fields[:, :, 2] << 4 | fields[:, :, 3] << 6).reshape(-1, 64)


# The parts of a TQ1_0 block: bytes, and digits a byte.
_TQ1_PARTS = ((32, 5), (16, 5), (4, 4))


def _tq1_codes(qs: Tensor) -> Tensor:
    """[blocks, 52] bytes as codes [blocks, 256]: a byte holds ceil(256 v / 243) of v, five base-3 digits with the
    first the most significant; digit n of byte m of a part of b bytes is its weight b n + m."""
    found = []
    for part, (_, digits) in zip(qs.split([size for size, _ in _TQ1_PARTS], 1), _TQ1_PARTS, strict=True):
        places = torch.tensor(_PLACES[:digits], dtype=torch.int16, device=qs.device).view(1, digits, 1)
        shifted = (part.to(torch.int16)[:, None] * places) & 255
        found.append(((shifted * 3) >> 8).flatten(1))
    return torch.cat(found, 1).to(torch.uint8)


def _tq1_bytes(codes: Tensor) -> Tensor:
    found = []
    for part, (size, digits) in zip(codes.split([size * n for size, n in _TQ1_PARTS], 1), _TQ1_PARTS, strict=True):
        places = torch.tensor(_PLACES[::-1][:digits], dtype=torch.int32, device=codes.device).view(1, digits, 1)
        value = (part.reshape(-1, digits, size).to(torch.int32) * places).sum(1)
        found.append((256 * value + 242) // 243)
    return torch.cat(found, 1).to(torch.uint8)


_TO_CODES = {"TQ1_0": _tq1_codes, "TQ2_0": _tq2_codes}
_TO_BYTES = {"TQ1_0": _tq1_bytes, "TQ2_0": _tq2_bytes}


def _gguf_groups(op: str, type: object, argument: str, K: int) -> int:
    """Blocks of a row."""
    _options.choice(op, "type", type, tuple(GGUF_TYPES))
    _require(K % GROUP == 0, op, argument, "be a multiple of 256", K)
    return K // GROUP


def from_gguf_blocks(
    data: Tensor | bytes, N: int, K: int, type: str = "TQ2_0", *, strict: bool = True
) -> tuple[Tensor, Tensor]:
    """Weights of a GGUF tensor of type TQ1_0 (34) or TQ2_0 (35) as t2 and gamma.

    Blocks of 256 weights of a row, each with a float16 scale: 54 bytes in TQ1_0 (five base-3 digits a byte), 66 in
    TQ2_0 (two bits a weight).

    Args:
        data: the tensor's bytes, or uint8 of any shape.
        N, K: rows and columns; K is a multiple of 256.
        type: ``"TQ1_0"`` or ``"TQ2_0"``.
        strict: check the codes here, with the byte in the error. False leaves it to the packing op, which rejects
            them too.

    Returns:
        ``(packed, gamma)``: uint8 ``[N, K / 4]`` and float32 gamma: ``[]`` if all scales of blocks with a non-zero
        weight are equal, else ``[N]`` if they are in every row, else ``[N, K / 256]``. The scale of a block of zeros
        is ignored; where nothing else gives a gamma it is 1e-5. Without loss; not differentiable; deterministic.

    Raises:
        FormatError: another number of bytes, a code 3, a scale that is negative or not finite, or 0 for weights that
        are not. ValueError, TypeError: an option.

    Source: the GGUF types TQ1_0 and TQ2_0.

    Example:
        >>> import torch, pyops
        >>> block = bytes([0b01010110] + 63 * [0b01010101]) + bytes([0x00, 0x38])  # one weight 1, scale 0.5
        >>> packed, gamma = pyops.ternary.from_gguf_blocks(block, 1, 256)
        >>> pyops.ternary.unpack(packed, "t2", 256)[0, :3].tolist(), gamma.item()
        ([1, 0, 0], 0.5)
    """
    op = "from_gguf_blocks"
    rows, columns = _shape(op, N, K)
    groups = _gguf_groups(op, type, "K", columns)
    code_bytes = GGUF_TYPES[type]
    size = code_bytes + 2
    blocks = _bytes(op, data, (rows * groups * size,), f"{rows} x {groups} blocks of {size}").view(-1, size)
    codes = _TO_CODES[type](blocks[:, :code_bytes].contiguous())
    if strict and type == "TQ2_0":  # any byte of TQ1_0 is five digits
        _check_codes(op, "data", codes, lambda at: at[0] * size + at[1] // 128 * 32 + at[1] % 32)
    scale = blocks[:, code_bytes:].contiguous().view(torch.float16).reshape(-1).float()
    used = (codes != _ZERO).any(1)
    _check_block_scales(op, scale, used, code_bytes)
    gamma = _coarsest(scale.view(rows, groups), used.view(rows, groups))
    return _packed(codes, rows, columns), gamma


def _check_block_scales(op: str, scale: Tensor, used: Tensor, code_bytes: int) -> None:
    wrong = ~(scale >= 0) | scale.isinf() | (used & (scale == 0))
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        value, where = scale[at].item(), at * (code_bytes + 2) + code_bytes
        raise FormatError(
            f"pyops::{op}: data must have block scales that are finite, not negative, and not 0 where a weight is "
            f"not 0, got {value:g} at byte {where}"
        )


def _coarsest(scale: Tensor, used: Tensor) -> Tensor:
    """Block scales [N, groups] as gamma of the coarsest granularity that says the same."""
    zero = torch.full((), ZERO_GAMMA, device=scale.device)
    if not bool(used.any()):
        return zero
    largest = torch.where(used, scale, 0).amax(1)  # of a row; equal to the smallest, or there is a gamma per group
    if bool((scale == largest.amax())[used].all()):
        return largest.amax()
    if bool((scale == largest[:, None])[used].all()):
        return torch.where(used.any(1), largest, zero)
    return torch.where(used, scale, zero)


def to_gguf_blocks(packed: Tensor, gamma: Tensor, *, in_features: int, type: str = "TQ2_0", fmt: str = "t2") -> Tensor:
    """The inverse of :func:`from_gguf_blocks`: bytes as the reference quantizer makes them of the same weights.

    **The scales lose precision**: a block has a float16, so gamma is rounded to 11 significant bits (to nearest, ties
    to even; relative error up to 2**-11, more below 6.1e-5). The codes are exact.

    Args:
        packed: weights in the canonical format ``fmt`` (``"t2"`` or ``"t5"``); ``in_features``, its columns, is a
            multiple of 256.
        gamma: float32, positive: ``[]``, ``[out_features]`` or ``[out_features, in_features / 256]``.
        type: ``"TQ1_0"`` or ``"TQ2_0"``.

    Returns:
        uint8 ``[out_features, in_features / 256 * block bytes]``, block bytes being 54 or 66. A block of zeros has
        scale 0.

    Raises:
        FormatError: a gamma that is 0 or infinite in float16, a size that the format cannot hold. ValueError,
        TypeError: an option.

    Source: the GGUF types TQ1_0 and TQ2_0.

    Example:
        >>> import torch, pyops
        >>> packed = pyops.ternary.pack(torch.ones(1, 256, dtype=torch.int8))
        >>> blocks = pyops.ternary.to_gguf_blocks(packed, torch.tensor(0.5), in_features=256)
        >>> blocks.shape, blocks[0, 0].item(), blocks[0, -2:].tolist()
        (torch.Size([1, 66]), 170, [0, 56])
    """
    op = "to_gguf_blocks"
    groups = _gguf_groups(op, type, "in_features", _size(op, "in_features", in_features, MAX_IN_FEATURES))
    codes = _codes(op, packed, gamma, fmt, in_features)
    rows = len(codes)
    each = (gamma[:, None] if gamma.dim() == 1 else gamma).expand(rows, groups).reshape(-1)
    codes = codes.reshape(-1, GROUP)
    used = (codes != _ZERO).any(1)
    scale = torch.where(used, each, 0).half()
    wrong = used & ((scale == 0) | scale.isinf())
    if bool(wrong.any()):
        value = each[wrong][0].item()
        _require(False, op, "gamma", "be positive and finite in float16", f"{value:g}")
    return torch.cat([_TO_BYTES[type](codes), scale[:, None].view(torch.uint8)], 1).view(rows, -1)


# ---- bitnet.cpp i2_s ---------------------------------------------------------------------------------------------


def _i2s_layout(op: str, arch: object, K: int) -> int:
    """Weights of a group, whose four quarters lie in the four fields of its bytes."""
    _options.choice(op, "arch", arch, tuple(_I2S_GROUPS))
    group = _I2S_GROUPS[str(arch)]
    _require(K % group == 0, op, "K" if op == "from_i2s" else "in_features", f"be a multiple of {group}", K)
    return group


def from_i2s(
    data: Tensor | bytes, N: int, K: int, arch: str, *, strict: bool = True
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights of a bitnet.cpp tensor of type i2_s as t2 and gamma.

    Row-major groups of ``4 p`` weights lie in p bytes: bits ``7:6`` of byte i hold weight i, ``5:4`` weight
    ``p + i``, ``3:2`` weight ``2 p + i``, ``1:0`` weight ``3 p + i``; p is 32 in files for x86, 16 in those for ARM.
    A little-endian float32 scale follows at byte ``N K / 4``.

    Args:
        data: the tensor's bytes, or uint8 of any shape: ``N K / 4`` bytes of codes, then 4 or (padded) 32.
        N, K: rows and columns; K is a multiple of 128 (x86) or 64 (ARM).
        arch: ``"x86"`` or ``"arm"``. The file does not say for which it was written; a wrong choice permutes weights.
        strict: check the codes here, with the byte in the error. False leaves it to the packing op, which rejects
            them too.

    Returns:
        ``(packed, gamma)``: uint8 ``[N, K / 4]``, float32 ``[]``. Without loss; not differentiable; deterministic.

    Raises:
        FormatError: another number of bytes, a code 3, a scale that is not positive and finite. ValueError,
        TypeError: an option.

    Source: arXiv 2410.16144, format I2_S.

    Example:
        >>> import torch, pyops
        >>> data = bytes([0b10010101] + 31 * [0b01010101]) + bytes([0, 0, 0, 63])  # one weight 1, scale 0.5
        >>> packed, gamma = pyops.ternary.from_i2s(data, 1, 128, "x86")
        >>> pyops.ternary.unpack(packed, "t2", 128)[0, :3].tolist(), gamma.item()
        ([1, 0, 0], 0.5)
    """
    op = "from_i2s"
    rows, columns = _shape(op, N, K)
    group = _i2s_layout(op, arch, columns)
    size = rows * columns // 4
    flat = _bytes(op, data, (size + 4, size + _I2S_TAIL), "codes, scale, padding")
    fields = flat[:size].view(-1, 1, group // 4)
    shifts = torch.tensor([6, 4, 2, 0], dtype=torch.uint8, device=flat.device).view(1, 4, 1)
    codes = (fields >> shifts) & 3
    if strict:
        _check_codes(op, "data", codes, lambda at: at[0] * (group // 4) + at[2])
    gamma = flat[size : size + 4].clone().view(torch.float32).reshape(())
    check_gamma(gamma, f"pyops::{op}: the scale at byte {size}")
    return _packed(codes, rows, columns), gamma


def to_i2s(packed: Tensor, gamma: Tensor, arch: str, *, in_features: int, fmt: str = "t2") -> Tensor:
    """The inverse of :func:`from_i2s`.

    Args:
        packed: weights in the canonical format ``fmt`` (``"t2"`` or ``"t5"``); ``in_features``, its columns, is a
            multiple of 128 (x86) or 64 (ARM).
        gamma: float32, positive; several must be equal, since the format has one scale.
        arch: ``"x86"`` or ``"arm"``.

    Returns:
        uint8 ``[out_features * in_features / 4 + 32]``: codes, the scale, 28 zeros. Without loss.

    Raises:
        FormatError: sizes or scales that the format cannot hold. ValueError, TypeError: an option.

    Source: arXiv 2410.16144, format I2_S.

    Example:
        >>> import torch, pyops
        >>> packed = pyops.ternary.pack(torch.ones(1, 64, dtype=torch.int8))
        >>> data = pyops.ternary.to_i2s(packed, torch.tensor(0.5), "arm", in_features=64)
        >>> data[:2].tolist(), data[16:20].tolist(), len(data)
        ([170, 170], [0, 0, 0, 63], 48)
    """
    op = "to_i2s"
    group = _i2s_layout(op, arch, _size(op, "in_features", in_features, MAX_IN_FEATURES))
    codes = _codes(op, packed, gamma, fmt, in_features)
    scale = _one_gamma(op, gamma).reshape(1).view(torch.uint8)
    fields = codes.reshape(-1, 4, group // 4)
    bytes_ = fields[:, 0] << 6 | fields[:, 1] << 4 | fields[:, 2] << 2 | fields[:, 3]
    return torch.cat([bytes_.flatten(), scale, scale.new_zeros(_I2S_TAIL - 4)])
