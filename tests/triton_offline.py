"""Compiles every shipped Triton kernel for GPUs that are not here, and reads the machine code.

    python tests/triton_offline.py --json OUT [--arch 90] [--dtype bfloat16] [--kernel logits_gradient]

prints one line per (kernel, variant, architecture) and exits 1 if any of them spills, touches local memory, or
has lost the 16-byte accesses it was written for. A run over everything also compares with the section "triton" of
``bench/ledger.json``, which ``--update`` writes for the version of Triton that runs: over the variants of a kernel,
dtype and architecture the most registers, the most shared memory, the fewest blocks that a multiprocessor holds, and
all instructions.

What is shipped is not listed by hand. The launchers themselves are called, on meta tensors, with
`JITFunction.run` replaced by a recorder that asks Triton's own binder which variant this call would compile:
types, constants, divisibility by 16, options. A launcher and this file cannot drift apart, tensors of 2^31 classes
cost nothing, and a call that Triton would reject at launch fails here.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cuda_ledger
import ledger_traffic
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime import jit

ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# ----------------------------------------------------------------------------------------------------- recording


@dataclasses.dataclass(frozen=True)
class Launch:
    """One variant of a kernel, as Triton would compile it for a call."""

    kernel: jit.JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, object]

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

    @property
    def variant(self) -> str:
        """The constants in words, and the arguments known to be divisible by 16."""
        names = list(self.signature)
        constants = [f"{names[path[0]]}={value}" for path, value in self.constants.items()]
        divisible = [names[path[0]] for path, value in self.attributes.items() if value]
        pointers = [f"{name}:{kind[1:]}" for name, kind in self.signature.items() if kind.startswith("*")]
        return " ".join([*pointers, *constants, "/16:", ",".join(divisible), f"warps={self.options['num_warps']}"])


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block, Triton kernels are not run but described, each variant once."""
    launches: dict[str, Launch] = {}

    def run(self, *arguments, grid, warmup, **keywords):
        backend = make_backend(GPUTarget("cuda", ARCHITECTURES[0], 32))
        keywords["debug"] = keywords.get("debug", self.debug) or False
        binder = jit.create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*arguments, **keywords)
        _, signature, constants, attributes = self._pack_args(backend, keywords, bound, specialization, options)
        options = {name: value for name, value in keywords.items() if name not in signature}
        launch = Launch(self, signature, constants, attributes, options)
        launches.setdefault(f"{launch.name} {launch.variant} {signature}", launch)

    original, jit.JITFunction.run = jit.JITFunction.run, run
    found: list[Launch] = []
    try:
        yield found
    finally:
        jit.JITFunction.run = original
        found.extend(launches.values())


# ----------------------------------------------------------------------------------------------------- compiling


@dataclasses.dataclass
class Report:
    """What the machine code of one variant says."""

    kernel: str
    variant: str
    arch: int
    warps: int
    triton: str
    registers: int
    stack_bytes: int
    local_loads: int  # LDL
    local_stores: int  # STL
    shared_bytes: int
    wide_loads: int  # 16 bytes
    wide_stores: int
    instructions: int

    def complaints(self) -> list[str]:
        found = []
        if self.stack_bytes:
            found.append(f"{self.stack_bytes} bytes of stack")
        if self.local_loads or self.local_stores:
            found.append(f"{self.local_loads} LDL and {self.local_stores} STL")
        if _wide_expected(self) and not self.wide_loads:
            found.append("no 16-byte load")
        if " GRAD_ALIGNED=True" in self.variant and _wide_expected(self) and not self.wide_stores:
            found.append("no 16-byte store")
        return found


def _wide_expected(report: Report) -> bool:
    """Streaming kernels, on rows that start at 16-byte boundaries and on all long ones (a tile of one row)."""
    return " COLUMNS=" in report.variant and (" ROWS=1 " in report.variant or " EVEN=True " in report.variant)


def _tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = [str(_tool("cuobjdump")), option, file.name]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout


