"""Timing of several calls in turn, so that other work on the machine affects all of them equally.

Each call is first made once, for its output and for an estimate of its time. The estimate determines how many timed calls
follow. These are spread evenly over rounds, whose order changes: over as many rounds as there are calls, or twice as many if
their number is odd, every call has every place equally often, and follows every other call equally often. Fewer rounds, and
rounds without the slower calls, are balanced only in part. A slow call is timed once more, or three times if it is nearly as
fast as the fastest; a very slow one is not repeated, and its first call is the measurement.

What a call leaves behind in caches would distort the time of a short call that follows. So on the host, short calls are
timed in bursts, and each burst begins with an untimed call. `memory.keeping_memory` deals with what a call leaves behind in
the allocator. The threads of a call wait for the next one for some milliseconds before they sleep, and would compete with
calls that have threads of their own, so between programs with different threads a pause is made. A processor that has slept
is slow for some milliseconds, so after a pause the untimed calls go on for that long.

A `Stopwatch` times a single call: by the clock of the host (`WallClock`) or by the events of a device
(`devices.EventStopwatch`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from widekernel.errors import in_short

PATIENCE = 1.0, 10.0
"""Seconds beyond which a call counts as slow, and as very slow."""
NEAR, NEAR_CALLS = 2.0, 3
"""A slow call that takes at most `NEAR` times as long as the fastest, or is the fastest, is timed `NEAR_CALLS` times."""
QUICK = 0.1
"""Seconds below which the first call is a poor estimate, so that a second call is made before planning."""
FEWEST, MOST = 5, 300
"""Smallest and largest number of timed calls, unless a call is slow."""
SHORT = 0.02
"""Seconds below which a call is short: it is timed in bursts."""
SETTLING = 0.02
"""Seconds in which threads without work go to sleep: GNU's OpenMP runtime lets them wait for some milliseconds."""
WAKING = 0.005
"""Seconds of untimed calls after a pause."""
BURST, ROUNDS = 4, 8
"""Largest number of timed calls in a burst, and the number of rounds before bursts get longer."""

Clock = Callable[[], float]


