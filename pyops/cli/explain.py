"""``explain``: the backend choice for a call described on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json

import torch

import pyops


def _shape(text: str) -> tuple[int, int]:
    rows, _, classes = text.partition("x")
    if not (rows.isdigit() and classes.isdigit()):
        raise ValueError(f"--shape must be ROWSxCLASSES, got {text!r}")
    return int(rows), int(classes)


def run(arguments: argparse.Namespace) -> int:
    dtype = getattr(torch, arguments.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype must be a torch dtype, got {arguments.dtype!r}")
    rows, classes = _shape(arguments.shape)
    # One element of storage: a choice never looks at values.
    logits = torch.zeros((), dtype=dtype, device=arguments.device).expand(rows, classes)
    target = torch.zeros(rows, dtype=torch.int64, device=arguments.device)
    explanation = pyops.explain(arguments.op, logits, target)
    print(json.dumps(dataclasses.asdict(explanation), indent=2) if arguments.json else explanation)
    return 0
