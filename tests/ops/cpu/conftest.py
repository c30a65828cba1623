"""Fixtures of the tests of native calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.native import instruction_set, thread_count
from widekernel.ops.cpu import library


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of PyTorch's threads; it is restored afterwards."""
    with thread_count(torch.get_num_threads()):
        yield torch.set_num_threads


@pytest.fixture(params=library.load().isas)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Let the native library use one instruction set after the other."""
    with instruction_set(request.param):
        yield request.param
