"""Builds kernel files for the CPU emulator and calls their launchers through ctypes.

    library = build([FOLDER / "faults.cu"], check=True)
    with library.session(seed=3, preemption=0.1) as session:
        x = session.input("x", values)
        out = session.output("out", (64,), numpy.float32)
        session.run("run_missing_barrier", True, x, out)
        print(session.reports(), out.values())

Every buffer is a copy between guards, so an index that runs over lands in memory that belongs to nobody; outputs start
as NaN (all bits one). ``build_for_device`` compiles the same files with nvcc for the GPU of this machine; its sessions
work alike.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cuda_ledger
import numpy
import torch

from pyops import _emulation

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
EMULATOR = ROOT / "csrc" / "emulator"
CACHE = ROOT / "build" / "emulation"
GUARD = 4096
ALIGNMENT = 256  # of buffers, as cudaMalloc's: the counters depend on it

COMMON = (
    "-std=c++20",
    "-fPIC",
    "-DPYOPS_EMU",
    "-g",
    "-ftls-model=initial-exec",
    "-fvisibility=default",
    "-Wall",
    "-Wextra",
)
KERNEL = ("-x", "c++", "-Wno-unknown-pragmas", "-ffp-contract=off")
FAST = ("-O2",)
CHECK = ("-O1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")


def _compile(*arguments: object) -> None:
    done = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ failed:\n{done.stderr[-6000:]}")


def _digest(paths: Sequence[Path], check: bool, ucontext: bool = False) -> str:
    text = hashlib.sha256(repr((check, ucontext, COMMON, KERNEL, FAST, CHECK)).encode())
    headers = [*EMULATOR.glob("*"), *(ROOT / "csrc" / "device").glob("*"), *(ROOT / "csrc" / "common").glob("*.h")]
    headers += [header for path in paths for header in path.parent.glob("*.cuh")]
    for path in sorted([*headers, *paths]):
        text.update(path.name.encode() + path.read_bytes())
    return text.hexdigest()[:16]


@functools.cache
def _build(paths: tuple[Path, ...], check: bool, ucontext: bool) -> Library:
    CACHE.mkdir(parents=True, exist_ok=True)
    target = CACHE / f"{paths[0].stem}_{'check' if check else 'fast'}_{_digest(paths, check, ucontext)}.so"
    if not target.exists():
        folder = Path(f"{target}.{os.getpid()}")
        folder.mkdir()
        objects = []
        for path in paths:
            objects.append(folder / f"{path.stem}.o")
            _compile(*COMMON, *KERNEL, *(CHECK if check else FAST), "-c", path, "-o", objects[-1])
        for path in [EMULATOR / "runtime.cpp", *([EMULATOR / "checker.cpp"] if check else [])]:
            objects.append(folder / f"{path.stem}.o")
            _compile(*COMMON, "-O2", *["-DPYOPS_EMU_UCONTEXT"] * ucontext, "-c", path, "-o", objects[-1])
        _compile("-shared", "-o", folder / "done.so", *objects, "-ldl", "-pthread")
        os.replace(folder / "done.so", target)
        shutil.rmtree(folder)
    return Library(target, check)


def build(paths: Sequence[Path], *, check: bool, ucontext: bool = False) -> Library:
    """The library of some kernel files, from the cache when nothing changed; ``ucontext``: with the switch of fibers
    that other processors than x86-64 get."""
    return _build(tuple(Path(path) for path in paths), check, ucontext)


class Buffer:
    """Memory of a kernel argument, between guards."""

    def __init__(self, name: str, values: numpy.ndarray, writable: bool):
        self.name, self.shape, self.dtype, self.writable = name, values.shape, values.dtype, writable
        self.bytes = values.nbytes
        self._memory = numpy.full(self.bytes + 2 * GUARD + ALIGNMENT, 0xA5, numpy.uint8)
        start = self._start()
        self._inside = slice(start, start + self.bytes)
        self._memory[self._inside] = numpy.ascontiguousarray(values).reshape(-1).view(numpy.uint8)
        self._before = self._memory.copy()
        self.address = self._place() + start

    def _start(self) -> int:
        start = GUARD - self._memory.ctypes.data % ALIGNMENT
        return start + (ALIGNMENT if start < GUARD else 0)

    def _place(self) -> int:
        return self._memory.ctypes.data

    def _now(self) -> numpy.ndarray:
        return self._memory

    def values(self) -> numpy.ndarray:
        return self._now()[self._inside].view(self.dtype).reshape(self.shape).copy()

    def damage(self) -> str:
        """What was written that must not have been: guards, or an input."""
        changed = self._now() != self._before
        if self.writable:
            changed[self._inside] = False
        at = numpy.flatnonzero(changed)
        return f"byte {at[0] - self._inside.start} of {self.name} was overwritten" if at.size else ""


class DeviceBuffer(Buffer):
    """The same in the memory of a GPU, whose allocator aligns."""

    def _start(self) -> int:
        return GUARD

    def _place(self) -> int:
        self._device = torch.from_numpy(self._memory).cuda()
        return self._device.data_ptr()

    def _now(self) -> numpy.ndarray:
        return self._device.cpu().numpy()


class Library:
    buffer = Buffer

    def __init__(self, path: Path, check: bool):
        self.path, self.check = path, check
        self._library = ctypes.CDLL(str(path))

    def __getattr__(self, name: str):
        return getattr(self._library, name)

    @contextmanager
    def session(self, seed: int = 0, preemption: float = 0.0, threads: int = 1) -> Iterator[Session]:
        self.pyops_emulator_configure(ctypes.c_uint(seed), ctypes.c_double(preemption), ctypes.c_int(threads))
        session = Session(self)
        session.reports(clear=True)
        try:
            yield session
        finally:
            if self.check:
                self.pyops_emulator_forget_buffers()


class DeviceLibrary(Library):
    buffer = DeviceBuffer

    @contextmanager
    def session(self, seed: int = 0, preemption: float = 0.0, threads: int = 1) -> Iterator[Session]:
        yield Session(self)


@functools.cache
def build_for_device(paths: tuple[Path, ...]) -> DeviceLibrary:
    """The same launchers for the GPU of this machine."""
    CACHE.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}" + ("a" if major >= 9 else "")
    target = CACHE / f"{paths[0].stem}_sm_{architecture}_{_digest(paths, False)}.so"
    if not target.exists():
        command = [cuda_ledger.find_nvcc(), "-std=c++20", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}", "-o", f"{target}.{os.getpid()}"]
        subprocess.run([*command, *map(str, paths)], check=True)
        os.replace(f"{target}.{os.getpid()}", target)
    return DeviceLibrary(target, False)


class Session:
    def __init__(self, library: Library):
        self.library = library
        self.buffers: list[Buffer] = []

    def _add(self, buffer: Buffer) -> Buffer:
        self.buffers.append(buffer)
        if self.library.check:
            self.library.pyops_emulator_register(
                ctypes.c_void_p(buffer.address), ctypes.c_size_t(buffer.bytes),
                ctypes.c_size_t(buffer.dtype.itemsize), ctypes.c_bool(buffer.writable), buffer.name.encode(),
            )  # fmt: skip
        return buffer

    def input(self, name: str, values: numpy.ndarray) -> Buffer:
        return self._add(self.library.buffer(name, numpy.asarray(values), False))

    def output(self, name: str, shape: tuple[int, ...], dtype=numpy.float32) -> Buffer:
        size = int(numpy.prod(shape, dtype=numpy.int64)) * numpy.dtype(dtype).itemsize
        return self._add(
            self.library.buffer(name, numpy.full(size, 0xFF, numpy.uint8).view(dtype).reshape(shape), True)
        )

    def inout(self, name: str, values: numpy.ndarray) -> Buffer:
        return self._add(self.library.buffer(name, numpy.asarray(values), True))

    def bound(self, launcher: str, *arguments) -> Callable[[], int]:
        """An extern "C" launcher with its arguments: buffers are passed by address, int and bool as they are."""
        kinds = {bool: ctypes.c_bool, int: ctypes.c_int, float: ctypes.c_double}
        converted = [
            ctypes.c_void_p(a.address) if isinstance(a, Buffer) else kinds[type(a)](a) if type(a) in kinds else a
            for a in arguments
        ]
        return functools.partial(getattr(self.library, launcher), *converted)

    def run(self, launcher: str, *arguments) -> int:
        """Calls a launcher and sees that no buffer was damaged."""
        result = self.bound(launcher, *arguments)()
        for buffer in self.buffers:
            damage = buffer.damage()
            if damage and not self.library.check:
                raise AssertionError(damage)
        return result

    def reports(self, clear: bool = True) -> list[str]:
        """One line per finding, with code offsets turned into source lines; none of a GPU."""
        if isinstance(self.library, DeviceLibrary):
            return []
        size = self.library.pyops_emulator_reports(None, ctypes.c_size_t(0), ctypes.c_bool(False))
        text = ctypes.create_string_buffer(size)
        self.library.pyops_emulator_reports(text, ctypes.c_size_t(size), ctypes.c_bool(clear))
        return [resolve(self.library.path, line) for line in text.value.decode().splitlines()]

    def counters(self) -> dict[str, int]:
        """Of the last launch; check build only."""
        return _emulation.launches(self.library)[-1].counters


def resolve(library: Path, text: str) -> str:
    """Replaces code offsets ("+0x1a2b") by "file:line"."""
    offsets = re.findall(r"\+0x[0-9a-f]+", text)
    if not offsets or shutil.which("addr2line") is None:
        return text
    command = ["addr2line", "-a", "-i", "-e", str(library), *(offset[1:] for offset in offsets)]
    printed = subprocess.run(command, capture_output=True, text=True).stdout
    # An address, then the line and those that it was inlined into; the emulator's own lines say nothing to anyone.
    for offset, frames in zip(offsets, re.split(r"^0x[0-9a-f]+\n", printed, flags=re.MULTILINE)[1:], strict=True):
        lines = [Path(frame.split(" ")[0]).name for frame in frames.splitlines()]
        wanted = [line for line in lines if not line.startswith(("cuda_emulator.h", "?"))] or lines
        text = text.replace(offset, wanted[0], 1)
    return text
