"""Fixtures of the tests of the GPU backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ops.gpu.guard import Guard, guarded
from widekernel.ops.gpu.images import is_interpreted


@pytest.fixture
def guard() -> Iterator[Guard]:
    """Interpret kernels with their accesses to memory watched; on a GPU compute-sanitizer does that in `make test-gpu`."""
    if not is_interpreted():
        pytest.skip("watches Triton's interpreter, which does not run here")
    with guarded() as watching:
        yield watching
