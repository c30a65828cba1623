"""Interface between the training loop and a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from widekernel.data import Batch
from widekernel.engine.config import Metrics


class Objective(Protocol):
    """Loss to minimize and metrics to measure."""

    best_metric: str
    """Metric of `evaluate` that decides which training state is the best; larger is better."""

    def loss(self, model: nn.Module, batch: Batch, stream: tuple[int, ...]) -> Tensor:
        """Return the mean loss of a batch, which is on the model's device.

        Randomness (mixup) must be a function of `stream`, the position of the batch in training.
        """

    def evaluate(self, model: nn.Module, name: str, stop: Callable[[], bool]) -> Metrics | None:
        """Return the metrics on the held-out data, or `None` if `stop()` returned true.

        Args:
            model: network to evaluate.
            name: name of the weights in messages, such as "averaged weights".
            stop: called between batches.
        """
