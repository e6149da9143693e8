"""The targets of the ternary family against rows of the harness, as tables for bench/results/ternary.md.

python -m pyops._bench.ternary_targets [FILE.jsonl]     rows of this machine by default; without rows, empty tables
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyops._bench import harness
from pyops._bench.ternary import LARGE, OPS, SHAPES

UNKNOWN = "—"
TORCH_INT8 = ("_int_mm", "dynamic int8")


@dataclass(frozen=True)
class Target:
    """A number per shape that must reach ``bound``; ``at_most`` for times."""

    text: str
    measure: Callable[[dict], float | None]
    op: str
    what: str
    tokens: int | None
    threads: int
    bound: float
    dtype: str = "float32"
    at_most: bool = False


def _fraction(name: str) -> Callable[[dict], float | None]:
    return lambda row: row["fraction"].get(name)


def _ratio(*names: str) -> Callable[[dict], float | None]:
    """To the best of the references named."""

    def least(row: dict) -> float | None:
        found = [row["references"][name]["ratio"] for name in names if name in row["references"]]
        return min(found, default=None)

    return least


def _passes(row: dict) -> float | None:
    """Time in passes over the tensor that only read it."""
    share = row["fraction"].get("stream")
    return 1 / share if share else None


def _share_of_time(name: str) -> Callable[[dict], float | None]:
    def share(row: dict) -> float | None:
        return 1 / row["references"][name]["ratio"] if name in row["references"] else None

    return share


def _saved(row: dict) -> float:
    return row["saved_bytes"] / row["float_bytes"]


PRODUCT, TRAINING, WEIGHT = "linear_packed", "bitlinear", "quantize_weight"
TARGETS = (
    Target("t2 cold, of the stream", _fraction("stream"), PRODUCT, "t2_cold", 1, 1, 0.90),
    Target("t5 cold, times t2 cold", _ratio("t2"), PRODUCT, "t5_cold", 1, 1, 1.05),
    Target("t5 cold, times t2 cold", _ratio("t2"), PRODUCT, "t5_cold", 1, 2, 1.20),
    Target("t2 cold, of the stream", _fraction("stream"), PRODUCT, "t2_cold", 1, 2, 0.90),
    Target("M = 8, of peak", _fraction("peak"), PRODUCT, "t2_hot", 8, 1, 0.92),
    Target("M = 128, of peak", _fraction("peak"), PRODUCT, "t2_hot", 128, 1, 0.90),
    Target("M = 128, times torch's int8", _ratio(*TORCH_INT8), PRODUCT, "t2_hot", 128, 1, 1.08),
    Target("M = 512, of peak", _fraction("peak"), PRODUCT, "t2_hot", 512, 1, 0.90),
    Target("M = 512, times `torch._int_mm`", _ratio("_int_mm"), PRODUCT, "t2_hot", 512, 1, 1.00),
    *(
        Target(f"M = {tokens}, times one thread", _ratio("one thread"), PRODUCT, "t2_hot", tokens, 2, 1.90)
        for tokens in (1, 8, 128, 512)
    ),
    *(
        Target(f"{dtype} step, of F.linear's time", _share_of_time("F.linear"), TRAINING, "forward_backward", 512,
               threads, bound, dtype, at_most=True)
        for dtype, bound in (("float32", 0.85), ("bfloat16", 0.95)) for threads in (1, 2)
    ),
    Target("bytes saved for backward, of F.linear's", _saved, TRAINING, "forward_backward", 512, 1, 0.30, at_most=True),
    Target("gamma (mean) and T, read passes", _passes, WEIGHT, "absmean", None, 1, 2.3, at_most=True),
)  # fmt: skip

# G multiply-adds a second, in the order of SHAPES, on a Zen 4 of two virtual cores (peak 235 of one thread, 467 of two;
# reading 25-28 and 20-31 GB/s): what the targets were set by. For reference only: a ratio needs both sides in one run.
QUOTED = (
    ("M = 1, t2 cold, 1 thread", "best public ternary kernel", "72 / 73 / 84 / 77", "t2_cold", 1, 1),
    ("M = 1, t5 cold, 1 thread", "best public kernel below 2 bits", "54 / 56 / 55 / 53", "t5_cold", 1, 1),
    ("M = 1, t2 hot, 1 thread", "best public ternary kernel", "73 / 74 / 89 / 89", "t2_hot", 1, 1),
    ("M = 8, 1 thread", "torch dynamic int8", "198 / 167 / 169 / 160", "t2_hot", 8, 1),
    ("M = 128, 1 thread", "torch int8", "207 / 199 / 183 / 184", "t2_hot", 128, 1),
    ("M = 512, 1 thread", "`torch._int_mm`", "209 / 210 / 204 / 201", "t2_hot", 512, 1),
    ("M = 1, t2 cold, 2 threads", "best public ternary kernel", "119 / 111 / 135 / -", "t2_cold", 1, 2),
    ("M = 8, 2 threads", "torch dynamic int8", "345 / 387 / 278 / 305", "t2_hot", 8, 2),
    ("M = 128, 2 threads", "`torch._int_mm`", "395 / 364 / 368 / 318", "t2_hot", 128, 2),
    ("M = 512, 2 threads", "`torch._int_mm`", "415 / 411 / 401 / 384", "t2_hot", 512, 2),
    ("M = 1, t2 cold, AVX2 without VNNI", "best public AVX2 kernel", "72 / 73 / 84 / 77 (AVX2 or VNNI)",
     "t2_cold_avx2", 1, 1),
    ("M = 8, AVX2 without VNNI", "the same", "not known apart", "t2_hot_avx2", 8, 1),
)  # fmt: skip


def _rows_of(rows: list[dict], op: str, what: str, tokens: int | None, threads: int, dtype: str) -> list[dict | None]:
    """By shape; of the quantizers the one shape that they are measured at."""
    shapes = [list(LARGE)] if tokens is None else [[tokens, *shape] for shape in SHAPES]
    wanted = {"op": op, "pass": what, "threads": threads, "dtype": dtype}
    fitting = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return [next((row for row in fitting if row["shape"] == shape), None) for shape in shapes]


def _table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def _shape_names() -> list[str]:
    return [f"{n}x{k}" for n, k in SHAPES]


def target_table(rows: list[dict]) -> str:
    lines = []
    for target in TARGETS:
        found = _rows_of(rows, target.op, target.what, target.tokens, target.threads, target.dtype)
        values = [None if row is None else target.measure(row) for row in found]
        known = [value for value in values if value is not None]
        holds = [value <= target.bound if target.at_most else value >= target.bound for value in known]
        verdict = UNKNOWN if len(known) < len(values) else "yes" if all(holds) else f"**missed** {holds.count(False)}"
        cells = [UNKNOWN if value is None else f"{value:.2f}" for value in values]
        cells += [""] * (len(SHAPES) - len(cells))
        sign = "≤" if target.at_most else "≥"
        lines.append([target.text, str(target.threads), *cells, f"{sign} {target.bound:.2f}", verdict])
    return _table(["what", "threads", *_shape_names(), "target", "met"], lines)


def rate_table(rows: list[dict]) -> str:
    """G multiply-adds a second, and beside them rates quoted from another machine."""
    lines = []
    for text, rival, quoted, what, tokens, threads in QUOTED:
        cells = []
        for row in _rows_of(rows, PRODUCT, what, tokens, threads, "float32"):
            cells.append(UNKNOWN if row is None else f"{row['macs'] / row['median'] / 1e9:.0f}")
        lines.append([text, *cells, rival, quoted])
    return _table(["G multiply-adds/s", *_shape_names(), "quoted (Zen 4): of", "rates"], lines)


def quantizer_table(rows: list[dict]) -> str:
    """Times in read passes. gamma alone is what measuring adds to rounding by a given gamma."""
    lines = []
    for threads in (1, 2):
        passes = {}
        for what in ("absmean", "absmedian", "given"):
            (row,) = _rows_of(rows, WEIGHT, what, None, threads, "float32")
            passes[what] = None if row is None else _passes(row)
        for what, bound in (("absmean", 1.2), ("absmedian", 3.5)):
            both = passes[what] is not None and passes["given"] is not None
            alone = f"{passes[what] - passes['given']:.2f}" if both else UNKNOWN
            whole = UNKNOWN if passes[what] is None else f"{passes[what]:.2f}"
            lines.append([what, str(threads), alone, f"≤ {bound}", whole])
    return _table(["58.7 M float32", "threads", "gamma alone, read passes", "target", "gamma and T"], lines)


def _references(row: dict) -> str:
    return ", ".join(f"{name} {entry['ratio']:.2f}" for name, entry in row["references"].items())


def case_table(rows: list[dict]) -> str:
    """Every case: its rate, and how many times faster it is than each reference."""
    lines = []
    for row in rows:
        rate = f"{row['macs'] / row['median'] / 1e9:.1f}" if row.get("macs") else ""
        shape = "x".join(map(str, row["shape"]))
        time = f"{row['median'] * 1e6:.1f}"
        lines.append([row["op"], row["pass"], f"{shape} {row['dtype']}", str(row["threads"]), time, rate,
                      _references(row)])  # fmt: skip
    header = [
        "op",
        "pass",
        "shape",
        "threads",
        "us",
        "G multiply-adds/s",
        "times faster than (of peak, stream: fraction)",
    ]
    return _table(header, lines) if lines else ""


def text(rows: list[dict], every_case: bool = False) -> str:
    rows = [row for row in rows if row["op"] in OPS]
    parts = ["## Targets", target_table(rows), "## Quantizers", quantizer_table(rows), "## Rates", rate_table(rows)]
    if every_case:
        parts += ["## All cases", case_table([row for row in rows if "dispatcher" not in row["references"]])]
    return "\n\n".join(parts)


def main() -> None:
    from pyops._bench.report import latest

    parser = argparse.ArgumentParser(prog="python -m pyops._bench.ternary_targets", description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="rows; those of this machine by default")
    arguments = parser.parse_args()
    path = arguments.file or harness.results_file(quick=False)
    rows = latest(harness.load(path)) if path is not None and path.exists() else []
    print(text(rows))


if __name__ == "__main__":
    main()
