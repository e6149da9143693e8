"""Argument parsing of ``python -m pyops``; each command lives in a module of its own."""

from __future__ import annotations

import argparse
import json
import sys

from pyops import __version__
from pyops.cli import info


def _print(result: dict, as_json: bool, text: str) -> None:
    print(json.dumps(result, indent=2, sort_keys=True) if as_json else text)


def _info(arguments: argparse.Namespace) -> int:
    facts = info.collect()
    _print(facts, arguments.json, info.format_text(facts))
    return 0


def _env(arguments: argparse.Namespace) -> int:
    table = info.environment()
    _print(table, arguments.json, info.format_environment(table))
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from pyops.cli import explain

    return explain.run(arguments)


def _selftest(arguments: argparse.Namespace) -> int:
    from pyops.cli import selftest

    return selftest.run(arguments)


def _bench(arguments: argparse.Namespace) -> int:
    from pyops.cli import bench

    return bench.run(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    from pyops.cli import demo

    return demo.run(arguments)


def _ckpt(arguments: argparse.Namespace) -> int:
    from pyops.cli import ckpt

    return ckpt.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pyops", description="Facts, checks, benchmarks and the demo of pyops. No GPU needed."
    )
    parser.add_argument("--version", action="version", version=f"pyops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print JSON for a program to read")
        return command

    add(
        "info",
        _info,
        "versions, build, libraries found, CPU level, backends of every op and why some are missing",
    )
    add("env", _env, "every environment variable: allowed values, default, current value, meaning")
    selftest = add("selftest", _selftest, "run every op on every backend that is here, against the float64 reference")
    length = selftest.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="small shapes only, seconds (the default)")
    length.add_argument("--full", action="store_true", help="larger shapes and more options, a few minutes")
    explain = add("explain", _explain, "which backend and kernel level a call would run on, and why not another")
    explain.add_argument("op", help="public function, e.g. z_loss")
    explain.add_argument("--shape", default="64x1000", help="ROWSxCLASSES (default %(default)s)")
    explain.add_argument("--dtype", default="float32", help="float32, float64, bfloat16 or float16")
    explain.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    _add_bench(add)
    _add_demo(add)
    _add_ckpt(add)
    return parser


def _add_bench(add) -> None:
    from pyops.cli import bench

    bench.add_arguments(add("bench", _bench, "time ops against their best rivals, as paired ratios"))


def _add_demo(add) -> None:
    from pyops.cli import demo

    demo.add_arguments(add("demo", _demo, "train a next-token model on real text with z_loss and with cross_entropy"))


def _add_ckpt(add) -> None:
    from pyops.cli import ckpt

    ckpt.add_arguments(add("ckpt", _ckpt, "show, verify or convert a file of packed ternary weights"))


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. Ctrl-C ends with status 130 and no traceback."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"pyops {arguments.command}: {error}", file=sys.stderr)
        return 1
