# Every target works on a fresh clone: it sets up .venv first. See README.md.
PYTHON ?= python3
RUN := .venv/bin/python
TRITON_OLD := 3.6.0
# Test processes, one per core; their OpenMP threads must not spin while another's work (9 minutes, not 16, on two cores).
PYTEST := OMP_WAIT_POLICY=passive $(RUN) -m pytest -q -n $(shell nproc)

.PHONY: setup demo test lint unit emulate triton-offline triton-offline-old cuda-ledger wheel-test sanitize bench bench-quick mutation nightly test-oldest clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt setup.py CMakeLists.txt $(shell git ls-files csrc 2>/dev/null)
	test -x $(RUN) || $(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) .venv
	$(RUN) -c 'import torch' 2>/dev/null || $(RUN) -m pip install -q -c constraints.txt torch triton
	$(RUN) -m pip install -q numpy pybind11 'setuptools>=77' wheel ninja cmake
	PYOPS_EMULATION=ON $(RUN) -m pip install -q --no-build-isolation -e '.[dev]'
	touch $@

demo: setup
	$(RUN) -m pyops demo

# Fail early: seconds first, minutes last.
test: lint cuda-ledger unit emulate wheel-test bench-quick sanitize triton-offline triton-offline-old

lint: setup
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && .venv/bin/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.cu')

unit: setup
	$(PYTEST) tests

# The CUDA kernels on the CPU: all cases, then all cases under the race checker.
emulate: setup
	PYOPS_CUDA_EMU=1 $(PYTEST) tests/contract.py tests/spherical tests/ternary -k cuda-emulated
	PYOPS_CUDA_EMU=check $(PYTEST) tests/contract.py tests/spherical tests/ternary -k cuda-emulated

triton-offline: setup
	$(RUN) tests/triton_offline.py

triton-offline-old: setup
	test -d .triton-$(TRITON_OLD) || $(RUN) -m pip install -q --no-deps --target .triton-$(TRITON_OLD) triton==$(TRITON_OLD)
	PYTHONPATH=.triton-$(TRITON_OLD) $(RUN) tests/triton_offline.py

cuda-ledger: setup
	$(RUN) tests/cuda_ledger.py

wheel-test: setup
	$(RUN) tests/wheel_check.py

sanitize: setup
	$(RUN) tests/sanitizer_check.py

bench: setup
	$(RUN) -m pytest bench/test_benchmarks.py
	$(RUN) -m pyops._bench.report

bench-quick: setup
	PYOPS_BENCH=quick $(RUN) -m pytest -q bench/test_benchmarks.py

mutation: setup
	$(RUN) tests/mutation.py

# By hand: the same binaries in the oldest supported torch (a download of several GB).
test-oldest: setup
	$(RUN) tests/oldest_torch_check.py

# By hand, hours: run when a family closes; summarise the log in bench/results/.
nightly: setup
	PYOPS_FUZZ_CASES=50000 $(RUN) -m pytest tests -m 'slow or not slow'
	$(MAKE) triton-offline-old sanitize mutation test-oldest

clean:
	rm -rf build dist .venv .triton-* pyops/*.so
