"""Set-up of every test run, and the record of what ran and what did not.

The summary at the end counts cases per backend and per row of the reliability matrix. A skipped case is "not run",
with its reason; it is never counted as passed. A test says which rows it belongs to with
``@pytest.mark.row("R1")``, and which backend it exercises by being parametrised over ``backend``; a test that goes
through many inputs in one call reports their number through the ``count_cases`` fixture.
"""

from __future__ import annotations

import os

# Read when a kernel is defined, so before anything can import one; 0 compiles them, for a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import contract
import hypothesis
import numpy
import pytest
import torch

# Rows of the reliability matrix with what they are about, and for rows that no test belongs to, why.
ROWS = {
    "R1": "strided, sliced, expanded inputs",
    "R2": "storage offsets",
    "R3": "empty dimensions",
    "R4": "ones, primes, tile edges",
    "R5": "more than 2^31 elements",
    "R6": "NaN and infinities",
    "R7": "denormals, extremes, equal rows",
    "R8": "large magnitudes",
    "R9": "dtype rejection",
    "R10": "device and layout rejection",
    "R11": "targets and indices",
    "R12": "block patterns",
    "R13": "packed ternary weights",
    "R14": "solver inputs",
    "R15": "masked attention rows",
    "R16": "constant logits, one class",
    "R17": "subsets of requires_grad",
    "R18": "saved tensors modified",
    "R19": "aliasing inputs",
    "R20": "gradcheck, second and batched",
    "R21": "forward mode and Hessians",
    "R22": "vmap",
    "R23": "opcheck",
    "R24": "torch.compile",
    "R25": "torch.export",
    "R26": "autocast",
    "R27": "checkpointing, modes, hooks",
    "R28": "Python threads",
    "R29": "fork",
    "R30": "pickle, deepcopy, spawn",
    "R31": "Ctrl-C",
    "R32": "out of memory",
    "R33": "leaks",
    "R34": "CUDA graphs",
    "R35": "streams",
    "R36": "sanitizer builds",
    "R37": "CUDA memory checkers",
    "R38": "property fuzz",
    "R39": "mutation",
    "R40": "corrupt checkpoints",
    "R41": "malicious pickles",
    "R42": "huge declared sizes",
    "R43": "stale or missing parts",
    "R44": "thread counts",
    "R45": "repeats, batch split",
    "R46": "tensor subclasses",
    "R47": "backend pairs",
}
NO_TEST = {
    "R12": "family block_sparse",
    "R14": "family solvers",
    "R15": "family kronecker",
    "R31": "no op here runs long enough to be interrupted",
    "R34": "needs a CUDA device",
    "R35": "needs a CUDA device",
    "R36": "a separate build (make sanitize)",
    "R37": "needs a CUDA device",
    "R39": "a separate job over mutated sources",
}

# These put a Python router on the dispatcher for the rest of the process. They run last, so that all other tests
# see the C++ kernels exactly as a user's process has them.
ROUTED_BACKENDS = ("reference", "triton-interpreted", "triton-gpu", "cuda-emulated")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "contract.py")
    config.addinivalue_line("markers", "routed: calls pyops.use_backend, so it runs after the tests that do not")


def pytest_itemcollected(item: pytest.Item) -> None:
    if _backend_of(item) == "cuda-emulated":
        item.add_marker("emu")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wants_slow = "slow" in (config.option.markexpr or "")
    items[:] = [item for item in items if contract.concerns(item.path.parent.name, _parameters_of(item))]
    for item in items:
        backend = _backend_of(item)
        item.user_properties.append(("backend", backend))
        for mark in item.iter_markers("row"):
            item.user_properties.extend(("row", row) for row in mark.args)
        if item.get_closest_marker("slow") and not wants_slow:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=contract.unavailable("cuda")))
    items.sort(key=_routed)


def _parameters_of(item: pytest.Item) -> dict[str, object]:
    parameters = getattr(item, "callspec", None)
    return parameters.params if parameters else {}


def _backend_of(item: pytest.Item) -> str:
    return _parameters_of(item).get("backend", "default")


def _routed(item: pytest.Item) -> bool:
    values = _parameters_of(item).values()
    return any(value in ROUTED_BACKENDS for value in values if isinstance(value, str)) or (
        item.get_closest_marker("routed") is not None
    )


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002  (whoever uses the global generator gets a fixed one)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """No test changes what the next one runs on."""
    threads, isa = torch.get_num_threads(), contract.native().current_isa()
    yield
    assert torch.get_num_threads() == threads, "the test left another number of threads behind"
    assert contract.native().current_isa() == isa, "the test left another ISA level behind"
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on one of contract.BACKENDS; not run, with the reason, where that is not available."""
    reason = contract.unavailable(request.param)
    if reason:
        pytest.skip(reason)
    with contract.running_on(request.param):
        yield request.param


@pytest.fixture
def count_cases(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Tells the summary how many cases one test went through."""
    return lambda number: request.node.user_properties.append(("cases", number))


hypothesis.settings.register_profile(
    "pyops",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("pyops")


# ---- the summary -------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran: dict[str, Counter] = defaultdict(Counter)
    not_run: dict[str, Counter] = defaultdict(Counter)
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            if outcome == "deselected":
                _count(not_run, report.user_properties, "deselected")
            elif outcome == "skipped":
                _count(not_run, report.user_properties, _reason(report))
            elif outcome in ("passed", "failed", "error") and hasattr(report, "user_properties"):
                _count(ran, report.user_properties, outcome)
    terminalreporter.section("cases by backend")
    native = contract.native()
    default = f"default (here: cpu, {native.current_isa()})"
    for backend in ("default", *contract.BACKENDS):
        _line(terminalreporter, default if backend == "default" else backend, ran[backend], not_run[backend],
              contract.unavailable(backend) if backend != "default" else "")  # fmt: skip
    terminalreporter.section("cases by row of the reliability matrix")
    for row, title in ROWS.items():
        _line(terminalreporter, f"{row:<4}{title}", ran[row], not_run[row], NO_TEST.get(row, ""))


def _count(table: dict[str, Counter], properties: list[tuple[str, object]], kind: str) -> None:
    cases = sum(value for name, value in properties if name == "cases") or 1
    for name, value in properties:
        if name in ("backend", "row"):
            table[value][kind] += cases


def _reason(report: pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def _line(reporter: pytest.TerminalReporter, name: str, ran: Counter, not_run: Counter, why_none: str) -> None:
    bad = ran["failed"] + ran["error"]
    text = f"{name:<40}{sum(ran.values()):>6} ran" + (f", {bad} FAILED" if bad else "")
    for reason, number in not_run.items():
        text += f"; {number} NOT RUN: {reason}"
    if not ran and not not_run:
        text += f"; NOT RUN: {why_none or 'not collected in this run'}"
    reporter.write_line(text)
