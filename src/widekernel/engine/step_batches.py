"""The batches of optimizer steps, from a loader that works by epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from widekernel.data.batches import Batch
from widekernel.data.loading import EvaluationLoader, TrainingLoader
from widekernel.engine.task import Position


@dataclass(frozen=True)
class RunData:
    """Data of a run, as this process loads them.

    Args:
        train: training batches by epoch
        held_out: batches of the evaluation; `None` if nothing is evaluated
    """

    train: TrainingLoader
    held_out: EvaluationLoader | None


class StepBatches:
    """The micro-batches of this process for any optimizer step.

    Steps are usually taken in order; the loader starts anew only at an epoch or where that order is broken.

    Args:
        loader: loader of the training batches
        seed: seed of the run
        rank: number of this process
    """

    def __init__(self, loader: TrainingLoader, seed: int, rank: int) -> None:
        self._loader, self._seed, self._rank = loader, seed, rank
        self._next = -1
        self._iterator: Iterator[Batch] = iter(())

    def take(self, step: int) -> list[Batch]:
        """Return the micro-batches of the step after `step` others."""
        epoch, number = divmod(step, self._loader.steps_per_epoch)
        if step != self._next or number == 0:
            self._iterator = self._loader.epoch(epoch, number)
        batches = [next(self._iterator) for _ in range(self._loader.plan.accumulate)]
        self._next = step + 1
        return batches

    def positions(self, step: int) -> list[Position]:
        """Return the positions of these micro-batches."""
        plan = self._loader.plan
        return [Position(self._seed, step, plan.first(self._rank, number)) for number in range(plan.accumulate)]
