"""How a run on a device goes: the time that is left, what it was not enough for, and what computed wrongly."""

from __future__ import annotations

import time
from collections.abc import Callable

from widekernel.bench.errors import BenchmarkError


class Course:
    """Keeps a budget of time and takes notes.

    Args:
        minutes: for the whole run, counted from now.
        clock: gives the time in seconds.

    Attributes:
        wrong: a line about everything that has no times because it was refused.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.minutes = minutes
        self.wrong: list[str] = []
        self._clock, self._until = clock, clock() + 60 * minutes
        self._left_out: dict[str, dict[str, list[str]]] = {}
        self._lost = ""

    def has_time(self) -> bool:
        """Whether anything further may be started; it is then finished, however long it takes."""
        return not self._lost and self._clock() < self._until

    def leave_out(self, group: str, what: str, part: str) -> None:
        """Note that `part` of `what` is not measured."""
        self._left_out.setdefault(group, {}).setdefault(what, []).append(part)

    def lose_device(self, why: str) -> None:
        """Note that nothing further can be measured."""
        self._lost = why

    def lines(self) -> list[str]:
        """Say what was left out and why, a line a group, and what computed wrongly."""
        why = self._lost or f"the {self.minutes:g} minutes were over; --minutes gives more"
        lines = []
        for group, parts in self._left_out.items():
            listed = ", ".join(f"{what} ({', '.join(names)})" for what, names in parts.items())
            lines.append(f"Left out in {group}: {listed}, because {why}.")
        if self._lost and not lines:
            lines.append(f"At the end {self._lost}.")
        return [*lines, *(f"No times: {line}" for line in self.wrong)]

    def finish(self) -> None:
        """End the run.

        Raises:
            BenchmarkError: if anything was refused.
        """
        if self.wrong:
            raise BenchmarkError(
                f"{len(self.wrong)} of what was to be timed has no times, because it computes wrongly or cannot run; "
                f"the first: {self.wrong[0]}. The remarks in the table tell the others. Run the tests of widekernel.ops, or "
                "ask for another backend."
            )
