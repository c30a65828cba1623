"""What the loop tells whoever watches; the library itself prints nothing."""

from typing import Protocol

from typing_extensions import override

from widekernel.training.config import Metrics


class Reporter(Protocol):
    """Receives progress. Implementations own the console, the log file or the widget."""

    def message(self, text: str) -> None:
        """Something worth telling once: a resume, a skipped checkpoint, an unreadable image."""

    def start_training(self, epochs: int, steps_per_epoch: int, first_step: int) -> None:
        """Training begins at optimizer step `first_step`."""

    def step(self, epoch: int, step: int, loss: float, lr: float) -> None:
        """One optimizer step is done; `step` counts from the start of training."""

    def start_evaluation(self, batches: int, name: str) -> None:
        """An evaluation of so many batches begins."""

    def evaluated(self, batches: int) -> None:
        """So many batches of the evaluation are done."""

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        """An epoch and its evaluation are done."""


class SilentReporter(Reporter):
    """Tells nobody."""

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
