"""Tracing: a record of the operator calls that ran, and of the backend of each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from widekernel.ops.problem import Problem


@dataclass
class Trace:
    """The calls that ran inside a `trace()` block, in order."""

    calls: list[tuple[str, Problem]] = field(default_factory=list)

    def backends(self, op: str | None = None) -> list[str]:
        """Return the name of the backend of every recorded call, or of the calls of one operator."""
        return [backend for backend, problem in self.calls if op in (None, problem.op)]


OPEN_TRACES: list[Trace] = []
"""The open traces. Callers of `record` check this list first, because it is nearly always empty."""
_LOCK = threading.Lock()


@contextmanager
def trace() -> Iterator[Trace]:
    """Record every operator call made inside the block, on any thread, with the backend that computed it."""
    recorded = Trace()
    with _LOCK:
        OPEN_TRACES.append(recorded)
    try:
        yield recorded
    finally:
        with _LOCK:
            OPEN_TRACES[:] = [open_trace for open_trace in OPEN_TRACES if open_trace is not recorded]


def record(backend: str, problem: Problem) -> None:
    """Add a call to every open trace."""
    with _LOCK:
        for open_trace in OPEN_TRACES:
            open_trace.calls.append((backend, problem))
