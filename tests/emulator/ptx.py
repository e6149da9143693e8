"""Runs straight-line PTX of a one-warp kernel: what nvcc makes of an intrinsic, without a GPU.

The meaning of each instruction is written here once more, from the PTX manual and without a look at the emulator's
portable bodies: the two must agree. An operand swapped in an asm string, a forgotten `.trans` or a wrong type shows.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy
import torch

LANES = 32
SHARED = 1 << 20  # where shared memory begins in the interpreter's address space; global addresses are above


def compile_ptx(source: Path, folder: Path, arch: str = "sm_80") -> str:
    """PTX of a kernel file; FileNotFoundError without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on PATH")
    target = folder / f"{source.stem}.ptx"
    subprocess.run([nvcc, "-std=c++20", f"-arch={arch}", "-ptx", "-o", target, source], check=True, capture_output=True)
    return target.read_text()


class Memory:
    """Buffers at made-up addresses."""

    def __init__(self):
        self.parts: list[tuple[int, numpy.ndarray]] = [(SHARED, numpy.full(1 << 16, 0xFF, numpy.uint8))]

    def add(self, values: numpy.ndarray) -> int:
        """The address of a copy of an array."""
        begin = (max(begin + part.size for begin, part in self.parts) + 4096 + 255) // 256 * 256
        self.parts.append((begin, numpy.ascontiguousarray(values).reshape(-1).view(numpy.uint8).copy()))
        return begin

    def at(self, address: int, size: int) -> numpy.ndarray:
        for begin, part in self.parts:
            if begin <= address and address + size <= begin + part.size:
                return part[address - begin : address - begin + size]
        raise IndexError(f"{size} bytes at {address:#x} are in no buffer")

    def load(self, address: int, size: int) -> int:
        return int.from_bytes(self.at(address, size).tobytes(), "little")

    def store(self, address: int, size: int, value: int) -> None:
        self.at(address, size)[:] = numpy.frombuffer(
            (value & (1 << 8 * size) - 1).to_bytes(size, "little"), numpy.uint8
        )


def _operands(text: str) -> list:
    """ "{%a, %b}, [%c+4], 5" as [["%a", "%b"], "[%c+4]", "5"]."""
    found = []
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text):
        found.append([p.strip() for p in part[1:-1].split(",")] if part.startswith("{") else part)
    return found


def _floats(bits: list[int]) -> numpy.ndarray:
    return numpy.array(bits, numpy.uint32).view(numpy.float32)


def _float_bits(values) -> list[int]:
    return numpy.asarray(values, numpy.float32).view(numpy.uint32).tolist()


