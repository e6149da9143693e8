"""Conversion of whole models: ``convert``, ``pack``, ``revert``, and the report that each of them returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.utils import parametrize

from pyops.ternary._checks import FLOATING
from pyops.ternary.modules import BitLinear, PackedBitLinear


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one layer. ``action`` is "converted", "skipped" (as the patterns say, or nothing to do) or
    "refused" (it would not have worked); bytes are those of parameters and buffers."""

    name: str
    action: str
    reason: str
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(repr=False)
class Report:
    """The model (another object than before only if it was itself the layer to convert), and a row for each layer that
    was looked at. ``print`` it for a table."""

    model: nn.Module
    rows: list[Row]

    @property
    def converted(self) -> list[str]:
        """Names of the layers that were converted."""
        return [row.name for row in self.rows if row.action == "converted"]

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def __repr__(self) -> str:
        return f"Report({len(self.converted)} of {len(self.rows)} layers converted)"

    def __str__(self) -> str:
        table = [("layer", "action", "bytes before", "after", "reason")]
        table += [
            (row.name or "(the model)", row.action, f"{row.bytes_before:,}", f"{row.bytes_after:,}", row.reason)
            for row in self.rows
        ]
        table.append(
            ("total", f"{len(self.converted)} converted", f"{self.bytes_before:,}", f"{self.bytes_after:,}", "")
        )
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = (
            f"{name:<{widths[0]}}  {action:<{widths[1]}}  {before:>{widths[2]}}  {after:>{widths[3]}}  {reason}"
            for name, action, before, after, reason in table
        )
        return "\n".join(line.rstrip() for line in lines)


# ---- which layers ----------------------------------------------------------------------------------------------


def _patterns(argument: str, patterns: str | Iterable[str]) -> tuple[str, ...]:
    found = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not all(isinstance(pattern, str) for pattern in found):
        raise TypeError(f"{argument} must be patterns, got {found!r}")
    return found


def _matching(patterns: tuple[str, ...], names: list[str]) -> str | None:
    """The first pattern that fits one of a layer's qualified names, or the last component of one."""
    return next((p for p in patterns for n in names if fnmatchcase(n, p) or fnmatchcase(n.rpartition(".")[2], p)), None)


def _obstacle(layer: nn.Module, kind: type[nn.Module], parents: list[nn.Module]) -> str:
    """Why a layer that should be converted cannot be; an empty string if it can."""
    if parametrize.is_parametrized(layer):
        return f"it has parametrizations of {', '.join(layer.parametrizations)}"
    if any(isinstance(parent, nn.MultiheadAttention) for parent in parents):
        return "nn.MultiheadAttention reads the weight without calling the layer"
    if type(layer) is not kind:
        return f"{type(layer).__name__} is a subclass of {kind.__name__}, with a meaning of its own"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(layer, name) for name in hooks):
        return "it has hooks, which would be lost"
    if "forward" in vars(layer):
        return "its forward was replaced"
    dtype = next((p.dtype for p in layer.parameters(recurse=False)), torch.float32)
    return "" if dtype in FLOATING else f"its dtype is {str(dtype).removeprefix('torch.')}"


def _bytes(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))


# ---- replacing -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Rule:
    """What to replace, by what. ``make`` gives the new layer and a remark for the report."""

    kinds: tuple[type[nn.Module], ...]
    make: Callable[[nn.Module], tuple[nn.Module, str]]
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    done: type[nn.Module] | None = None  # a layer of this type is what is wanted

    def decide(self, model: nn.Module, layer: nn.Module, names: list[str]) -> tuple[str, str, nn.Module | None]:
        """(action, reason, the new layer or None)."""
        if type(layer) is self.done:
            return "skipped", f"it is a {self.done.__name__}", None
        excluding = _matching(self.exclude, names)
        if excluding is not None:
            return "skipped", f"excluded by {excluding!r}", None
        if _matching(self.include, names) is None:
            return "skipped", "not included", None
        kind = next(kind for kind in self.kinds if isinstance(layer, kind))
        obstacle = _obstacle(layer, kind, [model.get_submodule(name.rpartition(".")[0]) for name in names])
        if obstacle:
            return "refused", obstacle, None
        try:
            new, remark = self.make(layer)
        except ValueError as error:
            raise type(error)(f"layer {names[0] or '(the model)'}: {error}") from None
        return "converted", remark, new


