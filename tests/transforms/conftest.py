"""Fixtures of the tests of transformations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.transforms.acceleration import replace_measurement
from widekernel.transforms.acceleration import timing


@pytest.fixture(autouse=True)
def _no_memory() -> Iterator[None]:
    timing.forget()
    yield
    timing.forget()


@pytest.fixture
def always_faster(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return replace_measurement(monkeypatch)