def _signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _halves(bits: numpy.ndarray, kind: str) -> numpy.ndarray:
    """16-bit patterns as float64."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    return torch.from_numpy(bits.astype(numpy.uint16).view(numpy.int16).copy()).view(dtype).double().numpy()


class Kernel:
    """One entry of a PTX file."""

    def __init__(self, ptx: str, name: str):
        entry = re.search(rf"\.entry (\S*{name}\S*)\((.*?)\)\s*\{{(.*?)\n\}}", ptx, re.DOTALL)
        if entry is None:
            raise LookupError(f"no entry named like {name}")
        body = re.sub(r"//[^\n]*", "", entry[3])
        self.symbols: dict[str, int] = {}
        self.instructions: list[str] = []
        at = SHARED
        for statement in filter(None, (" ".join(s.split()) for s in body.split(";"))):
            shared = re.match(r"\.shared \.align (\d+) \.b8 (\S+)\[(\d+)\]", statement)
            if shared:
                at = (at + int(shared[1]) - 1) // int(shared[1]) * int(shared[1])
                self.symbols[shared[2]] = at
                at += int(shared[3])
            elif not statement.startswith(".reg"):
                self.instructions.append(statement)

    def run(self, memory: Memory, *parameters: int) -> None:
        self.memory, self.parameters = memory, parameters
        self.registers: dict[str, list[int]] = {"%tid.x": list(range(LANES))}
        self.copies: list[list[tuple]] = []
        self.open: list[tuple] = []
        for instruction in self.instructions:
            if instruction == "ret" or not instruction:
                continue
            opcode, _, rest = instruction.partition(" ")
            self._execute(opcode.split("."), _operands(rest))

    def value(self, operand: str) -> list[int]:
        if operand in self.registers:
            return self.registers[operand]
        if operand in self.symbols:
            return [self.symbols[operand]] * LANES
        return [int(operand, 0)] * LANES

    def addresses(self, operand: str) -> list[int]:
        base, _, offset = operand[1:-1].partition("+")
        return [address + int(offset or "0") for address in self.value(base)]

    def set(self, operand: str, values: list[int], bits: int = 64) -> None:
        self.registers[operand] = [int(value) & (1 << bits) - 1 for value in values]

    def _execute(self, op: list[str], args: list) -> None:
        name = op[0]
        if name == "ld" and op[1] == "param":
            self.set(args[0], [self.parameters[int(args[1][1:-1].rpartition("_")[2])]] * LANES)
        elif name in ("ld", "st"):
            self._memory(name, op, args)
        elif name == "mov" or (name == "cvta") or (name == "cvt" and op[1:] == ["u64", "u32"]):
            self.set(args[0], self.value(args[1]))
        elif name in ("cvt", "ex2", "dp4a"):
            self._convert(".".join(op), args)
        elif name in ("add", "and", "shl", "mul", "bfi", "or", "sub"):
            self._arithmetic(op, args)
        elif name == "setp":
            a, b = self.value(args[1]), self.value(args[2])
            test = {"eq": int.__eq__, "lt": int.__lt__, "gt": int.__gt__, "ne": int.__ne__}[op[1]]
            read = _signed if op[2].startswith("s") else int
            self.set(args[0], [test(read(x), read(y)) for x, y in zip(a, b, strict=True)], 1)
        elif name == "selp":
            yes, no, chosen = (self.value(a) for a in args[1:])
            self.set(args[0], [y if c else n for y, n, c in zip(yes, no, chosen, strict=True)])
        elif name == "bar":
            pass  # the lanes go in step
        elif name in ("shfl", "vote"):
            self._warp(op, args)
        elif name == "mma":
            self._mma(op, args)
        elif name == "ldmatrix":
            self._ldmatrix(op, args)
        elif name == "cp":
            self._copy(op, args)
        else:
            raise NotImplementedError(".".join(op))

    def _arithmetic(self, op: list[str], args: list) -> None:
        values = [self.value(a) for a in args[1:]]
        bits = 64 if op[-1].endswith("64") or op[1] == "wide" else 32
        if op[0] == "bfi":  # (source, into, position, length)
            result = [i & ~((1 << n) - 1 << p) | (s & (1 << n) - 1) << p for s, i, p, n in zip(*values, strict=True)]
        else:
            apply = {
                "add": int.__add__,
                "sub": int.__sub__,
                "and": int.__and__,
                "or": int.__or__,
                "shl": int.__lshift__,
                "mul": int.__mul__,
            }[op[0]]
            result = [apply(x, y) for x, y in zip(*values, strict=True)]
        self.set(args[0], result, bits)

    def _memory(self, name: str, op: list[str], args: list) -> None:
        size = int(re.sub(r"\D", "", op[-1])) // 8
        place, registers = (args[1], args[0]) if name == "ld" else (args[0], args[1])
        registers = registers if isinstance(registers, list) else [registers]
        for i, register in enumerate(registers):
            at = [address + i * size for address in self.addresses(place)]
            if name == "ld":
                self.set(register, [self.memory.load(address, size) for address in at])
            else:
                for address, value in zip(at, self.value(register), strict=True):
                    self.memory.store(address, size, value)

    def _convert(self, name: str, args: list) -> None:
        values = [self.value(a) for a in args[1:]]
        if name in ("cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"):  # (high, low)
            dtype = torch.bfloat16 if "bf16x2" in name else torch.float16
            high, low = (
                torch.from_numpy(_floats(v).copy()).to(dtype).view(torch.int16).numpy().view(numpy.uint16)
                for v in values
            )
            self.set(args[0], [int(h) << 16 | int(x) for h, x in zip(high, low, strict=True)])
        elif name == "cvt.f32.f16":
            self.set(args[0], _float_bits(_halves(numpy.array(values[0]) & 0xFFFF, "f16")))
        elif name == "ex2.approx.ftz.f32":
            with numpy.errstate(over="ignore"):
                power = numpy.exp2(_floats(values[0]).astype(numpy.float64))
                self.set(args[0], _float_bits(numpy.where(power < 2.0**-126, 0, power).astype(numpy.float32)))
        elif name == "dp4a.s32.s32":
            self.set(
                args[0],
                [
                    _signed(c) + sum(_signed(a >> s, 8) * _signed(b >> s, 8) for s in (0, 8, 16, 24))
                    for a, b, c in zip(*values, strict=True)
                ],
                32,
            )
        else:
            raise NotImplementedError(name)

    def _warp(self, op: list[str], args: list) -> None:
        if op[0] == "vote":
            votes = self.value(args[1])
            ballot = sum(bool(vote) << lane for lane, vote in enumerate(votes))
            result = {"ballot": ballot, "any": int(any(votes)), "all": int(all(votes))}[op[2]]
            self.set(args[0], [result] * LANES)
            return
        source, b, clamp = (self.value(a) for a in args[1:4])
        result = []
        for lane in range(LANES):
            segment = clamp[lane] >> 8 & 31
            low, high = lane & segment, lane & segment | clamp[lane] & 31 & ~segment
            chosen = {"bfly": lane ^ b[lane], "down": lane + b[lane], "up": lane - b[lane],
                      "idx": low | b[lane] & ~segment & 31}[op[2]]  # fmt: skip
            inside = chosen >= high if op[2] == "up" else chosen <= high
            result.append(source[chosen if inside and 0 <= chosen < LANES else lane])
        self.set(args[0].partition("|")[0], result)

    def _mma(self, op: list[str], args: list) -> None:
        shape, kinds = op[3], op[-4:]
        if op[1:3] != ["sync", "aligned"] or op[4:6] != ["row", "col"] or kinds[1] != kinds[2] or kinds[0] != kinds[3]:
            raise NotImplementedError(".".join(op))
        depth, kind = {"m16n8k16": 16, "m16n8k32": 32}[shape], kinds[1]
        d, a, b, c = (
            [numpy.array(self.value(r), numpy.uint64) if r in self.registers else None for r in part] for part in args
        )
        each = 4 if kind == "s8" else 2
        width = 32 // each
        matrix_a, matrix_b, matrix_c = numpy.zeros((16, depth)), numpy.zeros((depth, 8)), numpy.zeros((16, 8))

        def element(register: numpy.ndarray, lane: int, part: int) -> float:
            bits = int(register[lane]) >> width * part & (1 << width) - 1
            return float(_signed(bits, 8)) if kind == "s8" else float(_halves(numpy.array([bits]), kind)[0])

        for lane in range(LANES):
            group, thread = lane >> 2, lane % 4
            for part in range(each):
                for r in range(4):
                    matrix_a[group + 8 * (r % 2), each * thread + part + each * 4 * (r // 2)] = element(
                        a[r], lane, part
                    )
                for r in range(2):
                    matrix_b[each * thread + part + each * 4 * r, group] = element(b[r], lane, part)
            for e in range(4):
                bits = int(c[e][lane])
                value = float(_signed(bits)) if kind == "s8" else float(_floats([bits])[0])
                matrix_c[group + 8 * (e // 2), 2 * thread + e % 2] = value
        product = matrix_a @ matrix_b + matrix_c
        for e, register in enumerate(args[0]):
            values = [product[(lane >> 2) + 8 * (e // 2), 2 * (lane % 4) + e % 2] for lane in range(LANES)]
            self.set(register, [int(v) for v in values] if kind == "s8" else _float_bits(values), 32)
        assert d is not None

    def _ldmatrix(self, op: list[str], args: list) -> None:
        if op[1:4] != ["sync", "aligned", "m8n8"] or op[-2:] != ["shared", "b16"]:
            raise NotImplementedError(".".join(op))
        addresses = self.addresses(args[1])
        for m, register in enumerate(args[0]):
            if any(address % 16 for address in addresses[8 * m : 8 * m + 8]):
                raise ValueError("ldmatrix: an address is not a multiple of 16")
            rows = [self.memory.at(address, 16).view(numpy.uint16) for address in addresses[8 * m : 8 * m + 8]]
            matrix = numpy.array(rows)
            matrix = matrix.T if "trans" in op else matrix
            pairs = [matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2] for lane in range(LANES)]
            self.set(register, [int(low) | int(high) << 16 for low, high in pairs])
        if len(args[0]) != int(op[4][1:]):
            raise ValueError("ldmatrix: registers and matrices differ in number")

    def _copy(self, op: list[str], args: list) -> None:
        if op[2] == "commit_group":
            self.copies.append(self.open)
            self.open = []
        elif op[2] == "wait_group":
            keep = int(args[0])
            while len(self.copies) > keep:
                for target, source, size, count in self.copies.pop(0):
                    data = self.memory.at(source, count).copy() if count else numpy.zeros(0, numpy.uint8)
                    self.memory.at(target, size)[:] = numpy.concatenate([data, numpy.zeros(size - count, numpy.uint8)])
        elif op[2:] == ["cg", "shared", "global"]:
            targets, sources = self.addresses(args[0]), self.addresses(args[1])
            size, counts = int(args[2]), self.value(args[3])
            for target, source, count in zip(targets, sources, counts, strict=True):
                self.memory.at(target, size)[:] = 0xFF
                self.open.append((target, source, size, count))
        else:
            raise NotImplementedError(".".join(op))
