"""The package as a whole: import, environment, backends, the binaries, overhead, docstrings."""

from __future__ import annotations

import ast
import asyncio
import doctest
import importlib
import inspect
import json
import logging
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from contract import ALL_LEVELS, functions, in_fresh_process, native, on_every_host_backend, running_on
from mutation import all_mutants, mutated

import pyops
from pyops import _dispatch, _lib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(pyops.__file__).resolve().parent
LIBRARIES = sorted(path for path in PACKAGE.glob("*.so") if not path.name.startswith("_emulated"))  # what is shipped
KERNEL_OBJECTS = sorted(ROOT.glob("build/cp*/CMakeFiles/kernels_*.dir/**/*.o"))
LOGITS, TARGET = torch.zeros(2, 5), torch.tensor([1, 2])


# ---- import ------------------------------------------------------------------------------------------------


def test_import_takes_at_most_150_ms_more_than_torch():
    """Best of five fresh processes; and nothing optional is imported, no warning given, no CUDA touched."""
    script = """
        import warnings; warnings.simplefilter("error")
        import sys, time, torch
        before = set(sys.modules); start = time.perf_counter()
        import pyops
        seconds = time.perf_counter() - start
        assert not torch.cuda.is_initialized()
        optional = {"triton", "scipy", "matplotlib", "torch._dynamo", "torch._inductor"}
        assert not optional & (set(sys.modules) - before)
        print(seconds)
    """
    # With byte code, as an installed package has it: compiling the sources takes 70 ms.
    seconds = [float(in_fresh_process(script, PYTHONDONTWRITEBYTECODE="")) for _ in range(5)]
    assert min(seconds) <= 0.150, seconds


@pytest.mark.row("R43")
@pytest.mark.parametrize("triton", ["hidden", "broken"])
def test_works_without_triton(triton, tmp_path):
    """Import, calls and explain work; asking for Triton says why it cannot serve."""
    if triton == "broken":
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: broken on purpose')\n")
    script = """
        import sys
        if sys.argv[1] == "hidden":
            sys.modules["triton"] = None  # "import triton" raises ModuleNotFoundError
        else:
            sys.path.insert(0, sys.argv[2])
        import torch, pyops
        logits, target = torch.zeros(2, 5, requires_grad=True), torch.tensor([1, 2])
        pyops.z_loss(logits, target).backward()
        assert "triton" in pyops.explain("z_loss", logits, target).rejected
        with pyops.use_backend("reference"):
            pyops.z_loss(logits, target).backward()
        try:
            with pyops.use_backend("triton"):
                pyops.z_loss(logits, target)
        except RuntimeError as error:
            print(error)
    """
    said = in_fresh_process(script, triton, tmp_path)
    assert said.startswith("pyops::spherical_loss: backend triton was asked for but cannot serve: "), said
    assert "triton" in said.partition("serve: ")[2]


@pytest.mark.row("R43")
def test_damaged_installs_say_what_is_wrong(tmp_path):
    """No library, a library that does not load, and a torch that is too old: importing a name raises the sentence,
    and the pure-Python reference stays importable."""
    copies = {}
    for kind in ("missing", "garbage", "old torch"):
        copies[kind] = tmp_path / kind.replace(" ", "_")
        shutil.copytree(PACKAGE, copies[kind] / "pyops", ignore=shutil.ignore_patterns("__pycache__"))
    (copies["missing"] / "pyops" / "_ops.so").unlink()
    (copies["garbage"] / "pyops" / "_ops.so").write_bytes(b"not a library")
    script = """
        import json, sys, torch
        version, said = torch.__version__, {}
        for kind, folder in json.loads(sys.argv[1]).items():
            for name in [name for name in sys.modules if name.partition(".")[0] == "pyops"]:
                del sys.modules[name]
            sys.path.insert(0, folder)
            torch.__version__ = "2.10.1+cpu" if kind == "old torch" else version
            import pyops
            assert pyops.__file__.startswith(folder), pyops.__file__
            texts = []
            for attempt in (lambda: pyops.z_loss, lambda: exec("from pyops import nn", {})):
                try:
                    attempt()
                except ImportError as error:
                    texts.append(str(error))
            assert len(texts) == 2, f"{kind}: no ImportError"
            try:
                pyops.no_such_name
            except AttributeError:
                pass
            torch.__version__ = version
            import pyops.spherical.reference as reference
            assert reference.__file__.startswith(folder), reference.__file__
            loss = reference.spherical_loss(torch.zeros(2, 5), torch.tensor([1, 2]), loss="z")
            assert abs(loss.item() - 4.01815) < 1e-4
            said[kind] = texts[0], version
        print(json.dumps(said))
    """
    said = json.loads(in_fresh_process(script, json.dumps({k: str(v) for k, v in copies.items()})))
    missing, version = said["missing"]
    assert missing.startswith("pyops: _ops.so is not next to the package")
    assert "make setup" in missing
    assert "pip install" in missing
    assert said["garbage"][0].startswith(f"pyops: _ops.so does not load in torch {version}: ")
    assert "pip install --no-build-isolation" in said["garbage"][0]
    assert said["old torch"][0].startswith("pyops: built for torch >= 2.11, found 2.10.1+cpu. Install a newer torch: ")


