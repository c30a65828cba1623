"""Fixtures of the tests of operators."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget what was compiled, before the test and after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
