# `make demo` and `make test` set up a virtual environment in .venv and install the package there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The installation compiles these files, so the package is installed again when one of them changes.
NATIVE := native/CMakeLists.txt native/exports.map native/editable/CMakeLists.txt $(wildcard native/include/*.h native/src/*)
# Threads that spin while they wait take cores from other processes.
export OMP_WAIT_POLICY ?= passive

# Most tests are short and use one core. Each process starts with whole files, because the tests of a file share expensive
# fixtures. A process that has finished takes tests from the others.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal --durations 20

.PHONY: demo test test-all test-clients test-neon test-avx512 fuzz-avx512 wheels test-gpu bench-gpu offline-bundle gpu-session gpu-rehearsal lint format clean help

# OFFLINE=1 is for machines without a network: nothing is set up, and packages that PYTHON lacks are taken from a folder of
# wheels, which `make offline-bundle` fills on another machine.
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
	@echo "make demo            train, evaluate, fold, save and plot a large-kernel network on real digits"
	@echo "make test            run the fast tests"
	@echo "make test-all        run every test that this machine can run, including those with full-size models"
	@echo "make test-clients    install the libraries that use widekernel (transformers, Lightning, ...), and run the tests with them"
	@echo "make test-neon       cross-compile the CPU kernels for 64-bit Arm, and test them in an emulator"
	@echo "make test-avx512     compile the CPU kernels of AVX-512, bfloat16 and int8 for AVX2, and test them on a processor without these"
	@echo "make wheels          cross-compile the CPU kernels, and build the wheels for Linux, macOS and Windows in dist/;"
	@echo "                     option: PLATFORMS=manylinux_2_28_x86_64"
	@echo "make test-gpu        run the tests of the compiled GPU kernels, on a GPU; also under compute-sanitizer if it is on PATH"
	@echo "make bench-gpu       time operators, networks and sparsity on a GPU, for at most half an hour; writes benchmarks/results"
	@echo "make offline-bundle  download the wheels that a machine without a network may lack, to $(BUNDLE)"
	@echo "make gpu-session OUT=FOLDER    test, time and tune within nine minutes on a GPU, without a network;"
	@echo "                               options: MINUTES=9 PYTHON=python3"
	@echo "make gpu-rehearsal OUT=FOLDER  rehearse a GPU session on a CPU"
	@echo "make lint            run ruff, codespell and mypy"
	@echo "make format          format the code with ruff"
	@echo "make clean           delete the virtual environment, caches and builds"
	@echo "With OFFLINE=1, test-gpu and bench-gpu set nothing up, and use PYTHON and the wheels in $(BUNDLE)."

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

# Needs Debian's packages, named after the tools. Nothing is installed.
NEON := build/neon
ARM := aarch64-linux-gnu
EMULATOR = $(firstword $(foreach name,qemu-aarch64 qemu-aarch64-static,$(shell command -v $(name))))
test-neon:
	@missing=; \
	command -v $(ARM)-g++ >/dev/null || missing="$$missing g++-$(ARM)"; \
	command -v cmake >/dev/null || missing="$$missing cmake"; \
	test -n "$(EMULATOR)" || missing="$$missing qemu-user"; \
	test -z "$$missing" || { echo "make test-neon needs these Debian packages: apt-get install$$missing"; exit 2; }
	cmake -S native -B $(NEON) -DWIDEKERNEL_FUZZ=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=$(ARM)-g++
	cmake --build $(NEON)
	$(EMULATOR) -L /usr/$(ARM) $(NEON)/fuzz $(NEON)/_native.so isa=neon problems=$(or $(PROBLEMS),1000)
	$(EMULATOR) -L /usr/$(ARM) $(NEON)/fuzz $(NEON)/_native.so isa=neon problems=100 seed=1000000 \
		openmp=/usr/$(ARM)/lib/libgomp.so.1

# Everything of these kernels but their instructions: tiles, remainders, packing, threads, rounding.
AVX512 := build/avx512
fuzz-avx512:
	@command -v cmake >/dev/null || { echo "make $@ needs these Debian packages: apt-get install cmake"; exit 2; }
	cmake -S native -B $(AVX512) -DWIDEKERNEL_FUZZ=ON -DWIDEKERNEL_EMULATE_AVX512=ON
	cmake --build $(AVX512) -j2
	$(AVX512)/fuzz $(AVX512)/_native.so isa=avx512 problems=$(or $(PROBLEMS),1000)

test-avx512: fuzz-avx512 $(STAMP)
	WIDEKERNEL_LIBRARY=$(CURDIR)/$(AVX512)/_native.so $(BIN)/python -m pytest $(PARALLEL) tests/ops/cpu tests/transforms

# The tools are separate from those of development: they are large, and only whoever publishes needs them.
WHEEL_TOOLS := build/wheel-tools
$(WHEEL_TOOLS)/.installed: native/wheels/requirements.txt
	$(PYTHON) -m venv $(WHEEL_TOOLS)
	$(WHEEL_TOOLS)/bin/python -m pip install --quiet -r $<
	@touch $@

wheels: $(WHEEL_TOOLS)/.installed
	$(WHEEL_TOOLS)/bin/python native/wheels/build.py dist $(PLATFORMS)

# Out-of-bounds accesses show only if every tensor is a separate allocation. Checking for races is slow: fewer tests run.
CHECKED := tests/ops/gpu/test_operator_values.py tests/ops/gpu/test_kernels.py -m interpreted
MEMCHECK = $(CHECKED) -k 'values_and_gradients or their_gradients or stored or any_strides or wider-than-a-block'
RACECHECK = $(CHECKED) -k 'test_values_and_gradients or test_branches_and_their_gradients'
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --report-api-errors no --tool

# Triton's compiler takes nearly all of the time, on one core, so several processes compile; tests that time calls run alone.
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

# Rows are written as they are measured, so tables are kept however a benchmark ends. If one fails, the next one still runs.
RESULTS := benchmarks/results
OVERHEAD := $(RESULTS)/sparsity_overhead_gpu.md
bench-gpu: $(READY)
	@$(UNPACK)
	failed=0; \
	$(WIDEKERNEL) bench ops --device cuda --cases layers dilated --minutes $(or $(MINUTES),10) --csv $(RESULTS)/bench_ops_gpu.csv \
		--markdown $(RESULTS)/bench_ops_gpu.md --plot docs/images/bench_ops_gpu.png || failed=1; \
	$(WIDEKERNEL) bench branches --device cuda --minutes $(or $(MINUTES),3) --csv $(RESULTS)/bench_branches_gpu.csv \
		--markdown $(RESULTS)/bench_branches_gpu.md || failed=1; \
	$(WIDEKERNEL) bench models --device cuda --compile --minutes $(or $(MINUTES),10) --csv $(RESULTS)/bench_models_gpu.csv \
		--markdown $(RESULTS)/bench_models_gpu.md || failed=1; \
	$(RUN) benchmarks/sparsity_overhead.py cuda > $(OVERHEAD).new && mv $(OVERHEAD).new $(OVERHEAD) || failed=1; \
	exit $$failed

# The session uses the packages that PYTHON finds and those in the bundle. Nothing is installed, and only OUT is written to.
gpu-session:
	@test -n "$(OUT)" || { echo "make gpu-session needs OUT=FOLDER, new or empty"; exit 2; }
	$(PYTHON) benchmarks/gpu_session --out "$(OUT)" --minutes $(or $(MINUTES),9) $(WHEELS)

# Runs in a separate network namespace if the system allows it, so that nothing can be downloaded by accident.
gpu-rehearsal:
	@test -n "$(OUT)" || { echo "make gpu-rehearsal needs OUT=FOLDER, new or empty"; exit 2; }
	$$(unshare -rn true 2>/dev/null && echo unshare -rn) \
		$(PYTHON) benchmarks/gpu_session --rehearse --out "$(OUT)" --minutes $(or $(MINUTES),6) $(WHEELS)

# FOR says what the other machine has; the default is FOR="--python 3.12 --given torch==2.11.0 torchvision==0.26.0 triton==3.6.0 numpy==2.5.*".
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
