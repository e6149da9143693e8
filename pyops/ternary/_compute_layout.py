"""The layout of packed weights that a processor's kernels read fastest, built from the canonical one when first needed
and remembered while that has not changed."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from pyops import _dispatch, _lib
from pyops._autograd import transform_level_active
from pyops.ternary.repack import repack

_building = threading.Lock()  # several threads that serve one model build each layout once


class Seen:
    """A tensor as it was at one moment."""

    __slots__ = ("address", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version, self.address = weakref.ref(tensor), tensor._version, tensor.data_ptr()

    def is_still(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is that one and nothing that torch counts has been written to it."""
        return self.tensor() is tensor and tensor._version == self.version and tensor.data_ptr() == self.address


def has_versions(tensor: Tensor) -> bool:
    """Whether writes to the tensor can be noticed: no fake or meta tensor, none made in inference mode."""
    return type(tensor) is Tensor and not tensor.is_meta and not tensor.is_inference()


def compute_format(fmt: str, device: torch.device) -> str:
    """The format that the kernels of the backend that would run now read fastest; ``fmt`` itself where a backend has
    no layout of its own."""
    wanted = _dispatch.requested("ternary")
    if wanted in ("triton", "reference"):
        return fmt
    kind = device.type
    if wanted == "cuda" or (kind == "cuda" and _lib.cuda_loaded()):
        return "t2mma"
    if kind != "cpu":
        return fmt
    return "t5x16" if fmt == "t5" and _lib.native.current_isa() == "avx512vnni" else "t2x16"


class ComputeLayouts:
    """What has been built of one canonical tensor, by format. Never copied, pickled or saved."""

    def __init__(self) -> None:
        self._built: dict[str, tuple[Seen, Tensor]] = {}

    def __reduce__(self):
        return ComputeLayouts, ()

    def clear(self) -> None:
        self._built = {}

    def operand(self, packed: Tensor, fmt: str, out_features: int, in_features: int) -> tuple[Tensor, str]:
        """(weights, their format) for a call now. While a graph is traced or a transform is active the canonical
        tensor itself: a graph must serve on every processor, and must see what is written to the tensor later."""
        if torch.compiler.is_compiling() or transform_level_active():
            return packed, fmt
        wanted = compute_format(fmt, packed.device)
        if wanted == fmt:
            return packed, fmt
        known = self._built.get(wanted)
        if known is not None and known[0].is_still(packed):
            return known[1], wanted
        if not has_versions(packed):
            return packed, fmt
        return self._build(packed, fmt, wanted, out_features, in_features), wanted

    def _build(self, packed: Tensor, fmt: str, wanted: str, out_features: int, in_features: int) -> Tensor:
        with _building:
            known = self._built.get(wanted)
            if known is not None and known[0].is_still(packed):  # another thread was first
                return known[1]
            seen = Seen(packed)
            with torch.inference_mode(False), torch.no_grad():  # it may be saved for a backward later
                layout = repack(packed, fmt, wanted, out_features, in_features)
            if type(layout) is Tensor:  # a fake tensor belongs to the mode that made it
                self._built = {**self._built, wanted: (seen, layout)}
            return layout
