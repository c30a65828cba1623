"""Rates of a run: how long a step waits for data and how long it computes, without making the host wait for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from typing_extensions import Self

TIMING_KEYS = frozenset({"data_seconds", "step_seconds", "images_per_second"})
"""Keys of a row of metrics.jsonl that depend on the machine: all others are the same in a resumed run."""


class DeviceEvent(Protocol):
    """Mark in the queue of a device; `torch.cuda.Event` is one."""

    def record(self) -> None:
        """Put the mark at the end of the queue."""

    def query(self) -> bool:
        """Return whether the device has reached the mark."""

    def synchronize(self) -> None:
        """Wait until the device has reached the mark."""

    def elapsed_time(self, other: Self, /) -> float:
        """Return the milliseconds from this mark to the `other` one, both of which the device has reached."""


class Rates:
    """Clock of a training loop, which tells waiting for data from computing.

    On a CPU, the data time is the time that the loop waits for the loader. On a CUDA device, which computes while the loop
    waits, it is the time that the device has nothing to do because the next batch is not there yet. Marks in the device's
    queue measure this; they are read later, so nothing waits for them. All other time between two rows belongs to the
    steps. Therefore, the loop calls `figures` right after reading the loss, when the device has finished these steps.

    Args:
        device: device of the network
        clock: clock in seconds
        new_event: creates a mark in the queue of the device; by default, a `torch.cuda.Event` on a CUDA device, and no marks
            on others
    """

    def __init__(
        self,
        device: torch.device | None = None,
        clock: Callable[[], float] = time.perf_counter,
        new_event: Callable[[], DeviceEvent] | None = None,
    ) -> None:
        if new_event is None and device is not None and device.type == "cuda":
            new_event = _cuda_event
        self._clock, self._new_event = clock, new_event
        self._gaps: list[tuple[DeviceEvent, DeviceEvent]] = []
        self._paused: float | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything measured, and start now."""
        self._start = self._clock()
        self._excluded = self._waited = 0.0
        self._steps = self._samples = 0
        self._gaps.clear()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Count the time in the block, which takes the next batch or batches from the loader, as data time."""
        if self._new_event is None:
            start = self._clock()
            yield
            self._waited += self._clock() - start
        else:
            # The device goes from one mark to the other while it has nothing to do.
            before, after = self._new_event(), self._new_event()
            before.record()
            yield
            after.record()
            self._gaps.append((before, after))

    def stepped(self, samples: int) -> None:
        """Count an optimizer step of `samples` samples, those of all processes."""
        self._steps += 1
        self._samples += samples

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave out the time in the block, which evaluates or saves.

        On a CUDA device, this first waits for the steps in the queue, whose time counts. In the block, `figures` returns
        those up to its start.
        """
        if self._paused is not None:  # the outer block counts
            yield
            return
        if self._new_event is not None:
            last = self._new_event()
            last.record()
            last.synchronize()
        self._paused = start = self._clock()
        try:
            yield
        finally:
            self._paused = None
            self._excluded += self._clock() - start

    def figures(self) -> dict[str, float]:
        """Return the means since the last call, and start anew; without a step since, return {} and go on.

        Returns:
            `data_seconds` and `step_seconds` (seconds per optimizer step: waiting for data, and everything else) and
            `images_per_second` (samples of all processes, over both).
        """
        if not self._steps:
            return {}
        now = self._clock() if self._paused is None else self._paused
        total = max(now - self._start - self._excluded, 1e-9)
        # The end of one call is the start of the next one, so no time is lost between them.
        data = min(self._waited + self._idle(), total)
        steps, samples = self._steps, self._samples
        self._start, self._excluded, self._waited, self._steps, self._samples = now, 0.0, 0.0, 0, 0
        return {
            "data_seconds": data / steps,
            "step_seconds": (total - data) / steps,
            "images_per_second": samples / total,
        }

    def _idle(self) -> float:
        """Return the seconds for which the device lacked data, up to the marks that it has reached."""
        reached = [gap for gap in self._gaps if gap[1].query()]
        self._gaps = self._gaps[len(reached) :]  # marks are reached in order
        return sum(before.elapsed_time(after) for before, after in reached) / 1e3


def _cuda_event() -> DeviceEvent:
    return torch.cuda.Event(enable_timing=True)
