"""Progress of a run, as stored in its training states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Progress of a run, all of which is part of a training state.

    Args:
        step: optimizer steps done, including those that were skipped because something was not finite
        evaluated: step after which the network was last evaluated
        best: best value of the task's first metric
        best_step: optimizer steps done when it was reached
        skipped: steps skipped because something was not finite, as far as the user knows of them
        skipped_in_a_row: the last of them, if no good step came afterwards
        rollbacks: returns to an earlier training state so far
        left_out: ranges of steps, as pairs of the steps done before and after, whose batches are left out after a rollback
        unreadable: names of the unreadable training samples met so far
    """

    step: int = 0
    evaluated: int = 0
    best: float | None = None
    best_step: int | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    left_out: list[list[int]] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)

    def state(self) -> dict[str, Any]:
        """Return the progress as plain containers, for a training state."""
        return {**vars(self), "left_out": [list(pair) for pair in self.left_out], "unreadable": sorted(self.unreadable)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """Rebuild the progress from the containers that `state` returned."""
        return cls(**{**state, "unreadable": set(state["unreadable"])})

    def end_of_left_out(self) -> int | None:
        """Return the step at which training goes on, if the batches of the next step are left out."""
        return next((end for start, end in self.left_out if start <= self.step < end), None)