class Stopwatch(Protocol):
    """The interface for timing a single call."""

    @property
    def warms_up(self) -> bool:
        """Whether the first call compiles or selects algorithms, so that it must not be timed."""

    @property
    def resets(self) -> bool:
        """Whether the stopwatch brings caches into the same state before each call, so that bursts are not needed."""

    def time(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """Make a call; return its result and its time in seconds."""

    def recover(self) -> None:
        """Clean up after a call that failed.

        Raises:
            DeviceLostError: if no further call can succeed.
        """


class WallClock:
    """A stopwatch that reads a clock of the host.

    Args:
        clock: returns the time in seconds.
    """

    warms_up = False
    resets = False

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock

    def time(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """Make a call; return its result and its time in seconds."""
        start = self._clock()
        result = call()
        return result, self._clock() - start

    def recover(self) -> None:
        """Do nothing: on the host, a failed call leaves nothing behind."""


_WALL = WallClock()


@dataclass(frozen=True)
class Timing:
    """The times of one call.

    Attributes:
        seconds: one entry for each timed call; empty if the call failed.
    """

    seconds: tuple[float, ...]

    @property
    def calls(self) -> int:
        """Number of timed calls."""
        return len(self.seconds)

    @property
    def median(self) -> float:
        """Median time in seconds; NaN if nothing was timed."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def spread(self) -> float:
        """Half the interquartile range, relative to the median; 0 for fewer than two calls."""
        if self.calls < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (upper - lower) / 2 / self.median if self.median else 0.0


NO_TIMES = Timing(())
"""The timing of a call that failed."""


def first_calls(
    calls: Mapping[str, Callable[[], Any]], stopwatch: Stopwatch = _WALL, failures: dict[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, float]]:
    """Make each call once and return its result and its time in seconds, both by name.

    If the stopwatch needs a warm-up call, the first call is not timed and a second one is.

    Args:
        calls: the calls by name.
        stopwatch: times them.
        failures: receives the message of each call that fails, which is then missing from both results. Without it, the
            first failure is raised.
    """
    outputs, seconds = {}, {}
    for name, call in calls.items():
        try:
            if stopwatch.warms_up:
                outputs[name] = call()
                seconds[name] = stopwatch.time(call)[1]
            else:
                outputs[name], seconds[name] = stopwatch.time(call)
            continue
        except Exception as error:
            if failures is None:
                raise
            failures[name] = in_short(error)
        # Outside the handler: the error keeps the tensors of its traceback's frames alive.
        outputs.pop(name, None)
        stopwatch.recover()
    return outputs, seconds


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    first: Mapping[str, float],
    budget: float,
    rounds: int | None = None,
    patience: tuple[float, float] = PATIENCE,
    stopwatch: Stopwatch = _WALL,
    pause: float = 0.0,
) -> dict[str, Timing]:
    """Time several calls in turn.

    Args:
        calls: the calls by name.
        first: time of each first call, in seconds.
        budget: seconds to spend on each call.
        rounds: number of timed calls, instead of as many as fit in the budget; slow calls get fewer.
        patience: seconds beyond which a call counts as slow, and as very slow.
        stopwatch: times them.
        pause: seconds to wait before each turn; `SETTLING` between programs with different threads.
    """
    wanted, bursts = {}, {}
    fastest = min((first[name] for name in calls), default=0.0)
    for name, call in calls.items():
        estimate = first[name]
        if estimate < QUICK and rounds is None:
            estimate = min(estimate, _seconds(call, stopwatch))
        wanted[name] = planned_calls(estimate, budget, rounds, patience)
        if wanted[name] == 1 and estimate <= NEAR * fastest:
            wanted[name] = min(NEAR_CALLS, rounds or NEAR_CALLS)
        is_short = estimate < SHORT and not stopwatch.resets
        bursts[name] = max(1, min(BURST, wanted[name] // ROUNDS)) if is_short else 0
    times: dict[str, list[float]] = {name: [] if count else [first[name]] for name, count in wanted.items()}
    turns = {name: math.ceil(count / max(1, bursts[name])) for name, count in wanted.items()}
    orders, total = balanced_orders(list(calls)), max(turns.values(), default=0)
    for turn in range(total):
        for name in orders[turn % len(orders)]:
            # True in exactly `turns[name]` of the turns, evenly spread.
            if (turn + 1) * turns[name] // total <= turn * turns[name] // total:
                continue
            if pause:
                time.sleep(pause)
            if bursts[name]:
                _warm_up(calls[name], stopwatch, WAKING if pause else 0.0)
            for _ in range(min(max(1, bursts[name]), wanted[name] - len(times[name]))):
                times[name].append(_seconds(calls[name], stopwatch))
    return {name: Timing(tuple(seconds)) for name, seconds in times.items()}


def balanced_orders(names: Sequence[str]) -> list[list[str]]:
    """Return orders in which, taken together, every name has every place and follows every other name equally often.

    These are the rows of a Latin square that is balanced for carry-over effects (Williams, 1949); for an odd number of
    names, those of two squares.
    """
    count = len(names)
    if not count:
        return []
    # 0, 1, n-1, 2, n-2, …: every difference between neighbors, modulo n, occurs once if n is even, and twice in the
    # sequence and its reverse if n is odd.
    start = [(place + 1) // 2 if place % 2 else (count - place // 2) % count for place in range(count)]
    rows = [[(first + shift) % count for first in start] for shift in range(count)]
    if count % 2:
        rows += [row[::-1] for row in rows]
    return [[names[number] for number in row] for row in rows]


def planned_calls(
    estimate: float, budget: float, rounds: int | None = None, patience: tuple[float, float] = PATIENCE
) -> int:
    """Return how many timed calls follow the first one, whose time in seconds is `estimate`."""
    slow, very_slow = patience
    if estimate > slow:
        return int(estimate <= very_slow)
    if rounds is not None:
        return rounds
    return max(FEWEST, min(MOST, int(budget / max(estimate, 1e-9))))


def _warm_up(call: Callable[[], Any], stopwatch: Stopwatch, seconds: float) -> None:
    """Make untimed calls for a time, and at least one."""
    left = seconds
    while True:
        left -= max(_seconds(call, stopwatch), 1e-6)
        if left <= 0.0:
            return


def _seconds(call: Callable[[], Any], stopwatch: Stopwatch) -> float:
    def run() -> None:
        call()  # the result is freed at once, within the timed interval, because some calls have more to free than others

    return stopwatch.time(run)[1]
