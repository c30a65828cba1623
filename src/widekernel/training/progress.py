"""What the loop tells whoever watches; the library itself prints nothing."""

from typing import Protocol

from widekernel.training.config import Metrics


class Reporter(Protocol):
    """Receives progress. Implementations own the console, the log file or the widget."""

    def message(self, text: str) -> None:
        """Something worth telling once: a resume, a skipped checkpoint, an unreadable image."""

    def start_training(self, epochs: int, steps_per_epoch: int, first_step: int) -> None:
        """Training begins at optimizer step ``first_step``."""

    def step(self, epoch: int, step: int, loss: float, lr: float) -> None:
        """One optimizer step is done; ``step`` counts from the start of training."""

    def start_evaluation(self, batches: int, name: str) -> None:
        """An evaluation of so many batches begins."""

    def evaluated(self, batches: int) -> None:
        """So many batches of the evaluation are done."""

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        """An epoch and its evaluation are done."""


class SilentReporter:
    """Tells nobody."""

    def message(self, text: str) -> None: ...

    def start_training(self, epochs: int, steps_per_epoch: int, first_step: int) -> None: ...

    def step(self, epoch: int, step: int, loss: float, lr: float) -> None: ...

    def start_evaluation(self, batches: int, name: str) -> None: ...

    def evaluated(self, batches: int) -> None: ...

    def epoch(self, epoch: int, metrics: Metrics) -> None: ...
