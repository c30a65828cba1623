"""Fixtures of the tests of the GPU backend."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from widekernel.ops.gpu import machine, tuning_tables
from widekernel.ops.gpu.interpreter import is_interpreted

# There is no Triton for macOS.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture
def guard() -> Iterator[Any]:
    """Interpret kernels under bounds checks; on a GPU, compute-sanitizer does that in `make test-gpu`."""
    if not is_interpreted():
        pytest.skip("needs Triton's interpreter, which does not run here")
    from tests.ops.gpu.guard import guarded

    with guarded() as watching:
        yield watching


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide all tuning tables, so that every configuration is estimated."""
    monkeypatch.setenv(tuning_tables.VARIABLE, "0")
    monkeypatch.setattr(tuning_tables, "SHIPPED", Path("there is none"))


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make PyTorch find an H200."""
    from tests.ops.gpu.pretended_gpu import CHIPS, pretend

    machine._chip_of.cache_clear()
    pretend(monkeypatch, CHIPS["sm_90"])
    yield
    machine._chip_of.cache_clear()


@pytest.fixture
def no_tuned_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the tuning table of this machine."""
    monkeypatch.setenv(tuning_tables.VARIABLE, "0")
