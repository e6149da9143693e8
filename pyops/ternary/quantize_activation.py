"""Quantization of activations per token; the op ``pyops::ternary_quantize_activation``."""

from __future__ import annotations

import torch
from torch import Tensor

from pyops._autograd import register_no_derivative, transform_level_active
from pyops.ternary import _checks, _options, reference

_op = torch.ops.pyops.ternary_quantize_activation.default
_NAME = "ternary_quantize_activation"


@torch.library.register_fake("pyops::ternary_quantize_activation")
def _fake(x, qmax, eps):
    _checks.quantize_activation(_NAME, x, qmax, eps)
    tokens = x.shape[:1]
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(tokens, dtype=torch.float32),
        x.new_empty(tokens, dtype=torch.int32),
    )


register_no_derivative(_NAME)


def quantize_act(x: Tensor, qmax: int = 127, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    r"""Rounds activations to 8 bits with one step per token (last dimension)::

        s    = qmax / max(max |x|, eps)
        q    = clip(round(x * s), -128, 127)      ties to even
        step = max(max |x|, eps) / qmax

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16, any strides. Not differentiable here.
        qmax: 127, or 128 (the largest value of a token then saturates at 127).
        eps: positive.

    Returns:
        ``(q, step)``: int8 of the shape of ``x`` and float32 ``[..., 1]``; ``q * step`` approximates ``x``. A token
        with a NaN or an infinity has q = 0 and step = NaN; other tokens do not notice.

    Precision: float32 with IEEE rounding whatever the dtype of ``x``; bit-identical on every backend. Errors:
    RuntimeError for a tensor that does not fit, ValueError for an option.

    Source: arXiv 2402.17764, section 2 (127 as in released checkpoints, 128 as in 2407.09527).

    Example:
        >>> import torch, pyops
        >>> q, step = pyops.ternary.quantize_act(torch.tensor([[1.0, -0.5, 0.0]]))
        >>> q.tolist(), round(step.item(), 6)
        ([[127, -64, 0]], 0.007874)
    """
    _options.tensor(_NAME, "x", x)
    _options.qmax(_NAME, qmax)
    _options.positive_eps(_NAME, eps)
    if x.dim() == 0:
        _checks.reject(_NAME, "x", "have at least one dimension", "[]")
    if transform_level_active():
        return reference.quantize_activation(x, qmax, eps)
    flat = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
    quantized, step, _ = _op(flat, qmax, eps)
    return quantized.reshape(x.shape), step.reshape(*x.shape[:-1], 1)
