"""Argument checks of the family, word for word those of ``csrc/spherical/loss_arguments.cpp``.

The fakes run them, so that a call fails alike in eager mode, under ``torch.compile`` and with meta tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyops._autograd import reject
from pyops._checks import device, dtype_name, shape_name, strided
from pyops.spherical.reference import SPHERICAL_LOSSES

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FLOATING_RULE = "be float32, float64, bfloat16 or float16"


def _floating(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        reject(op, argument, _FLOATING_RULE, dtype_name(tensor.dtype))


def _logits_target(op: str, logits: Tensor, target: Tensor) -> int:
    """Returns the number of targets per row."""
    strided(op, "logits", logits)
    _floating(op, "logits", logits)
    if logits.dim() != 2:
        reject(op, "logits", "have shape [rows, classes]", shape_name(logits))
    strided(op, "target", target)
    device(op, "target", target, logits, "logits")
    return target_shape(op, target, logits.shape[0])


def target_shape(op: str, target: Tensor, rows: int) -> int:
    """Dtype and shape; returns the number of targets per row."""
    if target.dtype not in (torch.int64, torch.int32):
        reject(op, "target", "be int64 or int32", dtype_name(target.dtype))
    if target.dim() not in (1, 2) or target.shape[0] != rows:
        reject(op, "target", f"have shape [{rows}] or [{rows}, targets per row]", shape_name(target))
    return target.shape[1] if target.dim() == 2 else 1


def target_weights(op: str, target_weight: Tensor, target: Tensor) -> None:
    if target_weight.shape != target.shape:
        reject(op, "target_weight", f"have the shape of target, {shape_name(target)}", shape_name(target_weight))


def _weight(op: str, argument: str, weight: Tensor, logits: Tensor) -> None:
    strided(op, argument, weight)
    device(op, argument, weight, logits, "logits")
    if weight.dtype != logits.dtype:
        reject(op, argument, f"be {dtype_name(logits.dtype)} like logits", dtype_name(weight.dtype))


def class_weight(op: str, weight: Tensor, logits: Tensor) -> None:
    _weight(op, "weight", weight, logits)
    if weight.dim() != 1 or weight.shape[0] != logits.shape[1]:
        reject(op, "weight", f"have shape [{logits.shape[1]}]", shape_name(weight))


def forward(op, logits, target, target_weight, weight, label_smoothing, reduction, out_dtype) -> int:
    """All checks of a forward; returns the number of targets per row."""
    targets = _logits_target(op, logits, target)
    if target_weight is not None:
        _weight(op, "target_weight", target_weight, logits)
        target_weights(op, target_weight, target)
    if weight is not None:
        class_weight(op, weight, logits)
    if not 0 <= label_smoothing <= 1:
        reject(op, "label_smoothing", "be in [0, 1]", f"{label_smoothing:g}")
    if not 0 <= reduction <= 2:
        reject(op, "reduction", "be 0 (none), 1 (mean) or 2 (sum)", reduction)
    if out_dtype is not None and out_dtype not in FLOATING:
        reject(op, "out_dtype", _FLOATING_RULE, dtype_name(out_dtype))
    return targets


def backward(op, grad_loss, logits, target, statistics, normalizer, columns: int, normalizers: int) -> None:
    """All checks of a backward. ``columns`` row statistics stand before the target gradients."""
    targets = _logits_target(op, logits, target)
    rows = logits.shape[0]
    strided(op, "grad_loss", grad_loss)
    device(op, "grad_loss", grad_loss, logits, "logits")
    _floating(op, "grad_loss", grad_loss)
    if grad_loss.dim() != 0 and (grad_loss.dim() != 1 or grad_loss.shape[0] != rows):
        reject(op, "grad_loss", f"have shape [] or [{rows}]", shape_name(grad_loss))
    strided(op, "statistics", statistics)
    device(op, "statistics", statistics, logits, "logits")
    if statistics.dtype != torch.float64:
        reject(op, "statistics", "be float64", dtype_name(statistics.dtype))
    width = columns + targets
    if statistics.dim() != 2 or statistics.shape[0] != rows or statistics.shape[1] != width:
        reject(op, "statistics", f"have shape [{rows}, {width}]", shape_name(statistics))
    strided(op, "normalizer", normalizer)
    device(op, "normalizer", normalizer, logits, "logits")
    if normalizer.dtype != torch.float64:
        reject(op, "normalizer", "be float64", dtype_name(normalizer.dtype))
    if normalizer.numel() != normalizers:
        reject(op, "normalizer", f"have {normalizers} elements", shape_name(normalizer))


def spherical_name(loss: int, suffix: str = "") -> str:
    """The public name of a spherical loss by its number, for messages."""
    if not 0 <= loss < len(SPHERICAL_LOSSES):
        rule = "be 0 (z), 1 (taylor_softmax), 2 (spherical_softmax) or 3 (mse_onehot)"
        reject("spherical_loss", "loss", rule, loss)
    return f"{SPHERICAL_LOSSES[loss]}_loss{suffix}"


def lse_square_scale(value: float) -> None:
    if not value >= 0:
        reject("cross_entropy", "lse_square_scale", "be at least 0", f"{value:g}")


def spherical_options(op: str, a: float, b: float, eps: float) -> None:
    if not a > 0:
        reject(op, "a", "be positive", f"{a:g}")
    if b != b:
        reject(op, "b", "be a number", f"{b:g}")
    if not eps >= 0:
        reject(op, "eps", "be at least 0", f"{eps:g}")


# ---- the factored layer: csrc/spherical/factored_arguments.cpp -------------------------------------------------------


def _real(op: str, argument: str, tensor: Tensor) -> None:
    strided(op, argument, tensor)
    if tensor.dtype not in (torch.float32, torch.float64):
        reject(op, argument, "be float32 or float64", dtype_name(tensor.dtype))


def factored(op: str, V: Tensor, U: Tensor, target: Tensor) -> tuple[int, int, int]:
    """Returns (rows, targets per row, features)."""
    _real(op, "U", U)
    _real(op, "V", V)
    if U.dim() != 2 or U.shape[0] != U.shape[1]:
        reject(op, "U", "be square", shape_name(U))
    features = U.shape[0]
    if V.dim() != 2 or V.shape[1] != features:
        reject(op, "V", f"have shape [classes, {features}]", shape_name(V))
    device(op, "V", V, U, "U")
    strided(op, "target", target)
    device(op, "target", target, U, "U")
    if target.dtype not in (torch.int64, torch.int32):
        reject(op, "target", "be int64 or int32", dtype_name(target.dtype))
    if target.dim() not in (1, 2):
        reject(op, "target", "have shape [rows] or [rows, targets per row]", shape_name(target))
    return target.shape[0], target.shape[1] if target.dim() == 2 else 1, features


def factored_features(op: str, h: Tensor, U: Tensor, rows: int, features: int) -> None:
    strided(op, "h", h)
    _floating(op, "h", h)
    device(op, "h", h, U, "U")
    if tuple(h.shape) != (rows, features):
        reject(op, "h", f"have shape [{rows}, {features}]", shape_name(h))


def factored_like(op: str, argument: str, tensor: Tensor, U: Tensor) -> None:
    strided(op, argument, tensor)
    device(op, argument, tensor, U, "U")
    if tensor.dtype != U.dtype:
        reject(op, argument, f"be {dtype_name(U.dtype)} like U", dtype_name(tensor.dtype))


def factored_state(op: str, argument: str, tensor: Tensor, U: Tensor, dimensions: int) -> None:
    factored_like(op, argument, tensor, U)
    shape = [U.shape[0]] * dimensions
    if list(tensor.shape) != shape:
        reject(op, argument, f"have shape {shape}", shape_name(tensor))


def factored_distinct(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.numel() <= 1:
        return
    steps = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    reach = 0
    for stride, size in steps:
        if stride <= reach:
            reject(op, argument, "not overlap in memory, as it is written", f"strides {list(tensor.stride())}")
        reach += (size - 1) * stride


def factored_rows(op: str, argument: str, tensor: Tensor, rows: int, columns: int, dtype, U: Tensor) -> None:
    strided(op, argument, tensor)
    device(op, argument, tensor, U, "U")
    if tensor.dtype != dtype:
        reject(op, argument, f"be {dtype_name(dtype)}", dtype_name(tensor.dtype))
    if tuple(tensor.shape) != (rows, columns):
        reject(op, argument, f"have shape [{rows}, {columns}]", shape_name(tensor))


def factored_class_weight(op: str, weight: Tensor, V: Tensor, U: Tensor) -> None:
    factored_like(op, "weight", weight, U)
    if tuple(weight.shape) != (V.shape[0],):
        reject(op, "weight", f"have shape [{V.shape[0]}]", shape_name(weight))


def factored_smoothing(op: str, loss: int, label_smoothing: float, reduction: int) -> None:
    if label_smoothing and SPHERICAL_LOSSES[loss] in ("taylor_softmax", "spherical_softmax"):
        reject(op, "label_smoothing", "be 0 for this loss, which would need all logits", f"{label_smoothing:g}")
    if not 0 <= label_smoothing <= 1:
        reject(op, "label_smoothing", "be in [0, 1]", f"{label_smoothing:g}")
    if not 0 <= reduction <= 2:
        reject(op, "reduction", "be 0 (none), 1 (mean) or 2 (sum)", reduction)


def factored_upstream(op: str, grad_loss: Tensor, rows: int, U: Tensor) -> None:
    strided(op, "grad_loss", grad_loss)
    device(op, "grad_loss", grad_loss, U, "U")
    _floating(op, "grad_loss", grad_loss)
    if grad_loss.dim() != 0 and tuple(grad_loss.shape) != (rows,):
        reject(op, "grad_loss", f"have shape [] or [{rows}]", shape_name(grad_loss))


def factored_normalizer(op: str, normalizer: Tensor, U: Tensor) -> None:
    strided(op, "normalizer", normalizer)
    device(op, "normalizer", normalizer, U, "U")
    if normalizer.dtype != torch.float64 or normalizer.numel() != 1:
        reject(op, "normalizer", "be one float64 number", f"{dtype_name(normalizer.dtype)} {shape_name(normalizer)}")


def factored_rate(op: str, rate: float, keep: float) -> None:
    if not 0 <= rate < float("inf"):
        reject(op, "rate", "be finite and at least 0", f"{rate:g}")
    if not 0 < keep <= 1:
        reject(op, "keep", "be in (0, 1]", f"{keep:g}")
