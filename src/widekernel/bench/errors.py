"""Errors of the benchmarks."""

from __future__ import annotations

from widekernel.errors import WidekernelError


class BenchmarkError(WidekernelError, RuntimeError):
    """Something to be timed computes wrong results, so that no time is reported."""


class DeviceLostError(WidekernelError, RuntimeError):
    """The device answers every further call with an error."""
