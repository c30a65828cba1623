# `make demo` and `make test` do their own set-up: a virtual environment in .venv with the package installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Installing compiles them, so what changes here is installed anew.
NATIVE := native/CMakeLists.txt native/editable/CMakeLists.txt $(wildcard native/include/*.h native/src/*)
# Threads that wait by spinning take the cores from those that work, wherever something else runs beside them.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-all lint format clean help

help:
	@echo "make demo      set up, then train, evaluate, fold, save and picture a large-kernel network on real digits"
	@echo "make test      set up, then the fast tests"
	@echo "make test-all  every test that this machine can run, full-size models included"
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
	$(BIN)/python -m pytest

test-all: $(STAMP)
	$(BIN)/python -m pytest -m 'not gpu'

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
