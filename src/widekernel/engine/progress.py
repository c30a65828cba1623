"""Progress of a run, as stored in its training states."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Progress of a run, all of which is part of a training state.

    Args:
        epoch: epochs done, including their evaluation
        step: optimizer steps done
        step_in_epoch: optimizer steps done in the current epoch
        loss_sum: sum of the losses since the last row in the metrics
        loss_count: optimizer steps in that sum
        best: best value of the objective's metric
        best_step: optimizer steps done when it was reached
        unreadable: names of the unreadable training images met so far
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    best: float | None = None
    best_step: int | None = None
    unreadable: set[str] = field(default_factory=set)

    def state(self) -> dict[str, Any]:
        """Return the progress as plain containers, for a training state."""
        return {**vars(self), "unreadable": sorted(self.unreadable)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """Rebuild the progress from the containers that `state` returned."""
        return cls(**{**state, "unreadable": set(state["unreadable"])})

    def note_value(self, value: float) -> bool:
        """Record the value of the objective's metric after the last step, and return whether it is the best so far."""
        is_best = is_better(value, self.best)
        if is_best:
            self.best, self.best_step = value, self.step
        return is_best

    def take_mean_loss(self) -> float:
        """Return the mean loss since the last row in the metrics, and start a new mean."""
        mean = self.loss_sum / self.loss_count
        self.loss_sum, self.loss_count = 0.0, 0
        return mean


def is_better(value: float, best: float | None) -> bool:
    """Return whether a metric is better than the best so far; NaN never is, and any number is better than NaN."""
    return not math.isnan(value) and (best is None or math.isnan(best) or value > best)
