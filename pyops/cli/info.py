"""``info`` and ``env``: what this installation is and has."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import pyops
from pyops import _dispatch, _environment, _lib


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend_rows() -> dict[str, dict[str, str]]:
    """Per op and backend: "available", or the reason why not."""
    unavailable = {"cuda": _lib.cuda_unavailable(), "triton": _dispatch.triton_unavailable()}
    rows = {}
    for name in sorted(_dispatch._ops):
        rows[name] = {
            backend: f"unavailable: {unavailable[backend]}" if unavailable.get(backend) else "available"
            for backend in _environment.BACKENDS
        }
    return rows


def collect() -> dict:
    """Everything ``info --json`` prints."""
    return {
        "pyops": pyops.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "triton": _version("triton"),
        "build": _lib.native.build_info(),
        "cpu": {
            "detected_isa": _lib.native.detected_isa(),
            "current_isa": _lib.native.current_isa(),
            "threads": torch.get_num_threads(),
        },
        "ops": _backend_rows(),
    }


def format_text(facts: dict) -> str:
    cpu, build = facts["cpu"], facts["build"]
    lines = [
        f"pyops {facts['pyops']}  python {facts['python']}  torch {facts['torch']}  triton {facts['triton'] or '-'}",
        f"built with {build['compiler']}, CUDA targets {build['cuda_archs'] or 'none'}"
        + (f", sanitizers {build['sanitize']}" if build["sanitize"] else ""),
        f"CPU level {cpu['current_isa']} (processor has {cpu['detected_isa']}), {cpu['threads']} threads",
        f"CUDA devices: {', '.join(facts['cuda_devices']) or 'none'}",
        "",
    ]
    for name, backends in facts["ops"].items():
        lines.append(f"pyops::{name}")
        lines += [f"    {backend:10s} {state}" for backend, state in backends.items()]
    return "\n".join(lines)


def environment() -> dict:
    return {
        name: {
            "allowed": variable.allowed,
            "default": variable.default,
            "current": os.environ.get(name, variable.default),
            "meaning": variable.meaning,
        }
        for name, variable in _environment.VARIABLES.items()
    }


def format_environment(table: dict) -> str:
    lines = []
    for name, row in table.items():
        lines.append(f"{name}={row['current'] or '(unset)'}  default {row['default'] or '(unset)'}")
        lines.append(f"    {row['meaning']}; one of: {row['allowed']}")
    return "\n".join(lines)
