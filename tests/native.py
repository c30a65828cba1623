"""What tests of native calls share: marks of those that need the library, and settings that are restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from widekernel.ops.cpu import library

needs_native = pytest.mark.skipif(library.load().reason is not None, reason=str(library.load().reason))
NATIVE = pytest.param("native", marks=needs_native, id="native")
"""The name of the native backend, as a parameter of tests."""


@contextmanager
def thread_count(number: int) -> Iterator[None]:
    """Let PyTorch use a number of threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Let the native library use an instruction set inside the block."""
    loaded = library.load()
    before = loaded.isa
    loaded.use_isa(name)
    try:
        yield
    finally:
        loaded.use_isa(before)