def _replace(model: nn.Module, rule: _Rule, dry_run: bool) -> Report:
    """Replaces what the rule says. All new layers are made before the first is put in place, so that an error leaves
    the model as it was; a layer that stands in several places is replaced by one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    names: dict[nn.Module, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, rule.kinds):
            names.setdefault(layer, []).append(name)
    rows, replacements = [], {}
    for layer, own in names.items():
        action, reason, new = rule.decide(model, layer, own)
        before = _bytes(layer)
        rows.append(Row(own[0], action, reason, before, before if new is None else _bytes(new)))
        rows += [Row(other, action, f"the same layer as {own[0]}", 0, 0) for other in own[1:]]
        if new is not None and not dry_run:
            replacements |= dict.fromkeys(own, new)
    for name, new in replacements.items():
        parent, _, last = name.rpartition(".")
        if name:
            model.get_submodule(parent).register_module(last, new)
    model = replacements.get("", model)
    if replacements:
        _choose_encoder_paths(model)
    return Report(model, rows)


# torch's encoders have a fused path in eval mode that reads the weights of nn.Linear past its forward; an attribute
# turns it off.
_FUSED_PATHS = (
    (nn.TransformerEncoder, "use_nested_tensor", False),
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
)


def _choose_encoder_paths(model: nn.Module) -> None:
    """Turns the fused path off where a layer of ours is inside, and on again where none is left."""
    for module in model.modules():
        ours = any(isinstance(child, (BitLinear, PackedBitLinear)) for child in module.modules())
        for kind, attribute, off in _FUSED_PATHS:
            if not isinstance(module, kind):
                continue
            before = f"_{attribute}_before_conversion"
            if ours and not hasattr(module, before):
                setattr(module, before, getattr(module, attribute))
                setattr(module, attribute, off)
            elif not ours and hasattr(module, before):
                setattr(module, attribute, getattr(module, before))
                delattr(module, before)


# ---- public functions ------------------------------------------------------------------------------------------


def convert(
    model: nn.Module,
    LayerClass: type[nn.Module],
    *,
    include: str | Iterable[str] = ("*",),
    exclude: str | Iterable[str] = ("lm_head", "embed*"),
    dry_run: bool = False,
    **options,
) -> Report:
    """Replaces the ``torch.nn.Linear`` layers of a model, in place, by ``LayerClass.from_linear(linear, **options)``.

    Args:
        model: any Module. If it is itself a ``torch.nn.Linear``, ``report.model`` is the new layer.
        LayerClass: :class:`pyops.nn.BitLinear` (shares the parameters, so that an optimizer goes on),
            :class:`pyops.nn.PackedBitLinear`.
        include, exclude: patterns as of a shell (``fnmatch``) for qualified names (``"blocks.*.mlp.*"``) or their last
            component (``"lm_head"``); what is excluded is not included.
        dry_run: report only; the model stays as it is.
        options: of the layers, as ``norm="rmsnorm"`` or ``lorc_rank=16``.

    Returns:
        A :class:`Report` with the model and a row for every Linear: converted, skipped or refused, and why. Refused
        are layers with hooks or parametrizations, subclasses of ``torch.nn.Linear``, layers of another dtype than
        float32, bfloat16 and float16, and the output projection of ``nn.MultiheadAttention``, which is never called.
        A layer that stands in several places is converted once. Converting again changes nothing.

    Raises:
        ValueError: an option that the layer rejects, or a weight (named) that cannot be packed; TypeError: an unknown
        option, or no Module. The model is then as it was.

    The fused eval path of ``nn.TransformerEncoder`` and its layers, which would read the float weights, is turned off
    where a layer inside is converted. See also :func:`pack`, :func:`revert`.

    Example:
        >>> import torch, pyops
        >>> model = torch.nn.ModuleDict({"fc": torch.nn.Linear(64, 32), "lm_head": torch.nn.Linear(32, 10)})
        >>> print(pyops.convert(model, pyops.nn.BitLinear))
        layer    action       bytes before  after  reason
        fc       converted           8,320  8,320
        lm_head  skipped             1,320  1,320  excluded by 'lm_head'
        total    1 converted         9,640  9,640
        >>> pyops.pack(model).bytes_after < 1200
        True
    """
    if not (isinstance(LayerClass, type) and hasattr(LayerClass, "from_linear")):
        raise TypeError(f"LayerClass must be a class of pyops.nn with from_linear, got {LayerClass!r}")
    shared = next((name for name, value in options.items() if isinstance(value, nn.Module)), None)
    if shared is not None:
        raise ValueError(f"{shared} must not be a Module, which all layers would share, got {options[shared]!r}")
    rule = _Rule(
        (nn.Linear,),
        lambda linear: (LayerClass.from_linear(linear, **options), ""),
        _patterns("include", include),
        _patterns("exclude", exclude),
        LayerClass,
    )
    return _replace(model, rule, dry_run)


def pack(model: nn.Module, fmt: str = "t2", *, lorc_rank: int = 0, dry_run: bool = False) -> Report:
    """Replaces every :class:`pyops.nn.BitLinear` of a model, in place, by its packed form for inference.

    Args:
        fmt: ``"t2"`` (2 bits a weight) or ``"t5"`` (1.6 bits).
        lorc_rank: rank of a correction of what rounding has lost, see
            :func:`pyops.ternary.low_rank_compensation`; 0 for none.
        dry_run: report only.

    Returns:
        A :class:`Report`, as of :func:`convert`. Without a correction the outputs of the model in eval mode are the
        same to the last bit.

    Raises:
        ValueError: a weight that is not finite, or ``lambda_`` below 1, with the name of the layer; the model is then
        as it was.

    Example:
        >>> import torch, pyops
        >>> model = torch.nn.Sequential(pyops.nn.BitLinear(64, 32), torch.nn.ReLU(), pyops.nn.BitLinear(32, 10))
        >>> pyops.pack(model, "t5").converted
        ['0', '2']
    """
    return _replace(model, _Rule((BitLinear,), lambda layer: (layer.pack(fmt, lorc_rank=lorc_rank), "")), dry_run)


def revert(model: nn.Module, *, dry_run: bool = False) -> Report:
    """Replaces the layers that :func:`convert` and :func:`pack` have put into a model, in place, by
    ``torch.nn.Linear``.

    A ``BitLinear`` gives a Linear on the same parameters: :func:`convert` is undone. A ``PackedBitLinear`` gives one
    with the dequantized weight (and its correction, if it has one).

    Returns:
        A :class:`Report`, as of :func:`convert`; it remarks on a norm, which a Linear has no place for.

    Example:
        >>> import torch, pyops
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> weight = model[0].weight
        >>> pyops.convert(model, pyops.nn.BitLinear), pyops.revert(model)
        (Report(1 of 1 layers converted), Report(1 of 1 layers converted))
        >>> type(model[0]).__name__, model[0].weight is weight
        ('Linear', True)
    """

    def linear(layer: nn.Module) -> tuple[nn.Module, str]:
        return layer.to_linear(), "" if layer.norm is None else "its norm is gone"

    return _replace(model, _Rule((BitLinear, PackedBitLinear), linear), dry_run)
