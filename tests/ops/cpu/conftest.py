"""Fixtures of the tests of native calls: numbers of threads and instruction sets, restored afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from widekernel.ops.cpu import library


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=library.load().isas)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    loaded = library.load()
    before = loaded.isa
    loaded.use_isa(request.param)
    yield request.param
    loaded.use_isa(before)