def compile_launch(launch: Launch, arch: int) -> Report:
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    cubin = compiled.asm["cubin"]
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", _cuobjdump(cubin, "-res-usage")))
    opcodes = re.findall(
        r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", _cuobjdump(cubin, "-sass"), re.MULTILINE
    )

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode in opcodes)

    return Report(
        kernel=launch.name,
        variant=launch.variant,
        arch=arch,
        warps=launch.options["num_warps"],
        triton=triton.__version__,
        registers=int(usage["REG"]),
        stack_bytes=int(usage["STACK"]) + int(usage["LOCAL"]),
        local_loads=count(r"LDL\b"),
        local_stores=count(r"STL\b"),
        shared_bytes=max(int(usage["SHARED"]), compiled.metadata.shared),
        wide_loads=count(r"LDG.*\.128\b"),
        wide_stores=count(r"STG.*\.128\b"),
        instructions=len(opcodes),
    )


# ----------------------------------------------------------------------------------------- the calls, per family


def _spherical_pair(logits, target, target_weight, weight, loss, smoothing, reduction) -> None:
    """Forward and backward of one spherical loss and of cross-entropy."""
    from pyops.triton_kernels.spherical import cross_entropy as softmax
    from pyops.triton_kernels.spherical import spherical_loss as spherical

    options = (-100, reduction, False, None)
    _, statistics, normalizer = spherical.spherical_loss(
        logits, target, target_weight, weight, loss, 0.5, 3.0, 1e-12, smoothing, *options
    )
    grad_loss = logits.new_ones(logits.size(0) if reduction == 0 else ())
    spherical.spherical_loss_backward(grad_loss, logits, target, statistics, normalizer, loss, 1e-12)
    _, _, statistics, normalizer = softmax.cross_entropy(
        logits, target, target_weight, weight, smoothing, 1e-4, *options
    )
    softmax.cross_entropy_backward(grad_loss, logits, target, weight, statistics, normalizer)


def spherical_calls(dtype: torch.dtype) -> None:
    """Every tile, with and without 16-byte rows; every number of parts; every loss with every option."""
    from pyops.triton_kernels.spherical import _common

    def tensors(rows, classes, targets=()):
        logits = torch.empty(rows, classes, dtype=dtype, device="meta")
        return logits, torch.empty((rows, *targets), dtype=torch.int64, device="meta")

    _spherical_pair(*tensors(1000, 4), None, None, 0, 0.0, 1)  # computed in float64
    longest, vector = _common.configs(dtype)[-1].columns, 16 // dtype.itemsize
    for tile in _common.configs(dtype)[:-1]:
        for classes in (tile.columns - vector, tile.columns - 1):
            _spherical_pair(*tensors(1000, classes), None, None, 0, 0.0, 1)
    for classes in (longest, 3 * longest + 1):
        _spherical_pair(*tensors(1000, classes), None, None, 0, 0.0, 1)
    for capacity in _common.PART_CAPACITIES[1:]:
        classes = min(2 * capacity * longest, 2**31 - 1)
        _spherical_pair(*tensors(1, classes), None, None, 0, 0.0, 1)
    if dtype == torch.float32:
        for classes in (longest, 3 * longest + 1):
            _spherical_pair(*tensors(1000, classes), None, None, 3, 0.0, 1)  # in float64
    if dtype in (torch.float32, torch.float16):
        return  # options do not change how a dtype is handled: the narrow tile and the widest registers will do
    for loss in range(4):
        _spherical_pair(*tensors(1000, longest), None, None, loss, 0.1, 1)
        for rows, classes in ((1000, 3 * longest + 1), (1, 2**31 - 1)):
            logits, target = tensors(rows, classes, (3,))
            target_weight = torch.empty(target.shape, dtype=dtype, device="meta")
            weight = torch.empty(classes, dtype=dtype, device="meta")
            if rows > 1 or loss == 0:
                _spherical_pair(logits, target, target_weight, weight, loss, 0.1, 0)
    logits, target = tensors(1000, longest)
    _spherical_pair(logits, target.int(), None, None, 0, 0.0, 2)
    _spherical_pair(tensors(1000, 2 * longest)[0][:, 1 : 1 + longest], target, None, None, 0, 0.0, 1)


