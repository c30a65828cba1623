"""The error of a benchmark that would report something wrong."""

from __future__ import annotations

from widekernel.errors import WidekernelError


class BenchmarkError(WidekernelError, RuntimeError):
    """What was to be timed computes the wrong numbers, so that no time is reported."""
