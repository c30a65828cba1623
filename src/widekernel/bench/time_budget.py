"""The time budget of a run, with notes on what was left out and what computed wrong results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from widekernel.bench.errors import BenchmarkError


class TimeBudget:
    """The time that a run may take, and a record of failures.

    Args:
        minutes: minutes for the whole run, counted from now; by default unlimited.
        clock: returns the time in seconds.

    Attributes:
        wrong: a line for every case that was rejected and therefore has no times.
        remarks: a line for everything else that was left out and does not make the run fail.
    """

    def __init__(self, minutes: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self.minutes = minutes
        self.wrong: list[str] = []
        self.remarks: list[str] = []
        self._clock, self._deadline = clock, clock() + 60 * minutes
        self._left_out: dict[str, dict[str, list[str]]] = {}
        self._device_error = ""

    def has_time(self) -> bool:
        """Return whether something new may be started. Started work is finished, however long it takes."""
        return not self._device_error and self._clock() < self._deadline

    def seconds_left(self) -> float:
        """Return the time that is left, in seconds; infinity if it is unlimited."""
        return max(0.0, self._deadline - self._clock())

    def leave_out(self, group: str, what: str, part: str) -> None:
        """Record that `part` of `what` is not measured."""
        self._left_out.setdefault(group, {}).setdefault(what, []).append(part)

    def lose_device(self, why: str) -> None:
        """Record that nothing further can be measured."""
        self._device_error = why

    def lines(self) -> list[str]:
        """Return the notes: what was left out and why, one line for each group, and what computed wrong results."""
        why = self._device_error or f"the {self.minutes:g} minutes were over; --minutes gives more"
        lines = []
        for group, parts in self._left_out.items():
            listed = ", ".join(f"{what} ({', '.join(names)})" for what, names in parts.items())
            lines.append(f"Left out in {group}: {listed}, because {why}.")
        if self._device_error and not lines:
            lines.append(f"At the end {self._device_error}.")
        return [*lines, *self.remarks, *(f"No times: {line}" for line in self.wrong)]

    def finish(self) -> None:
        """End the run.

        Raises:
            BenchmarkError: if anything was rejected.
        """
        if self.wrong:
            raise BenchmarkError(
                f"no times for {len(self.wrong)} of the benchmarks, because of wrong results or failures; the first: "
                f"{self.wrong[0]}. The remarks in the table list the others. Run the tests of widekernel.ops, or choose "
                "another backend."
            )
