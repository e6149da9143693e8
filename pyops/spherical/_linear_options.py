"""Options and tensors of the losses whose logits are never formed: of the factored layer and of the linear losses."""

from __future__ import annotations

import torch
from torch import Tensor

from pyops._autograd import reject, transform_level_active
from pyops._checks import dtype_name, shape_name, strided
from pyops.spherical import _checks, reference
from pyops.spherical._checks import FLOATING
from pyops.spherical._options import AT_LEAST_0, NOT_NAN, POSITIVE, SHARE, reject_options
from pyops.spherical.factored_reference import Options
from pyops.spherical.reference_ops import _check_range

# What each loss takes beside reduction and weights, with the defaults of its function on logits.
TAKES = {
    "z": {"a": 1.0, "b": 4.0, "eps": 1e-12},
    "taylor_softmax": {},
    "spherical_softmax": {"eps": 0.1},
    "mse_onehot": {},
}


def loss_options(op, loss, a, b, eps, label_smoothing, ignore_index, reduction, safe_mean) -> Options:
    if loss not in TAKES:
        reject(op, "loss", f"be one of {', '.join(map(repr, TAKES))}", repr(loss), ValueError)
    given = {name: value for name, value in (("a", a), ("b", b), ("eps", eps)) if value is not None}
    for name in given:
        if name not in TAKES[loss]:
            reject(op, name, f"not be given for loss={loss!r}", given[name], ValueError)
    values = {"a": 1.0, "b": 0.0, "eps": 0.0, **TAKES[loss], **given}
    reject_options(
        op, ignore_index, a=(values["a"], POSITIVE), b=(values["b"], NOT_NAN), eps=(values["eps"], AT_LEAST_0),
        label_smoothing=(label_smoothing, SHARE),
    )  # fmt: skip
    if label_smoothing and loss in ("taylor_softmax", "spherical_softmax"):
        rule = f"be 0 for loss={loss!r}, which would need all logits"
        reject(op, "label_smoothing", rule, f"{label_smoothing:g}", ValueError)
    if reduction not in reference.REDUCTIONS:
        reject(op, "reduction", "be one of 'none', 'mean', 'sum'", repr(reduction), ValueError)
    return Options(loss, values["a"], values["b"], values["eps"], label_smoothing, ignore_index, reduction, safe_mean)


def check_kinds(op: str, tensors: dict[str, Tensor | None], device: torch.device, like: str) -> None:
    """Each is a strided tensor on the device of ``like``, or None where it may be; the weights ask for no gradient."""
    for name, tensor in tensors.items():
        optional = name in ("bias", "class_weight", "target_weight")
        if tensor is None and optional:
            continue
        if not isinstance(tensor, Tensor):
            reject(op, name, "be a Tensor or None" if optional else "be a Tensor", type(tensor).__name__, TypeError)
        strided(op, name, tensor)
        if tensor.device != device:
            reject(op, name, f"be on {device} like {like}", tensor.device)
        if name in ("class_weight", "target_weight") and tensor.requires_grad and torch.is_grad_enabled():
            reject(op, name, "not require grad (it has no derivative here)", "requires_grad=True")


def check_targets(
    op: str, h: Tensor, target: Tensor, target_weight: Tensor | None, classes: int, ignore_index: int
) -> None:
    """Shapes, dtypes and, where values can be looked at, the range of the targets."""
    _checks.target_shape(op, target, h.shape[0])
    if target_weight is not None:
        _checks.target_weights(op, target_weight, target)
    if not target.is_meta and not transform_level_active():
        _check_range(op, target, classes, ignore_index)


def check_linear(op: str, tensors: dict[str, Tensor | None], ignore_index: int) -> None:
    """All checks of h, weight, target and the optional bias, class_weight and target_weight of a linear loss."""
    h, weight, target = tensors["h"], tensors["weight"], tensors["target"]
    check_kinds(op, {"h": h}, getattr(h, "device", None), "h")
    check_kinds(op, tensors, h.device, "h")
    for name, tensor in tensors.items():
        if name != "target" and tensor is not None and tensor.dtype not in FLOATING:
            reject(op, name, "be float32, float64, bfloat16 or float16", dtype_name(tensor.dtype))
    if h.dim() != 2:
        reject(op, "h", "have shape [rows, features]", shape_name(h))
    if weight.dim() != 2 or weight.shape[1] != h.shape[1]:
        reject(op, "weight", f"have shape [classes, {h.shape[1]}]", shape_name(weight))
    classes = weight.shape[0]
    for name in ("bias", "class_weight"):
        if tensors[name] is not None and tuple(tensors[name].shape) != (classes,):
            reject(op, name, f"have shape [{classes}]", shape_name(tensors[name]))
    if not torch.is_autocast_enabled(h.device.type):
        for name in ("weight", "bias"):
            if tensors[name] is not None and tensors[name].dtype != h.dtype:
                reject(op, name, f"be {dtype_name(h.dtype)} like h", dtype_name(tensors[name].dtype))
    check_targets(op, h, target, tensors["target_weight"], classes, ignore_index)
