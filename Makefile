# `make demo` and `make test` do their own set-up: a virtual environment in .venv with the package installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Installing compiles them, so what changes here is installed anew.
NATIVE := native/CMakeLists.txt native/editable/CMakeLists.txt $(wildcard native/include/*.h native/src/*)
# Threads that wait by spinning take the cores from those that work, wherever something else runs beside them.
export OMP_WAIT_POLICY ?= passive

# Most tests are short and use one core. Each process starts with whole files, because tests of a file share what takes long to
# make, and takes from the others when it has nothing left.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal --durations 20

.PHONY: demo test test-all test-gpu bench-gpu lint format clean help

help:
	@echo "make demo      set up, then train, evaluate, fold, save and picture a large-kernel network on real digits"
	@echo "make test      set up, then the fast tests"
	@echo "make test-all  every test that this machine can run, full-size models included"
	@echo "make test-gpu  the tests of the GPU kernels, compiled, on a machine with a GPU; under compute-sanitizer if it is there"
	@echo "make bench-gpu speed of operators, networks and sparsity on a GPU, into benchmarks/results; at most half an hour"
	@echo "make lint      ruff and mypy"

$(STAMP): pyproject.toml $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit("widekernel needs Python 3.10 or newer, %s is %d.%d: run make PYTHON=python3.11" % (sys.executable, *sys.version_info[:2]) if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/widekernel demo

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(STAMP)
	$(BIN)/python -m pytest -m 'not gpu'

# Out-of-bounds accesses show only where every tensor is an allocation of its own. Races, slow to look for, in fewer tests.
CHECKED := tests/ops/gpu/test_operator.py tests/ops/gpu/test_kernels.py -m interpreted
MEMCHECK = $(CHECKED) -k 'values_and_gradients or their_gradients or stored or any_strides or wider-than-a-block'
RACECHECK = $(CHECKED) -k 'test_values_and_gradients or test_branches_and_their_gradients'
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --report-api-errors no --tool

# Nearly all of their time is Triton's compiler on one core, so several compile at a time; what times calls runs alone.
GPU_PARALLEL := -n auto --maxprocesses 8 --dist worksteal

test-gpu: $(STAMP)
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make test-gpu needs an NVIDIA GPU, and PyTorch finds none")'
	failed=0; $(BIN)/python -m pytest $(GPU_PARALLEL) -m 'interpreted and not gpu' tests || failed=1; \
	$(BIN)/python -m pytest -m gpu tests || failed=1; exit $$failed
ifneq ($(shell command -v compute-sanitizer 2>/dev/null),)
	$(SANITIZE) memcheck $(BIN)/python -m pytest -p no:cacheprovider $(MEMCHECK)
	$(SANITIZE) racecheck $(BIN)/python -m pytest -p no:cacheprovider $(RACECHECK)
else
	@echo "compute-sanitizer is not on PATH, so memory accesses and races were NOT checked: it comes with the CUDA toolkit (bin/)"
endif

# Tables that are begun stay, however it ends: rows are written as they come. What goes wrong in one leaves the next its turn.
RESULTS := benchmarks/results
MINUTES ?= 10
OVERHEAD := $(RESULTS)/sparsity_overhead_gpu.md
bench-gpu: $(STAMP)
	failed=0; \
	$(BIN)/widekernel bench ops --device cuda --minutes $(MINUTES) --csv $(RESULTS)/bench_ops_gpu.csv \
		--markdown $(RESULTS)/bench_ops_gpu.md --plot docs/images/bench_ops_gpu.png || failed=1; \
	$(BIN)/widekernel bench models --device cuda --compile --minutes $(MINUTES) --csv $(RESULTS)/bench_models_gpu.csv \
		--markdown $(RESULTS)/bench_models_gpu.md || failed=1; \
	$(BIN)/python benchmarks/sparsity_overhead.py cuda > $(OVERHEAD).new && mv $(OVERHEAD).new $(OVERHEAD) || failed=1; \
	exit $$failed

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist src/widekernel/ops/cpu/_native.*
	find native/editable -mindepth 1 ! -name CMakeLists.txt -delete
