"""Tiles of the int8 products, per architecture and number of tokens, and the search among them.

Integer sums do not depend on the tiles, so the choice changes no result. `PYOPS_AUTOTUNE=1` times the candidates at
the first call of each (tokens, out_features, in_features), tokens rounded up to a power of two; otherwise the first
candidate serves. None of these has been timed yet: they were chosen by registers, shared memory and the instructions
per product of the compiled code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

from pyops import _environment


class Config(NamedTuple):
    """A tile of y, and the bytes of a weight row (four in_features each) that a step along it takes."""

    rows: int
    tokens: int
    bytes: int
    num_warps: int
    num_stages: int


#: With a gamma per group: a step is one group, and each element has two sums, an integer and a float.
GROUPED = Config(rows=64, tokens=64, bytes=64, num_warps=4, num_stages=3)

#: Up to how many tokens a bucket goes.
BUCKETS = (16, 32, 64, 128, 1 << 62)

_AMPERE = {
    16: (Config(64, 16, 64, 4, 4), Config(128, 16, 64, 4, 4), Config(64, 16, 128, 4, 3)),
    32: (Config(64, 32, 64, 4, 4), Config(128, 32, 64, 4, 3)),
    64: (Config(64, 64, 64, 4, 3), Config(128, 64, 32, 4, 4)),
    128: (Config(128, 64, 32, 4, 4), Config(128, 128, 32, 8, 3)),
    BUCKETS[-1]: (Config(128, 128, 32, 8, 4), Config(128, 128, 64, 8, 3)),
}
_HOPPER = {
    16: (Config(64, 16, 64, 4, 4), Config(128, 16, 64, 4, 4), Config(64, 16, 128, 4, 4)),
    32: (Config(64, 32, 64, 4, 4), Config(128, 32, 64, 4, 4)),
    64: (Config(64, 64, 64, 4, 4), Config(128, 64, 64, 4, 3)),
    128: (Config(128, 128, 32, 8, 4), Config(128, 64, 64, 4, 3)),
    BUCKETS[-1]: (Config(128, 128, 64, 8, 3), Config(128, 128, 32, 8, 4)),
}
BY_ARCHITECTURE = {80: _AMPERE, 90: _HOPPER, 100: _HOPPER}


def configs(architecture: int, tokens: int) -> tuple[Config, ...]:
    """The candidates for a compute capability (8.0 is 80), best first; later ones take those of their elder."""
    known = max((number for number in BY_ARCHITECTURE if number <= architecture), default=min(BY_ARCHITECTURE))
    return BY_ARCHITECTURE[known][next(bucket for bucket in BUCKETS if tokens <= bucket)]


def architecture_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 90  # interpreted, or compiled for no device
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


_found: dict[tuple, Config] = {}


def choose(device: torch.device, tokens: int, out_features: int, in_features: int, run: Callable[[Config], object],
           time: Callable[[Callable], float] | None = None) -> Config:  # fmt: skip
    """The tile for a product; `run` does it with a tile. `time` gives the time of a call, on CUDA by its events."""
    candidates = configs(architecture_of(device), tokens)
    if _environment.values["PYOPS_AUTOTUNE"] != "1" or (device.type != "cuda" and time is None):
        return candidates[0]
    if time is None and torch.cuda.is_current_stream_capturing():
        return candidates[0]
    key = (device, triton.next_power_of_2(tokens), out_features, in_features)
    if key not in _found:
        measure = time or functools.partial(triton.testing.do_bench, warmup=5, rep=20)
        _found[key] = min(candidates, key=lambda config: measure(lambda: run(config)))
    return _found[key]
