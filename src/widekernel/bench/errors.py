"""The errors of benchmarks."""

from __future__ import annotations

from widekernel.errors import WidekernelError


class BenchmarkError(WidekernelError, RuntimeError):
    """What was to be timed computes the wrong numbers, so that no time is reported."""


class DeviceLostError(WidekernelError, RuntimeError):
    """A device that answers every further call with an error."""
