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

.PHONY: demo test test-all test-clients test-gpu bench-gpu offline-bundle gpu-session gpu-rehearsal lint format clean help

# OFFLINE=1 is for machines without a network: nothing is set up, and what PYTHON lacks is taken from the folder of wheels that
# `make offline-bundle` has filled elsewhere.
BUNDLE ?= build/offline-bundle
UNPACKED := build/offline-site
WHEELS = $(if $(wildcard $(BUNDLE)),--wheels "$(BUNDLE)")
ifeq ($(OFFLINE),1)
READY :=
RUN := $(PYTHON)
export PYTHONPATH := $(CURDIR)/src:$(CURDIR)/$(UNPACKED)$(if $(PYTHONPATH),:$(PYTHONPATH))
UNPACK = test ! -d "$(BUNDLE)" || $(PYTHON) -m benchmarks.gpu_session.wheels "$(BUNDLE)" $(UNPACKED)
else
READY := $(STAMP)
RUN := $(BIN)/python
UNPACK = :
endif
WIDEKERNEL := $(RUN) -c 'import sys; from widekernel.cli.main import main; sys.exit(main())'

help:
	@echo "make demo      set up, then train, evaluate, fold, save and picture a large-kernel network on real digits"
	@echo "make test      set up, then the fast tests"
	@echo "make test-all  every test that this machine can run, full-size models included"
	@echo "make test-clients  set up with the libraries that widekernel is used from, then the tests with them"
	@echo "make test-gpu  the tests of the GPU kernels, compiled, on a machine with a GPU; under compute-sanitizer if it is there"
	@echo "make bench-gpu speed of operators, networks and sparsity on a GPU, into benchmarks/results; at most half an hour"
	@echo "make offline-bundle  the wheels that a machine without a network may lack, into $(BUNDLE)"
	@echo "make gpu-session OUT=FOLDER  nine minutes of a GPU made the most of, without a network; MINUTES=9 PYTHON=python3"
	@echo "make gpu-rehearsal OUT=FOLDER  the same on a GPU that is pretended"
	@echo "               OFFLINE=1 with test-gpu or bench-gpu: set nothing up, use PYTHON and $(BUNDLE)"
	@echo "make lint      ruff, codespell and mypy"

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

$(VENV)/.clients: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev,clients]'
	@touch $@

test-clients: $(VENV)/.clients
	$(BIN)/python -m pytest -m 'clients and not full' tests

# Out-of-bounds accesses show only where every tensor is an allocation of its own. Races, slow to look for, in fewer tests.
CHECKED := tests/ops/gpu/test_operator_values.py tests/ops/gpu/test_kernels.py -m interpreted
MEMCHECK = $(CHECKED) -k 'values_and_gradients or their_gradients or stored or any_strides or wider-than-a-block'
RACECHECK = $(CHECKED) -k 'test_values_and_gradients or test_branches_and_their_gradients'
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --report-api-errors no --tool

# Nearly all of their time is Triton's compiler on one core, so several compile at a time; what times calls runs alone.
GPU_PARALLEL := -n auto --maxprocesses 8 --dist worksteal

test-gpu: $(READY)
	@$(UNPACK)
	@$(RUN) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make test-gpu needs an NVIDIA GPU, and PyTorch finds none")'
	failed=0; $(RUN) -m pytest $(GPU_PARALLEL) -m 'interpreted and not gpu' tests || failed=1; \
	$(RUN) -m pytest -m gpu tests || failed=1; exit $$failed
ifneq ($(shell command -v compute-sanitizer 2>/dev/null),)
	$(SANITIZE) memcheck $(RUN) -m pytest -p no:cacheprovider $(MEMCHECK)
	$(SANITIZE) racecheck $(RUN) -m pytest -p no:cacheprovider $(RACECHECK)
else
	@echo "compute-sanitizer is not on PATH, so memory accesses and races were NOT checked: it comes with the CUDA toolkit (bin/)"
endif

# Tables that are begun stay, however it ends: rows are written as they come. What goes wrong in one leaves the next its turn.
RESULTS := benchmarks/results
OVERHEAD := $(RESULTS)/sparsity_overhead_gpu.md
bench-gpu: $(READY)
	@$(UNPACK)
	failed=0; \
	$(WIDEKERNEL) bench ops --device cuda --minutes $(or $(MINUTES),10) --csv $(RESULTS)/bench_ops_gpu.csv \
		--markdown $(RESULTS)/bench_ops_gpu.md --plot docs/images/bench_ops_gpu.png || failed=1; \
	$(WIDEKERNEL) bench models --device cuda --compile --minutes $(or $(MINUTES),10) --csv $(RESULTS)/bench_models_gpu.csv \
		--markdown $(RESULTS)/bench_models_gpu.md || failed=1; \
	$(RUN) benchmarks/sparsity_overhead.py cuda > $(OVERHEAD).new && mv $(OVERHEAD).new $(OVERHEAD) || failed=1; \
	exit $$failed

# What `python3` finds there is what the GPU works with; nothing is installed, and nothing written but OUT.
gpu-session:
	@test -n "$(OUT)" || { echo "make gpu-session needs OUT=FOLDER, new or empty"; exit 2; }
	$(PYTHON) benchmarks/gpu_session --out "$(OUT)" --minutes $(or $(MINUTES),9) $(WHEELS)

# In a network namespace of its own, if that is allowed here: then nothing can be fetched by accident.
gpu-rehearsal:
	@test -n "$(OUT)" || { echo "make gpu-rehearsal needs OUT=FOLDER, new or empty"; exit 2; }
	$$(unshare -rn true 2>/dev/null && echo unshare -rn) \
		$(PYTHON) benchmarks/gpu_session --rehearse --out "$(OUT)" --minutes $(or $(MINUTES),6) $(WHEELS)

# For which Python: FOR="--python 3.12 --given torch==2.11.0 torchvision==0.26.0 triton==3.6.0 numpy==2.5.*", which is the default.
offline-bundle: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_session.bundle $(BUNDLE) $(FOR)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell $$(git ls-files)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist src/widekernel/ops/cpu/_native.*
	find native/editable -mindepth 1 ! -name CMakeLists.txt -delete
