"""Timing rivals in turns, so that whatever else the machine does meets all of them alike.

Every rival is called once before, for its output; that call also tells how many further ones it can have. These are spread
evenly over rounds, and the order within a round alternates. A slow rival gets one more, a very slow one none: its first call
is then the measurement.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PATIENCE = 1.0, 10.0
"""Seconds of one call beyond which a rival is slow, and very slow."""
QUICK = 0.1
"""Below this many seconds a first call says little about the next ones, and a second one is made before planning."""
FEWEST, MOST = 5, 300
"""Calls of a rival that is not slow."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """The times of one rival.

    Attributes:
        seconds: of every call that counts.
    """

    seconds: tuple[float, ...]

    @property
    def calls(self) -> int:
        """How many calls count."""
        return len(self.seconds)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median; 0 for a single call."""
        if self.calls < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (upper - lower) / 2 / self.median if self.median else 0.0


def first_calls(
    rivals: Mapping[str, Callable[[], Any]], clock: Clock = time.perf_counter
) -> tuple[dict[str, Any], dict[str, float]]:
    """Call every rival once and give what each returned, and the seconds that it took."""
    outputs, seconds = {}, {}
    for name, call in rivals.items():
        start = clock()
        outputs[name] = call()
        seconds[name] = clock() - start
    return outputs, seconds


def interleave(
    rivals: Mapping[str, Callable[[], Any]],
    first: Mapping[str, float],
    budget: float,
    rounds: int | None = None,
    patience: tuple[float, float] = PATIENCE,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time rivals in turns.

    Args:
        rivals: what to call.
        first: seconds of the first call of each.
        budget: seconds for each of them.
        rounds: calls of each that is not slow, instead of as many as the budget allows.
        patience: seconds of one call beyond which a rival is slow, and very slow.
        clock: what gives the time.
    """
    wanted = {}
    for name, call in rivals.items():
        estimate = first[name]
        if estimate < QUICK and rounds is None:
            estimate = min(estimate, _seconds(call, clock))
        wanted[name] = planned_calls(estimate, budget, rounds, patience)
    times: dict[str, list[float]] = {name: [] if calls else [first[name]] for name, calls in wanted.items()}
    total = max(wanted.values(), default=0)
    for turn in range(total):
        order = list(rivals) if turn % 2 == 0 else list(rivals)[::-1]
        for name in order:
            # True in as many turns as the rival has calls, evenly spread.
            if (turn + 1) * wanted[name] // total > turn * wanted[name] // total:
                times[name].append(_seconds(rivals[name], clock))
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


def _seconds(call: Callable[[], Any], clock: Clock) -> float:
    start = clock()
    call()
    return clock() - start
