"""Timing rivals in turns, so that whatever else the machine does meets all of them alike.

Every rival is called once before, for its output; that call also tells how many further ones it can have. These are spread
evenly over rounds, and the order within a round alternates. A slow rival gets one more, a very slow one none: its first call
is then the measurement.

What times a single call is a stopwatch: by the clock of the host (`WallClock`), or by the events of a device
(`devices.EventStopwatch`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from widekernel.errors import in_short

PATIENCE = 1.0, 10.0
"""Seconds of one call beyond which a rival is slow, and very slow."""
QUICK = 0.1
"""Below this many seconds a first call says little about the next ones, and a second one is made before planning."""
FEWEST, MOST = 5, 300
"""Calls of a rival that is not slow."""

Clock = Callable[[], float]


class Stopwatch(Protocol):
    """What times a call."""

    @property
    def warms_up(self) -> bool:
        """Whether a rival's first call compiles and chooses algorithms for the next ones, so that it must not be timed."""

    def time(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """Make a call and give what it returns, and the seconds that it took."""

    def recover(self) -> None:
        """Tidy up after a call that failed.

        Raises:
            DeviceLostError: if no further call can work.
        """


class WallClock:
    """Times calls by a clock of the host.

    Args:
        clock: gives the time in seconds.
    """

    warms_up = False

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock

    def time(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """Make a call and give what it returns, and the seconds that it took."""
        start = self._clock()
        result = call()
        return result, self._clock() - start

    def recover(self) -> None:
        """Do nothing: a failed call leaves nothing behind."""


_WALL = WallClock()


@dataclass(frozen=True)
class Timing:
    """The times of one rival.

    Attributes:
        seconds: of every call that counts; none if the rival failed.
    """

    seconds: tuple[float, ...]

    @property
    def calls(self) -> int:
        """How many calls count."""
        return len(self.seconds)

    @property
    def median(self) -> float:
        """Seconds; NaN without any call."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median; 0 for a single call."""
        if self.calls < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (upper - lower) / 2 / self.median if self.median else 0.0


def first_calls(
    rivals: Mapping[str, Callable[[], Any]], stopwatch: Stopwatch = _WALL, failures: dict[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, float]]:
    """Call every rival once and give what each returned, and the seconds that it took.

    Where the first call must not be timed there is a second one.

    Args:
        rivals: what to call.
        stopwatch: what times them.
        failures: takes the message of each rival that fails, which is then missing in what is returned; by default the
            first failure is raised.
    """
    outputs, seconds = {}, {}
    for name, call in rivals.items():
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
        # Outside of the handler: while the error lives, so do the tensors of the frames that it came through.
        outputs.pop(name, None)
        stopwatch.recover()
    return outputs, seconds


def interleave(
    rivals: Mapping[str, Callable[[], Any]],
    first: Mapping[str, float],
    budget: float,
    rounds: int | None = None,
    patience: tuple[float, float] = PATIENCE,
    stopwatch: Stopwatch = _WALL,
) -> dict[str, Timing]:
    """Time rivals in turns.

    Args:
        rivals: what to call.
        first: seconds of the first call of each.
        budget: seconds for each of them.
        rounds: calls of each that is not slow, instead of as many as the budget allows.
        patience: seconds of one call beyond which a rival is slow, and very slow.
        stopwatch: what times them.
    """
    wanted = {}
    for name, call in rivals.items():
        estimate = first[name]
        if estimate < QUICK and rounds is None:
            estimate = min(estimate, _seconds(call, stopwatch))
        wanted[name] = planned_calls(estimate, budget, rounds, patience)
    times: dict[str, list[float]] = {name: [] if calls else [first[name]] for name, calls in wanted.items()}
    total = max(wanted.values(), default=0)
    for turn in range(total):
        order = list(rivals) if turn % 2 == 0 else list(rivals)[::-1]
        for name in order:
            # True in as many turns as the rival has calls, evenly spread.
            if (turn + 1) * wanted[name] // total > turn * wanted[name] // total:
                times[name].append(_seconds(rivals[name], stopwatch))
    return {name: Timing(tuple(seconds)) for name, seconds in times.items()}


def planned_calls(
    estimate: float, budget: float, rounds: int | None = None, patience: tuple[float, float] = PATIENCE
) -> int:
    """Say how many calls a rival gets after its first one, given the seconds of one call."""
    slow, very_slow = patience
    if estimate > slow:
        return int(estimate <= very_slow)
    if rounds is not None:
        return rounds
    return max(FEWEST, min(MOST, int(budget / max(estimate, 1e-9))))


def _seconds(call: Callable[[], Any], stopwatch: Stopwatch) -> float:
    def run() -> None:
        call()  # what it returns is freed at once, within the time: some rivals have more of it to free than others

    return stopwatch.time(run)[1]
