"""Fixtures of the tests of the GPU backend."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

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
