"""Exports spend little time on latencies, which no test looks at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _short_timing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("widekernel.export.exporting.LATENCY_SECONDS", 0.02)
        yield
