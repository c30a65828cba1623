"""The seam between the engine and a task: the engine knows no classes, images or accuracies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from widekernel.data import Batch
from widekernel.engine.error_context import INPUT_SIZE
from widekernel.engine.metrics import Metric
from widekernel.engine.processes import Processes
from widekernel.engine.unreadable import SAMPLES


@dataclass(frozen=True)
class Position:
    """Position of a batch in the training, of which all of its randomness is a function.

    The position does not depend on how the global batch is divided among processes and forward passes.

    Args:
        seed: seed of the run
        step: optimizer steps done before this one
        first: place of the first sample of the batch in the global batch of the step
    """

    seed: int
    step: int
    first: int = 0


class Evaluator(ABC):
    """One evaluation, on one or several processes."""

    @abstractmethod
    def update(self, model: nn.Module, batch: Batch) -> None:
        """Run the network on a batch, which is on its device, and add the batch to the result."""

    @abstractmethod
    def reduce(self, processes: Processes) -> None:
        """Combine what all processes have seen; called once, after the last batch.

        A process may have had no batch, so tensors to be summed must not be on the device of the last one: use the host.
        """

    @abstractmethod
    def result(self) -> dict[str, float]:
        """Return a value for each of the task's metrics, by name."""


class Task(ABC):
    """What is trained: a loss, and what is measured on held-out data."""

    metrics: tuple[Metric, ...]
    """What an evaluation yields; the first decides which training state is the best."""

    nouns: tuple[str, str] = SAMPLES
    """What messages call one sample, and several."""

    sizes: tuple[str, str] = (INPUT_SIZE, INPUT_SIZE)
    """Settings of the size of the images in training and in evaluation, for messages."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, position: Position) -> dict[str, Tensor]:
        """Return named losses, means over the batch, whose sum is minimized.

        Args:
            model: the network in training mode, under autocast if configured.
            batch: the batch, on the network's device.
            position: all randomness, such as that of mixup, must be a function of it; dropout is seeded by the engine.
        """

    def example(self, batch: Batch) -> Any:
        """Return the input that the network gets for a batch, by which `loop.accelerate` measures layers.

        The network and its hooks run on a copy of it once more, in evaluation mode and without gradients, and in process 0
        alone: a forward pass in evaluation mode must not need the other processes.

        Args:
            batch: a batch of training, on the network's device.

        Returns:
            a tensor, a tuple of arguments or a dict of keyword arguments; `None` if this task cannot be accelerated.
        """
        return None

    @abstractmethod
    def evaluator(self) -> Evaluator:
        """Return an evaluator for one pass over the held-out data."""
