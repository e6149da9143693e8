"""Prints the table for the docs from the rows in bench/results, and draws the plots.

python -m pyops._bench.report [FILE.jsonl] [--plots FOLDER] [--table FILE.md]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pyops._bench import harness, ternary, ternary_targets

_KEY = ("op", "pass", "shape", "dtype", "threads")


def latest(rows: list[dict]) -> list[dict]:
    """The newest row of every case: rows are in the order in which they were taken."""
    found: dict[str, dict] = {}
    for row in rows:
        key = str([row[part] for part in _KEY])
        found.pop(key, None)
        found[key] = row
    return list(found.values())


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _percent(row: dict, probe: str) -> str:
    share = row["fraction"].get(probe)
    return f"{100 * share:.0f} %" if share is not None else ""


def _speedup(row: dict, *names: str) -> str:
    ratios = [row["references"][name]["ratio"] for name in names if name in row["references"]]
    return f"{min(ratios):.2f}" if ratios else ""


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def case_table(rows: list[dict]) -> str:
    """One line per case; speed-ups are paired medians, percentages are of a probe timed in the same rounds."""
    header = ["op", "pass", "logits", "threads", "time", "times faster than best rival", "eager formula"]
    header += ["torch.compile", "F.cross_entropy", "of copy", "of clone", "of read"]
    lines = []
    for row in rows:
        if "dispatcher" in row["references"] or row["op"] in ternary.OPS:
            continue
        best = f"**{row['speedup']:.2f}** ({row['rival']})" if row["rival"] else ""
        rivals = [_speedup(row, name) for name in ("eager", "compile", "F.cross_entropy")]
        shape = "x".join(map(str, row["shape"]))
        lines.append(
            [row["op"], row["pass"], f"{shape} {row['dtype']}", str(row["threads"]), _time(row["median"]), best]
            + rivals
            + [_percent(row, probe) for probe in ("copy", "clone", "read")]
        )
    return _markdown(header, lines) if lines else ""


def call_table(rows: list[dict]) -> str:
    """The price of a call: what Python costs over the dispatcher call, on tensors so small that nothing else counts."""
    lines = []
    for row in rows:
        if "dispatcher" in row["references"]:
            entry = row["references"]["dispatcher"]
            grad = "yes" if row["pass"] == "call_grad" else "no"
            over = f"{entry['overhead_us']:.1f} us"
            lines.append([row["op"], grad, _time(row["median"]), _time(entry["seconds"]), over])
    header = ["op", "gradient wanted", "one call", "bare dispatcher call", "over it"]
    return _markdown(header, lines) if lines else ""


def probe_table(rows: list[dict]) -> str:
    units = {"copy_bytes_per_s": "copy GB/s", "clone_bytes_per_s": "clone GB/s", "read_bytes_per_s": "read GB/s"}
    units |= {"gemm_float32_flop_per_s": "GEMM float32 GFLOP/s", "gemm_bfloat16_flop_per_s": "GEMM bfloat16 GFLOP/s"}
    units |= {"stream_bytes_per_s": "prefetched read GB/s", "peak_macs_per_s": "8-bit dot G multiply-adds/s"}
    lines = [
        [str(row["threads"]), *(f"{row[name] / 1e9:.1f}" if name in row else "" for name in units)] for row in rows
    ]
    return _markdown(["threads", *units.values()], lines) if lines else ""


def text(rows: list[dict]) -> str:
    """All tables, with the machine on top. Rows of one file are of one machine."""
    newest = rows[-1]
    head = f"{newest['machine']}, torch {newest['torch']}, pyops at {newest['commit']}, {newest['date']}"
    probes = [row for row in rows if row["op"] == "probe"]
    cases = [row for row in rows if row["op"] != "probe"]
    parts = [head, probe_table(probes), case_table(cases), call_table(cases)]
    if any(row["op"] in ternary.OPS for row in cases):
        parts.append(ternary_targets.text(cases, every_case=True))
    return "\n\n".join(part for part in parts if part)


# ---- plots -------------------------------------------------------------------------------------------------


def _label(row: dict) -> str:
    return f"{row['op']} {row['pass']}\n{'x'.join(map(str, row['shape']))} {row['dtype']}, {row['threads']} thr."


def _bars(rows: list[dict], groups: dict[str, list[float | None]], axis_text: str, path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 0.55 * len(rows) + 1.5), layout="constrained")
    height = 0.8 / len(groups)
    for index, (name, values) in enumerate(groups.items()):
        places = [line + (index - (len(groups) - 1) / 2) * height for line in range(len(rows))]
        axis.barh(places, [value or 0 for value in values], height, label=name)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=7)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel(axis_text)
    axis.legend(fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def plots(rows: list[dict], folder: Path) -> list[Path]:
    """Speed-ups and fractions of the memory probes, one bar chart each."""
    paths = []
    compared = [row for row in rows if row.get("rival") and row["pass"] in ("forward", "backward", "forward_backward")]
    names = ("eager", "compile", "F.cross_entropy")
    if compared:
        ratios = {name: [row["references"].get(name, {}).get("ratio") for row in compared] for name in names}
        ratios = {"best rival": [row["speedup"] for row in compared]} | ratios
        paths.append(_bars(compared, ratios, "times faster than", folder / "speedup.png"))
    streamed = [row for row in rows if {"copy", "clone", "read"} & set(row.get("fraction", ()))]
    if streamed:
        shares = {probe: [row["fraction"].get(probe) for row in streamed] for probe in ("copy", "clone", "read")}
        paths.append(_bars(streamed, shares, "bandwidth as a fraction of the probe", folder / "roofline.png"))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pyops._bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="rows; those of this machine by default")
    parser.add_argument("--plots", type=Path, help="folder of the plots; bench/results/local by default")
    parser.add_argument("--table", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    path = arguments.file or harness.results_file(quick=False)
    if path is None or not path.exists():
        sys.exit("no rows here: run `make bench` in the source tree first, or name a file")
    rows = latest(harness.load(path))
    tables = text(rows)
    print(tables)
    if arguments.table:
        arguments.table.write_text(tables + "\n")
    try:
        drawn = plots(rows, arguments.plots or path.parent / "local")
    except ImportError:
        print("matplotlib is not installed: no plots (pip install 'pyops-kernels[demo]')", file=sys.stderr)
        return
    for plot in drawn:
        print(f"plot: {plot}", file=sys.stderr)


if __name__ == "__main__":
    main()
