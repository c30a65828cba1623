"""Interface through which training and evaluation report progress; the library itself prints nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import override

from widekernel.engine.metrics import Metric


@dataclass(frozen=True)
class RunLength:
    """Length of a run.

    Args:
        steps: optimizer steps of the whole run
        steps_per_epoch: optimizer steps in one pass over the training data
    """

    steps: int
    steps_per_epoch: int

    def epoch_of(self, step: int) -> int:
        """Return the number, counted from 1, of the epoch that contains optimizer step `step`, counted from 1."""
        return max(0, step - 1) // self.steps_per_epoch + 1

    @property
    def epochs(self) -> int:
        """Number of epochs, of which the last may be incomplete."""
        return self.epoch_of(self.steps)


class Reporter(Protocol):
    """Receiver of progress and messages. An implementation owns the console, the log file or the widget."""

    def message(self, text: str) -> None:
        """Show a message, for example that a run is resumed or that an image is unreadable."""

    def start_training(self, length: RunLength, first_step: int) -> None:
        """Report that training begins after `first_step` optimizer steps."""

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Report that `step` optimizer steps are done.

        Args:
            step: steps since the start of the run, including those before a resume.
            figures: the row of metrics.jsonl if one was written after this step, or else {}.
        """

    def start_evaluation(self, batches: int, name: str) -> None:
        """Report that an evaluation of `batches` batches begins; `name` says which weights are evaluated."""

    def evaluated(self, batches: int) -> None:
        """Report that `batches` more batches have been evaluated."""

    def evaluation(self, step: int, metrics: tuple[Metric, ...], values: Mapping[str, float], is_best: bool = False) -> None:
        """Report the results of an evaluation after `step` steps.

        Args:
            step: optimizer steps done.
            metrics: what was measured.
            values: the results by the metrics' names; those of the averaged weights, if there are any, by `ema_` and name.
            is_best: whether the first metric (of the averaged weights, if there are any) is the best of the run so far.
        """


class SilentReporter(Reporter):
    """A reporter that shows nothing."""

    @override
    def message(self, text: str) -> None: ...

    @override
    def start_training(self, length: RunLength, first_step: int) -> None: ...

    @override
    def step(self, step: int, figures: Mapping[str, float]) -> None: ...

    @override
    def start_evaluation(self, batches: int, name: str) -> None: ...

    @override
    def evaluated(self, batches: int) -> None: ...

    @override
    def evaluation(
        self, step: int, metrics: tuple[Metric, ...], values: Mapping[str, float], is_best: bool = False
    ) -> None: ...