@pytest.mark.row("R43")
def test_works_with_a_home_that_is_not_there(tmp_path):
    """Neither import nor calls write anywhere."""
    script = """
        import torch, pyops
        print(pyops.z_loss(torch.zeros(2, 5), torch.tensor([1, 2])).item() > 4)
    """
    folder = tmp_path / "home"
    folder.mkdir()
    folder.chmod(0o500)
    assert (
        in_fresh_process(script, HOME=str(folder / "none"), TMPDIR=str(folder), XDG_CACHE_HOME=str(folder)) == "True\n"
    )
    assert list(folder.iterdir()) == []


BAD_ENVIRONMENT = [
    ("PYOPS_BACKEND", "gpu"),
    ("PYOPS_BACKEND", "spherical=gpu"),
    ("PYOPS_BACKEND", "reference,gpu"),
    ("PYOPS_CPU_ISA", "avx3"),
    ("PYOPS_CPU_ISA", "AVX2"),
    ("PYOPS_STRICT", "yes"),
    ("PYOPS_VERIFY", "no"),
]


@pytest.mark.row("R43")
@pytest.mark.parametrize(("name", "value"), BAD_ENVIRONMENT)
def test_unknown_environment_values_raise(name, value, monkeypatch):
    """ValueError that names the variable, what it may be, and what it is."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^{name} must be one of: .*; got '{re.escape(value)}'$"):
        runpy.run_path(str(PACKAGE / "_environment.py"))


@pytest.mark.row("R43")
def test_environment_is_read_at_import():
    """The table above is what import runs; an unknown family is found at the first call."""
    script = """
        import os, torch
        os.environ["PYOPS_CPU_ISA"] = "avx3"
        try:
            import pyops
        except ValueError as error:
            print(error)
        import sys
        for name in [name for name in sys.modules if name.startswith("pyops")]:
            del sys.modules[name]
        del os.environ["PYOPS_CPU_ISA"]
        os.environ["PYOPS_BACKEND"] = "quaternions=reference"
        try:
            import pyops
            pyops.z_loss(torch.zeros(2, 5), torch.tensor([1, 2]))
        except ValueError as error:
            print(error)
    """
    first, second = in_fresh_process(script).splitlines()
    assert first.startswith("PYOPS_CPU_ISA must be one of: baseline, avx2, avxvnni, avx512, avx512vnni; got 'avx3'")
    assert second.startswith("PYOPS_BACKEND: unknown family 'quaternions', must be one of ['spherical', 'ternary']")


@pytest.mark.row("R43")
def test_environment_chooses_backend_and_level():
    script = """
        import torch, pyops
        explanation = pyops.explain("z_loss", torch.zeros(2, 5), torch.tensor([1, 2]))
        ran = pyops.z_loss(torch.zeros(2, 5), torch.tensor([1, 2]))
        print(explanation.backend, explanation.cpu_isa, pyops._lib.native.current_isa())
    """
    assert in_fresh_process(script, PYOPS_BACKEND="spherical=reference").split()[:2] == ["reference", "None"]
    assert in_fresh_process(script, PYOPS_CPU_ISA="baseline") == "cpu baseline baseline\n"


# ---- backends ----------------------------------------------------------------------------------------------


@pytest.fixture
def reference_runs(monkeypatch) -> list[str]:
    """The names of the operators that ran in the torch reference, in order."""
    runs: list[str] = []

    def counted(name, reference):
        def run(*args):
            runs.append(name)
            return reference(*args)

        return run

    for name, op in _dispatch._ops.items():
        monkeypatch.setattr(op, "reference", counted(name, op.reference))
    return runs


@pytest.mark.routed
def test_use_backend_rejects_what_it_does_not_know():
    for bad in ("gpu", "spherical=gpu", "quaternions=reference", "", "spherical=", ","):
        with pytest.raises(ValueError, match="use_backend: unknown"), pyops.use_backend(bad):
            pass
    for bad in (None, 1, b"cpu"):
        with pytest.raises(TypeError, match="use_backend: backend must be a str"), pyops.use_backend(bad):
            pass
    with (
        pytest.raises(ValueError, match=r"available: .*cuda \(not here: .*triton.*cpu.*reference"),
        pyops.use_backend("gpu"),
    ):
        pass


@pytest.mark.routed
def test_use_backend_raises_where_the_backend_cannot_serve():
    with pyops.use_backend("cuda"), pytest.raises(RuntimeError) as caught:
        pyops.z_loss(LOGITS, TARGET)
    text = str(caught.value)
    assert text.startswith("pyops::spherical_loss: backend cuda was asked for but cannot serve: ")
    assert _lib.cuda_unavailable() in text or "the tensors are on cpu" in text
    assert pyops.z_loss(LOGITS, TARGET) > 4, "the next call must be served as usual"


@pytest.mark.routed
def test_use_backend_nests_and_ends(reference_runs):
    """The innermost choice holds, for one family or all; an exception ends it too."""

    def backend() -> str:
        return pyops.explain("z_loss", LOGITS, TARGET).backend

    assert backend() == "cpu"
    with pyops.use_backend("reference"):
        assert backend() == "reference"
        with pyops.use_backend("spherical=cpu"):
            assert backend() == "cpu"
        with pyops.use_backend("cpu"):
            assert backend() == "cpu"
        assert backend() == "reference"
    with pyops.use_backend("spherical=reference"):
        assert backend() == "reference"
        with pyops.use_backend("cpu"):
            assert backend() == "cpu", "the innermost choice is for all families"
    with pytest.raises(KeyError), pyops.use_backend("reference"):
        raise KeyError
    assert backend() == "cpu"
    pyops.z_loss(LOGITS, TARGET)
    assert reference_runs == []


@pytest.mark.routed
def test_backward_runs_where_the_forward_ran(reference_runs):
    """Also when the block has ended; and a backward within a block whose forward was before it is in the block."""
    logits = LOGITS.clone().requires_grad_()
    with pyops.use_backend("reference"):
        loss = pyops.z_loss(logits, TARGET)
    loss.backward()
    assert reference_runs == ["spherical_loss", "spherical_loss_backward"]
    reference_runs.clear()
    with pyops.use_backend("reference"):
        inside = pyops.cross_entropy(logits, TARGET)
    with pyops.use_backend("cpu"):
        inside.backward()
    assert reference_runs == ["cross_entropy", "cross_entropy_backward"]


@pytest.mark.routed
def test_compiled_graphs_choose_at_run_time(reference_runs):
    torch.compiler.reset()
    compiled = torch.compile(lambda logits: pyops.z_loss(logits, TARGET) * 2, fullgraph=True, backend="aot_eager")
    compiled(LOGITS)
    assert reference_runs == []
    with pyops.use_backend("reference"):
        compiled(LOGITS)
    assert reference_runs == ["spherical_loss"]
    torch.compiler.reset()


@pytest.mark.row("R28")
@pytest.mark.routed
def test_use_backend_stays_in_its_thread_and_task(reference_runs):
    """Other threads do not see it, nor do tasks that were started before."""
    seen: dict[str, str] = {}

    def note(name: str) -> None:
        seen[name] = pyops.explain("z_loss", LOGITS, TARGET).backend
        pyops.z_loss(LOGITS, TARGET)

    with pyops.use_backend("reference"):
        other = threading.Thread(target=note, args=("other thread",))
        other.start()
        other.join()
        note("this thread")

    async def switching() -> None:
        with pyops.use_backend("reference"):
            await asyncio.sleep(0)
            note("switching task")
            await asyncio.sleep(0)

    async def plain() -> None:
        await asyncio.sleep(0)
        note("plain task")

    async def both() -> None:
        await asyncio.gather(switching(), plain())

    asyncio.run(both())
    assert seen == {
        "other thread": "cpu",
        "this thread": "reference",
        "switching task": "reference",
        "plain task": "cpu",
    }
    assert reference_runs == ["spherical_loss"] * 2


@pytest.mark.parametrize("function", functions(), ids=str)
def test_explain(function):
    """Every public function with every kind of argument: the backend, the level, and a reason for each other one."""
    for variant in function.variants:
        call = function.make(variant)
        for name in (function.name, function.function):
            explanation = pyops.explain(name, **call.tensors, **call.options)
            assert explanation.backend == "cpu"
            assert explanation.cpu_isa in ALL_LEVELS
            assert set(explanation.rejected) == {"cuda", "triton", "reference"}
            assert all(reasons for reasons in explanation.rejected.values())
    lines = str(explanation).splitlines()
    assert lines[0] == f"{explanation.op}: cpu ({explanation.cpu_isa})"
    assert len(lines) == 4


@on_every_host_backend
def test_explain_names_what_runs(backend):
    explanation = pyops.explain("cross_entropy", LOGITS, TARGET)
    expected = {"triton-interpreted": "triton", "reference": "reference", "cuda-emulated": "cuda"}.get(backend, "cpu")
    assert explanation.backend == expected
    if backend.startswith("cpu:"):
        assert explanation.cpu_isa == backend.removeprefix("cpu:")
    elif expected != "cpu":
        assert explanation.cpu_isa is None


def test_explain_runs_nothing_and_rejects_what_the_call_would():
    out_of_range = torch.tensor([1, 99])
    assert pyops.explain("z_loss", LOGITS, out_of_range).backend == "cpu"
    with pytest.raises(ValueError, match="explain: unknown op 'softmax'; known: bitlinear, "):
        pyops.explain("softmax", LOGITS)
    with pytest.raises(ValueError, match="a must be positive"):
        pyops.explain("z_loss", LOGITS, TARGET, a=-1.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        pyops.explain("z_loss", LOGITS, TARGET, lse_square_scale=1.0)


@pytest.mark.routed
def test_fallbacks_are_logged_once_and_are_errors_when_strict(monkeypatch, caplog):
    """What a CUDA tensor without a kernel of its own would meet."""
    op = _dispatch._ops["spherical_loss"]
    monkeypatch.setattr(_dispatch, "_reported", set())
    with caplog.at_level(logging.WARNING, "pyops"):
        for _ in range(3):
            _dispatch._report_fallback(op, ["cuda: no library", "triton: not installed"])
    assert [record.getMessage() for record in caplog.records] == [
        "pyops::spherical_loss runs the torch reference because cuda: no library | triton: not installed"
    ]
    monkeypatch.setitem(_dispatch._environment.values, "PYOPS_STRICT", "1")
    with pytest.raises(RuntimeError, match="PYOPS_STRICT=1 makes this an error"):
        _dispatch._report_fallback(op, ["cuda: no library"])


def test_force_isa_caps_and_lifts():
    detected = native().detected_isa()
    with running_on("cpu:baseline"):
        assert native().current_isa() == "baseline"
    assert native().current_isa() == detected
    with pytest.raises(ValueError, match="unknown ISA level 'avx3'"):
        native().force_isa("avx3")


# ---- binaries ----------------------------------------------------------------------------------------------


def lines_of(*command: object) -> list[str]:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout.splitlines()


def test_kernel_objects_are_there():
    levels = {path.parts[path.parts.index("CMakeFiles") + 1] for path in KERNEL_OBJECTS}
    assert {"kernels_baseline.dir", "kernels_avx2.dir", "kernels_avx512.dir"} <= levels


@pytest.mark.parametrize("path", KERNEL_OBJECTS, ids=lambda path: "/".join(path.parts[-5:]))
def test_no_weak_symbols_in_kernel_objects(path):
    """One could be the copy that the linker keeps for every level, and crash an older processor."""
    weak = [line for line in lines_of("nm", "-C", path) if re.search(r" [WVu] ", line)]
    assert weak == []


@pytest.mark.parametrize("path", KERNEL_OBJECTS, ids=lambda path: "/".join(path.parts[-5:]))
def test_kernel_objects_use_the_registers_of_their_level(path):
    text = "\n".join(lines_of("objdump", "-d", "--no-show-raw-insn", path))
    wide, middle = "%zmm" in text, "%ymm" in text
    expected = {"kernels_baseline.dir": (False, False)}
    expected |= dict.fromkeys(("kernels_avx2.dir", "kernels_avxvnni.dir"), (False, True))
    level = path.parts[path.parts.index("CMakeFiles") + 1]
    if level in expected:
        assert (wide, middle) == expected[level]
    else:
        assert wide


def test_operator_library_needs_no_cplusplus_of_torch_and_no_python():
    """The stable ABI: one build for every torch from 2.11 on and every Python."""
    undefined = [line.split()[-1] for line in lines_of("nm", "-D", "--undefined-only", PACKAGE / "_ops.so")]
    assert len(undefined) > 10
    torch_names = [name for name in undefined if re.match(r"_Z\w*?(3c10|2at|5torch)", name)]
    assert torch_names == []
    assert [name for name in undefined if name.startswith(("Py", "_Py"))] == []
    assert any(name.startswith("aoti_torch_") for name in undefined)
    needed = [line for line in lines_of("readelf", "-d", PACKAGE / "_ops.so") if "NEEDED" in line or "PATH" in line]
    assert not [line for line in needed if "python" in line or "PATH" in line], needed


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.name)
def test_no_build_path_in_the_binaries(path):
    content = path.read_bytes()
    for place in (str(ROOT), str(Path.home() / ""), "/tmp/"):
        assert place.encode() not in content, place


def test_package_list_is_complete():
    """A package that pyproject.toml forgets is missing from wheels only."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {"pyops." + ".".join(p.parent.relative_to(PACKAGE).parts) for p in PACKAGE.glob("*/**/__init__.py")}
    wing = ROOT / "triton_kernels"
    there |= {
        ".".join(("pyops.triton_kernels", *p.parent.relative_to(wing).parts)) for p in wing.glob("**/__init__.py")
    }
    assert there | {"pyops", "pyops._bench"} == set(listed)
    assert (PACKAGE / "py.typed").exists()


