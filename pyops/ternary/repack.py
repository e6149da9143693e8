"""Packed formats of ternary weights and the ways between them; the op ``pyops::ternary_repack``."""

from __future__ import annotations

import torch
from torch import Tensor

from pyops._autograd import register_no_derivative, reject
from pyops._checks import FormatError
from pyops.ternary import _checks, _options
from pyops.ternary._formats import CANONICAL, FORMATS, code, packed_dtype, packed_shape

_op = torch.ops.pyops.ternary_repack.default
_NAME = "ternary_repack"


@torch.library.register_fake("pyops::ternary_repack")
def _fake(source, from_format, to_format, out_features, in_features):
    _, to_name = _checks.repack(source, from_format, to_format, out_features, in_features)
    return source.new_empty(packed_shape(to_name, out_features, in_features), dtype=packed_dtype(to_name))


register_no_derivative(_NAME)


def repack(source: Tensor, from_fmt: str, to_fmt: str, out_features: int, in_features: int) -> Tensor:
    """The same weights in another format (:data:`FORMATS`); FormatError for bytes that stand for no weight.

    Example:
        >>> import torch, pyops
        >>> packed = pyops.ternary.pack(torch.tensor([[1, 0, -1, 1, 1]], dtype=torch.int8), "t2")
        >>> pyops.ternary.repack(packed, "t2", "t5", 1, 5).tolist()
        [[221]]
    """
    _options.tensor(_NAME, "source", source)
    codes = code(_NAME, "from_fmt", from_fmt), code(_NAME, "to_fmt", to_fmt)
    if codes[0] == codes[1]:
        return source
    try:
        return _op(source, *codes, out_features, in_features)
    except ValueError as error:
        raise FormatError(str(error)) from None


def pack(T: Tensor, fmt: str = "t2") -> Tensor:
    """Packs ternary weights.

    Args:
        T: int8 ``[out_features, in_features]`` of -1, 0 and 1, any strides; no size needs to be a multiple of
            anything.
        fmt: ``"t2"`` (2 bits a weight), ``"t5"`` (1.6 bits), or a layout for a processor: ``"t2x16"``, ``"t5x16"``,
            ``"t2mma"``.

    Returns:
        uint8; for t2 ``[out_features, ceil(in_features / 4)]``, byte b of a row holding ``k = 4 b + i`` as
        ``T + 1`` at bits ``[2i + 1 : 2i]``; for t5 ``[out_features, ceil(in_features / 5)]``, byte b holding
        ``sum_j (T[5 b + j] + 1) 3**j``. Padding stands for weight 0.

    Raises:
        FormatError: another number than -1, 0, 1. RuntimeError: a tensor that does not fit. ValueError: an unknown
        format.

    Example:
        >>> import torch, pyops
        >>> pyops.ternary.pack(torch.tensor([[1, 0, -1, 1, 1]], dtype=torch.int8)).tolist()
        [[134, 86]]
    """
    _options.tensor("ternary_repack", "T", T)
    code(_NAME, "fmt", fmt, FORMATS[1:])
    if T.dim() != 2:
        reject(_NAME, "T", "have shape [out_features, in_features]", str(list(T.shape)))
    return repack(T, "int8", fmt, *T.shape)


def unpack(packed: Tensor, fmt: str, in_features: int, out_features: int | None = None) -> Tensor:
    """The inverse of :func:`pack`: int8 ``[out_features, in_features]``.

    Args:
        packed: uint8, as :func:`pack` made it.
        fmt: its format. For a processor's layout, whose rows are padded, ``out_features`` is needed.
        in_features: columns of the matrix.

    Raises:
        FormatError: a byte that stands for no weight. RuntimeError: a tensor that does not fit.

    Example:
        >>> import torch, pyops
        >>> T = torch.tensor([[1, 0, -1, 1, 1]], dtype=torch.int8)
        >>> bool((pyops.ternary.unpack(pyops.ternary.pack(T, "t5"), "t5", 5) == T).all())
        True
    """
    _options.tensor(_NAME, "packed", packed)
    code(_NAME, "fmt", fmt, FORMATS[1:])
    if out_features is None:
        if fmt not in CANONICAL:
            reject(_NAME, "out_features", f"be given for the layout {fmt}", None, TypeError)
        if packed.dim() != 2:
            reject(_NAME, "packed", "have two dimensions", str(list(packed.shape)))
        out_features = packed.shape[0]
    return repack(packed, fmt, "int8", out_features, in_features)
