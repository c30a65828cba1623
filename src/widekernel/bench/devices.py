"""Where a benchmark runs: the CPU, or a CUDA device with a stopwatch of its own."""

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
"""Seconds that the device is kept busy before a timed call, while the host launches the kernels of that call."""
_FLUSHED, _OTHERWISE = 2**28, 2**27  # bytes zeroed, at least; L2 cache assumed where PyTorch cannot say


@dataclass(frozen=True)
class Accelerator:
    """A device to measure on, and what times calls there."""

    device: torch.device
    stopwatch: Stopwatch

    @contextmanager
    def current(self) -> Iterator[None]:
        """Let it be the device that streams and events belong to inside the block."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device):
            yield


class Event(Protocol):
    """A CUDA event that can be timed."""

    def record(self) -> Any:
        """Note the time at which the device gets to this place in its queue."""

    def synchronize(self) -> Any:
        """Wait until the device has got there."""

    def elapsed_time(self, end: Any) -> float:
        """Give the milliseconds from here to `end`."""


class EventStopwatch:
    """Times calls by events in the queue of a device, with cold caches.

    Before each call the caches are flushed, which is not timed and takes long enough for the host to launch what the call
    consists of: what is timed is the device's work, unless the host takes longer still.

    Args:
        flush: queues work that leaves nothing of any call in the caches, and lasts for `HEAD_START`.
        new_event: makes an `Event`.
        synchronize: waits for the device.
        release: frees what is cached for further allocations.
    """

    warms_up = True

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
        """Make a call and give what it returns, and the seconds that the device was at it."""
        self._flush()
        self._start.record()
        result = call()
        self._end.record()
        self._end.synchronize()
        return result, self._start.elapsed_time(self._end) / 1e3

    def recover(self) -> None:
        """Free memory after a call that failed.

        Raises:
            DeviceLostError: if the device reports an error by itself, as it does for ever after an illegal access.
        """
        try:
            self._synchronize()
        except Exception as error:
            raise DeviceLostError(
                f"the device takes no more calls after one that failed ({in_short(error)}): run what is missing in a new "
                "process"
            ) from error
        self._release()


def accelerator(text: str) -> Accelerator | None:
    """Give the device that a command names, None for the CPU.

    Args:
        text: `cpu`, `cuda` or `cuda:N`.

    Raises:
        ArgumentError: if it is something else, or there is no such device.
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
    """Make a stopwatch for a CUDA device; takes 256 MiB of its memory, or twice its L2 cache."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or _OTHERWISE
    buffer = torch.empty(max(_FLUSHED, 2 * cache) // 4, device=device)

    def once() -> None:
        buffer.zero_()

    def new_event() -> Event:
        return torch.cuda.Event(enable_timing=True)

    with torch.cuda.device(device):
        times = _times_for(HEAD_START, once, new_event)

    def flush() -> None:
        for _ in range(times):
            once()
        # Read once more: what is left in the cache is then clean, and the timed call need not write it back.
        buffer.sum()

    def synchronize() -> None:
        torch.cuda.synchronize(device)

    return EventStopwatch(flush, new_event, synchronize, torch.cuda.empty_cache)


def _times_for(seconds: float, work: Callable[[], None], new_event: Callable[[], Event]) -> int:
    """Say how often `work` has to be queued to keep the device busy for so long."""
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
