"""Interface through which training and evaluation report progress; the library itself prints nothing."""

from typing import Protocol

from typing_extensions import override

from widekernel.engine.config import Metrics


class Reporter(Protocol):
    """Receiver of progress and messages. An implementation owns the console, the log file or the widget."""

    def message(self, text: str) -> None:
        """Show a message, for example that a run is resumed or that an image is unreadable."""

    def start_training(self, epochs: int, steps_per_epoch: int, first_step: int) -> None:
        """Report that training begins after `first_step` optimizer steps."""

    def step(self, epoch: int, step: int, loss: float, lr: float) -> None:
        """Report that an optimizer step is done; `step` counts from the start of training."""

    def start_evaluation(self, batches: int, name: str) -> None:
        """Report that an evaluation of `batches` batches begins; `name` says which weights are evaluated."""

    def evaluated(self, batches: int) -> None:
        """Report that `batches` more batches have been evaluated."""

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        """Report that an epoch and its evaluation are done."""


class SilentReporter(Reporter):
    """A reporter that shows nothing."""

    @override
    def message(self, text: str) -> None: ...

    @override
    def start_training(self, epochs: int, steps_per_epoch: int, first_step: int) -> None: ...

    @override
    def step(self, epoch: int, step: int, loss: float, lr: float) -> None: ...

    @override
    def start_evaluation(self, batches: int, name: str) -> None: ...

    @override
    def evaluated(self, batches: int) -> None: ...

    @override
    def epoch(self, epoch: int, metrics: Metrics) -> None: ...
