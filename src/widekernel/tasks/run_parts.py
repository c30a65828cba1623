"""What a task brings to a complete run: its data, its network and the task itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from widekernel.data import (
    BatchPlan,
    EvaluationLoader,
    EvaluationSamples,
    LoaderOptions,
    TrainingLoader,
    TrainingSamples,
)
from widekernel.engine.processes import Processes
from widekernel.engine.task import Task
from widekernel.tasks.saved import SavedModel

IMAGES = ("image", "images")
"""What messages call one sample, and several."""

Sources = tuple[Any, Any]
"""Training and held-out items; the latter may be `None`."""


@dataclass(frozen=True)
class RunSamples:
    """Transformed items of a run.

    Args:
        train: training items
        held_out: held-out items; `None` if nothing is evaluated
    """

    train: TrainingSamples
    held_out: EvaluationSamples | None


class RunTask(Task):
    """A task of a complete run, which may bring more than losses: files that it learns from, and parts of the network."""

    nouns = IMAGES

    @property
    def digests(self) -> dict[str, str]:
        """Digests of what the task learns from besides the data; a resumed run must have the same."""
        return {}

    def prepare(self, network: nn.Module, seed: int) -> None:
        """Add to the network what only its training needs, if anything.

        Args:
            network: the network to train, before an optimizer or average of it exists.
            seed: seed of the run.
        """

    def finish(self, network: nn.Module) -> None:
        """Remove from the trained network, or its average, what `prepare` added."""

    def to(self, device: torch.device, memory_format: torch.memory_format) -> None:
        """Move what the task computes with to the device and memory layout of the network."""


class RunParts(ABC):
    """What one task brings to a complete run.

    `run.train` calls the methods in every process, in the order in which they stand here. It calls those that may read
    files or fill caches in process 0 first.

    Args:
        config: settings of the run
        processes: the processes that train together
        notify: receives messages for the user
    """

    def __init__(self, config: Any, processes: Processes, notify: Callable[[str], None]) -> None:
        self.config, self.processes, self.notify = config, processes, notify

    # -- before the data are opened, which may take minutes ------------------------------------------------------------

    @abstractmethod
    def check(self, plan: BatchPlan, device: torch.device, starts: bool) -> None:
        """Check what can be checked without the data.

        Args:
            plan: division of a batch among processes and forward passes.
            device: device of the network.
            starts: whether the run starts now; if it is resumed, it does not read the files that it started from.

        Raises:
            ConfigError: a setting does not fit the network, the optimizer, the device or this machine.
        """

    # -- data and network ----------------------------------------------------------------------------------------------

    @abstractmethod
    def open_data(self) -> Sources:
        """Open the training and the held-out items.

        Raises:
            WidekernelError: the data cannot be used.
        """

    @abstractmethod
    def notes(self, sources: Sources, starts: bool) -> list[str]:
        """Return lines for the user on the data and on what the run starts from; empty ones are left out."""

    @abstractmethod
    def build(self, sources: Sources, starts: bool) -> nn.Module:
        """Build the network with its initial weights, which a run that has begun takes from its training state instead."""

    @abstractmethod
    def describe(self, sources: Sources, network: nn.Module) -> SavedModel:
        """Return the description of the network for model files and training states."""

    @abstractmethod
    def samples(self, sources: Sources, network: nn.Module, saved: SavedModel) -> RunSamples:
        """Return the items, transformed for the network."""

    @abstractmethod
    def create_task(self, sources: Sources, network: nn.Module, saved: SavedModel) -> RunTask:
        """Create the task."""

    @abstractmethod
    def fingerprint(self, sources: Sources) -> dict[str, Any]:
        """Return what identifies the data; a resumed run must have the same."""

    # -- batches -------------------------------------------------------------------------------------------------------

    def training_loader(self, samples: TrainingSamples, options: LoaderOptions, plan: BatchPlan) -> TrainingLoader:
        """Return the loader of this process's training batches."""
        return TrainingLoader(samples, options, plan, self.processes.rank)

    def evaluation_loader(self, samples: EvaluationSamples, options: LoaderOptions, plan: BatchPlan) -> EvaluationLoader:
        """Return the loader of this process's held-out batches."""
        size = self.config.loop.eval_batch_size or max(1, plan.per_pass * 3 // 2)
        return EvaluationLoader(samples, size, options, self.processes.shard)

    # -- afterwards ----------------------------------------------------------------------------------------------------

    def closing_notes(self, sources: Sources, unreadable: Collection[str]) -> list[str]:
        """Return lines for the user at the end of the run.

        Args:
            sources: the data.
            unreadable: names of the training items that could not be read.
        """
        return []


Kind = Callable[[Any, Processes, Callable[[str], None]], RunParts]
"""Class of the parts of a task's runs."""