def ternary_calls(dtype: torch.dtype) -> None:
    """Every tile, with rows whole and in parts; every gamma, number of few tokens, quantizer and pair of formats."""
    from pyops.triton_kernels.ternary import _configs, bitlinear, linear, quantize_activation, quantize_weight, repack

    from pyops.ternary._formats import FORMATS, packed_dtype, packed_shape

    if dtype == torch.float64:
        return
    t2 = repack.T2.value

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    def weights(rows: int, columns: int, form: int = t2) -> torch.Tensor:
        return empty(*packed_shape(FORMATS[form], rows, columns), kind=packed_dtype(FORMATS[form]))

    def gammas(rows: int, columns: int) -> tuple[torch.Tensor, ...]:
        shapes = (), (rows,), (rows, columns // 256)
        return tuple(empty(*shape, kind=torch.float32) for shape in shapes)

    rows, columns = 4096, 4096
    packed = weights(rows, columns)
    for gamma in gammas(rows, columns):
        x, grad = empty(300, columns), empty(300, rows)
        linear.ternary_linear(x, packed, gamma, empty(rows), t2, rows, columns, 0, 127, 1e-5, None)
        linear.ternary_linear(x, packed, gamma, empty(rows), t2, rows, columns, 8, 127, 1e-5, None)
        linear.ternary_linear_backward_input(grad, packed, gamma, t2, columns)
    for out_dtype in (dtype, torch.float32):
        quantized, step = empty(300, columns, kind=torch.int8), empty(300, kind=torch.float32)
        bitlinear.bitlinear_backward_weight(empty(300, rows), quantized, step, out_dtype)
    for width in (512, 2048, 8192, 12288, 1001):
        options = (gammas(rows, width)[1], empty(rows), 8, 127, 1e-5)
        bitlinear.bitlinear(empty(16384, width), empty(rows, width), weights(rows, width), *options)
    quantize_activation.ternary_quantize_activation(empty(300, columns), 127, 1e-5)
    for measure, per_row, width in itertools.product((0, 1), (False, True), (columns, 1001)):
        quantize_weight.ternary_quantize_weight(empty(rows, width), None, measure, per_row, 1e-5, False)
    if dtype != torch.float32:
        return  # integers do not know the dtype of the activations
    scale = gammas(rows, columns)[0]
    quantize_weight.ternary_quantize_weight(empty(rows, columns), scale, 0, False, 1e-5, True)
    tiles = {tile for table in _configs.BY_ARCHITECTURE.values() for bucket in table.values() for tile in bucket}
    for tokens, tile in itertools.product((16384, 64), sorted(tiles)):
        q = quantize_activation.quantize(empty(tokens, columns), 127, 1e-5, natural=False, slabs=True)
        linear._multiply_tiles(packed, q, scale, None, empty(tokens, rows), tile)
    for tokens in (1, 2, 4):
        linear.ternary_linear(empty(tokens, columns), packed, scale, None, t2, rows, columns, 8, 127, 1e-5, None)
    for pair in itertools.permutations(range(len(FORMATS)), 2):
        repack.ternary_repack(weights(rows, columns, pair[0]), *pair, rows, columns)


FAMILIES: dict[str, Callable[[torch.dtype], None]] = {"spherical": spherical_calls, "ternary": ternary_calls}


@functools.cache
def shipped(dtype: torch.dtype) -> tuple[Launch, ...]:
    """Every variant that the calls above launch for logits (or the like) of a dtype."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the kernels by interpreted ones: nothing to compile")
    with recorded() as launches:
        for calls in FAMILIES.values():
            calls(dtype)
    return tuple(launches)


# ------------------------------------------------------------------------------------------------------- ledger


def ledger_entries(reports: list[tuple[str, Report]]) -> dict[str, dict[str, dict[str, int]]]:
    """{"kernel dtype": {architecture: numbers}} of (dtype, report) pairs."""
    grouped: dict[tuple[str, str], list[Report]] = {}
    for dtype, report in reports:
        grouped.setdefault((f"{report.kernel} {dtype}", f"sm_{report.arch}"), []).append(report)
    entries: dict[str, dict] = {}
    for (kernel, target), found in sorted(grouped.items()):
        device = ledger_traffic.DEVICES.get(target) or ledger_traffic.DEVICES[f"{target}a"]
        blocks = (
            ledger_traffic.occupancy(report.registers, 32 * report.warps, report.shared_bytes, device)
            for report in found
        )
        entries.setdefault(kernel, {})[target] = {
            "variants": len(found),
            "registers": max(report.registers for report in found),
            "shared": max(report.shared_bytes for report in found),
            "fewest_blocks": min(blocks),
            "instructions": sum(report.instructions for report in found),
            "wide_loads": sum(report.wide_loads for report in found),
            "wide_stores": sum(report.wide_stores for report in found),
        }
    return entries


def regressions(old: dict, new: dict) -> list[str]:
    """What got worse between two sets of entries of one version."""
    found = [f"{kernel}: not in the ledger" for kernel in new.keys() - old.keys()]
    found += [f"{kernel}: only in the ledger" for kernel in old.keys() - new.keys()]
    for kernel in old.keys() & new.keys():
        for target in new[kernel]:
            was, now = old[kernel][target], new[kernel][target]
            if was["variants"] != now["variants"]:
                found.append(f"{kernel} {target}: {was['variants']} -> {now['variants']} variants")
                continue
            for number in ("registers", "shared", "instructions"):
                if now[number] > was[number] * cuda_ledger.GROWTH:
                    found.append(f"{kernel} {target}: {number} {was[number]} -> {now[number]}")
            for number in ("fewest_blocks", "wide_loads", "wide_stores"):
                if now[number] < was[number]:
                    found.append(f"{kernel} {target}: {number} {was[number]} -> {now[number]}")
    return sorted(found)


# ------------------------------------------------------------------------------------------------- command line


def _compile_one(task: tuple[str, int, int]) -> Report:
    dtype, index, arch = task
    return compile_launch(shipped(getattr(torch, dtype))[index], arch)


def _print_report(report: Report) -> None:
    print(
        f"sm_{report.arch:<4}{report.kernel:<41}{report.registers:>4} regs{report.shared_bytes:>7} B shared"
        f"{report.wide_loads:>4} LDG.128{report.wide_stores:>4} STG.128{report.instructions:>6} instr  {report.variant}"
        + "".join(f"  <-- {complaint}" for complaint in report.complaints()),
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    parser.add_argument("--arch", type=int, action="append", help=f"default: {ARCHITECTURES}")
    parser.add_argument("--dtype", action="append", help="default: all")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--update", action="store_true", help="write bench/ledger.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()

    dtypes = arguments.dtype or [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    tasks = [
        (dtype, index, arch)
        for dtype in dtypes
        for index, launch in enumerate(shipped(getattr(torch, dtype)))
        for arch in arguments.arch or ARCHITECTURES
        if arguments.kernel in launch.name
    ]
    reports = []
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs) as pool:
        for report in pool.map(_compile_one, tasks):
            _print_report(report)
            reports.append(report)
    bad = [report for report in reports if report.complaints()]
    print(f"triton {triton.__version__}: {len(reports)} variants compiled, {len(bad)} with complaints")
    problems = []
    if tasks and not (arguments.arch or arguments.dtype or arguments.kernel):
        entries = ledger_entries([(task[0], report) for task, report in zip(tasks, reports, strict=True)])
        known = cuda_ledger.load()["triton"]
        if arguments.update:
            known = known | {triton.__version__: entries}
            cuda_ledger.save(triton=known)
        if triton.__version__ in known:
            problems = regressions(known[triton.__version__], entries)
            print("\n".join(problems) or "ledger holds")
        else:
            print(f"not compared: the ledger has Triton {', '.join(known)}")
    if arguments.json:
        rows = [{**dataclasses.asdict(report), "complaints": report.complaints()} for report in reports]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if bad or problems or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