def test_mutants_are_up_to_date():
    """Every mutant still finds its place (mutation.py itself runs for over half an hour, by hand)."""
    mutants = [mutant for group in all_mutants().values() for mutant in group]
    assert len(mutants) >= 40
    for mutant in mutants:
        original = (ROOT / mutant.file).read_text()
        assert mutated(original, mutant) != original


def test_nobody_imports_the_other_triton_kernels():
    """An unrelated distribution owns that name: ours is pyops.triton_kernels."""
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not [name for name in names if name.partition(".")[0] == "triton_kernels"], path


# ---- overhead ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def best_seconds() -> dict[str, dict[str, float]]:
    """Per function, on tiny tensors: seconds of one call of the dispatcher, of the function without and with a
    gradient, and of a multiplication. Each is the best of many short interleaved rounds in a process of its own,
    which a busy machine disturbs least."""
    script = """
        import json, time, torch, contract
        torch.set_num_threads(1)
        tiny = torch.zeros(2)
        def measured(function):
            call = function.make(function.variants[0], **{name: 4 for name in function.sizes})
            name = function.differentiable[0]
            with contract.recorded_calls() as calls, torch.no_grad():
                call(function.function)
            operator, args, kwargs = calls[-1]  # what comes before it is remembered
            tensors = list(call.given().values())
            wants = [t.clone().requires_grad_() if n == name else t for n, t in call.given().items()]
            def dispatcher():
                with torch._C._AutoDispatchBelowAutograd():
                    operator(*args, **kwargs)
            timed = {
                "multiplication": lambda: tiny * tiny,
                "dispatcher": dispatcher,
                "without": lambda: function.function(*tensors, **call.options),
                "with": lambda: function.function(*wants, **call.options),
            }
            best = dict.fromkeys(timed, 1.0)
            for _ in range(150):
                for label, run in timed.items():
                    start = time.perf_counter()
                    for _ in range(30):
                        run()
                    best[label] = min(best[label], (time.perf_counter() - start) / 30)
            return best
        print(json.dumps({function.name: measured(function) for function in contract.functions()}))
    """
    return json.loads(in_fresh_process(script).splitlines()[-1])


