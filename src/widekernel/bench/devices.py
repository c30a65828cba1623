"""CUDA devices from the command line, and a stopwatch that times calls by CUDA events."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from widekernel.bench.errors import DeviceLostError
from widekernel.bench.timing import Stopwatch
from widekernel.errors import ArgumentError, in_short

HEAD_START = 2.5e-4
"""Seconds for which the device is kept busy before a timed call, while the host launches the kernels of that call."""
_MIN_FLUSHED = 2**28  # bytes zeroed to flush the caches, at least
_ASSUMED_CACHE = 2**27  # bytes of L2 cache, where PyTorch cannot tell


@dataclass(frozen=True)
class Accelerator:
    """A device to measure on, and the stopwatch that times calls there."""

    device: torch.device
    stopwatch: Stopwatch

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this the current device inside the block; streams and events belong to the current device."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device):
            yield


class Event(Protocol):
    """A CUDA event with timing enabled."""

    def record(self) -> Any:
        """Record the time at which the device reaches this point in its queue."""

    def synchronize(self) -> Any:
        """Wait until the device has reached that point."""

    def elapsed_time(self, end: Any) -> float:
        """Return the milliseconds from this event to `end`."""


class EventStopwatch:
    """A stopwatch that times calls by events in the queue of a device, with cold caches.

    The caches are flushed before each call. The flush is not timed, and takes long enough for the host to launch the kernels
    of the call. So only the device's work is timed, unless the host takes even longer.

    Args:
        flush: queues work that takes `HEAD_START` and evicts the data of earlier calls from the caches.
        new_event: creates an `Event`.
        synchronize: waits for the device.
        release: returns cached memory to the device.
    """

    warms_up = True
    resets = True

    def __init__(
        self,
        flush: Callable[[], None],
        new_event: Callable[[], Event],
        synchronize: Callable[[], None],
        release: Callable[[], None],
    ) -> None:
        self._flush, self._synchronize, self._release = flush, synchronize, release
        self._start, self._end = new_event(), new_event()

    def time(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """Make a call; return its result and the seconds that the device spent on it."""
        self._flush()
        self._start.record()
        result = call()
        self._end.record()
        self._end.synchronize()
        return result, self._start.elapsed_time(self._end) / 1e3

    def recover(self) -> None:
        """Free memory after a call that failed.

        Raises:
            DeviceLostError: if the device reports an error on its own, as it does permanently after an illegal access.
        """
        try:
            self._synchronize()
        except Exception as error:
            raise DeviceLostError(
                f"the device accepts no more calls after one that failed ({in_short(error)}): run the missing cases in a "
                "new process"
            ) from error
        self._release()


def accelerator(text: str) -> Accelerator | None:
    """Return the device named on the command line; None for the CPU.

    Args:
        text: `cpu`, `cuda` or `cuda:N`.

    Raises:
        ArgumentError: if the text names no device, or that device does not exist.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise ArgumentError(f"device is {text!r}, but benchmarks run on cpu, cuda or cuda:N only: give one of these")
    if text == "cpu":
        return None
    if not torch.cuda.is_available():
        version = torch.version.cuda
        build = f"PyTorch {torch.__version__}, built {f'for CUDA {version}' if version else 'without CUDA'},"
        raise ArgumentError(
            f"device is {text!r}, but {build} finds no CUDA device: run where `nvidia-smi` lists one and with a build of "
            "PyTorch for CUDA, or give --device cpu"
        )
    device = torch.device("cuda", torch.device(text).index or 0)
    count = torch.cuda.device_count()
    if device.index >= count:
        raise ArgumentError(
            f"device is {text!r}, but there are {count} CUDA devices: give one from cuda:0 to cuda:{count - 1}"
        )
    return Accelerator(device, cuda_stopwatch(device))


def cuda_stopwatch(device: torch.device) -> EventStopwatch:
    """Create a stopwatch for a CUDA device. It occupies 256 MiB of device memory, or twice the size of the L2 cache."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or _ASSUMED_CACHE
    buffer = torch.empty(max(_MIN_FLUSHED, 2 * cache) // 4, device=device)

    def zero() -> None:
        buffer.zero_()

    def new_event() -> Event:
        return torch.cuda.Event(enable_timing=True)

    with torch.cuda.device(device):
        times = _repetitions(HEAD_START, zero, new_event)

    def flush() -> None:
        for _ in range(times):
            zero()
        # Read the buffer once more: the cache then holds clean lines, which the timed call does not have to write back.
        buffer.sum()

    def synchronize() -> None:
        torch.cuda.synchronize(device)

    return EventStopwatch(flush, new_event, synchronize, torch.cuda.empty_cache)


def _repetitions(seconds: float, work: Callable[[], None], new_event: Callable[[], Event]) -> int:
    """Return how often `work` must be queued to keep the device busy for `seconds` seconds."""
    start, end = new_event(), new_event()
    for _ in range(3):
        work()
    start.record()
    for _ in range(8):
        work()
    end.record()
    end.synchronize()
    each = start.elapsed_time(end) / 1e3 / 8
    return max(1, math.ceil(seconds / max(each, 1e-6)))
