"""Errors of the benchmarks."""

from __future__ import annotations

from widekernel.errors import WidekernelError


class BenchmarkError(WidekernelError, RuntimeError):
    """An implementation computes wrong results or cannot run, so that no time is reported."""


class DeviceLostError(WidekernelError, RuntimeError):
    """The device reports an error for every further call."""