@pytest.mark.parametrize("function", functions(), ids=str)
def test_python_costs_little_over_the_dispatcher(function, best_seconds):
    """At most 6 us without and 13 us with a gradient on the reference machine, where multiplying two tiny tensors
    takes 1.1 us: judged as multiples of that multiplication, timed in the same run."""
    best = best_seconds[function.name]
    microseconds = {label: 1.1 * seconds / best["multiplication"] for label, seconds in best.items()}
    assert microseconds["without"] - microseconds["dispatcher"] <= 6, microseconds
    assert microseconds["with"] - microseconds["dispatcher"] <= 13, microseconds


# ---- names and docstrings ----------------------------------------------------------------------------------


def test_public_names_resolve():
    assert pyops.__all__ == sorted(pyops.__all__)
    for name in pyops.__all__:
        assert getattr(pyops, name) is not None
    for name in pyops.nn.__all__:
        assert issubclass(getattr(pyops.nn, name), torch.nn.Module)
    with pytest.raises(AttributeError, match="module 'pyops' has no attribute 'no_such_name'"):
        pyops.no_such_name  # noqa: B018
    assert re.fullmatch(r"\d+\.\d+\.\d+", pyops.__version__)


@pytest.mark.parametrize("function", functions(), ids=str)
def test_options_are_keyword_only(function):
    for name, parameter in inspect.signature(function.function).parameters.items():
        positional = name in function.positional
        expected = inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY
        assert parameter.kind is expected, name


def public_objects() -> list[tuple[str, object]]:
    found = [(name, getattr(pyops, name)) for name in pyops.__all__]
    spaces = [(name, space) for name, space in found if inspect.ismodule(space)]
    inside = [(f"{name}.{inner}", getattr(space, inner)) for name, space in spaces for inner in space.__all__]
    return [(name, public) for name, public in found if not inspect.ismodule(public)] + inside


@pytest.mark.routed
@pytest.mark.parametrize(("name", "public"), public_objects(), ids=[name for name, _ in public_objects()])
def test_docstring_examples(name, public, count_cases):
    """Every public docstring has a first sentence; every function's an example; all examples run and are right."""
    assert public.__doc__
    assert public.__doc__.strip()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    tests = [t for t in doctest.DocTestFinder(recurse=False).find(public, name, globs={}) if t.examples]
    assert tests or inspect.isclass(public), "no example"
    report: list[str] = []
    for test in tests:
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
    count_cases(max(1, len(tests)))


@pytest.mark.parametrize("function", functions(), ids=str)
def test_docstrings_name_every_option(function):
    """In the docstring itself or in the one that it refers to."""
    text = inspect.getdoc(function.function)
    text += "".join(inspect.getdoc(getattr(pyops, name)) for name in re.findall(r":func:`pyops\.(\w+)`", text))
    for name in inspect.signature(function.function).parameters:
        assert re.search(rf"\b{name}\b", text), name


def test_z_loss_says_first_that_it_is_not_the_regulariser():
    first = " ".join(inspect.getdoc(pyops.z_loss).splitlines()[:2])
    assert "not* the log-sum-exp-squared regulariser" in first
    assert "not the log-sum-exp-squared regulariser" in inspect.getdoc(pyops.nn.ZLoss).splitlines()[0]


def test_every_module_imports():
    """No module of the package fails to import on its own (the Triton wing needs triton, which tests have)."""
    libraries = {f"pyops.{path.name.partition('.')[0]}" for path in PACKAGE.glob("*.so")}
    for module in pkgutil.walk_packages(pyops.__path__, "pyops."):
        if module.name not in libraries and not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def test_python_is_supported():
    assert sys.version_info >= (3, 10)
