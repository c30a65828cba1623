"""Processes that train together, as the training loop sees them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from widekernel.data.loading import Shard
from widekernel.deprecation import renamed_attribute
from widekernel.errors import ConfigError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """A single training process, and the interface of several (`distributed.DistributedProcesses`).

    The training loop uses this object to choose who writes files, and to exchange values. All processes must call the
    same methods in the same order, except `note`.

    Args:
        rank: number of this process, from 0
        world_size: number of processes
        device: device of this process; `None` for a single one, which may use any
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """The part of the data that this process loads."""
        return Shard(self.rank, self.world_size)

    share = renamed_attribute("share", "shard")

    # -- values ------------------------------------------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes, in a new tensor of the same type on the same device."""
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` over all processes. The host does not wait for the device."""
        return values

    def largest(self, values: Tensor) -> Tensor:
        """Return the largest of each of the `values` over all processes, in a new tensor of the same type and device."""
        return values

    def all_finite(self, flags: Tensor) -> Tensor:
        """Return whether `flags`, which are boolean, are true in all processes. The host does not wait for the device."""
        return flags

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true in at least one process."""
        return flag

    def vote(self, flag: bool) -> Callable[[], bool]:
        """Ask whether `flag` is true in at least one process; the function that is returned awaits the answer.

        The question may travel with the next `all_finite`, so an answer that is read only after that costs no time.
        """
        return lambda: flag

    def union(self, names: set[str]) -> set[str]:
        """Return the union of the names over all processes."""
        return names

    def broadcast(self, value: Result) -> Result:
        """Return the value that process 0 passes. Values must be picklable."""
        return value

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all processes, by rank, in every process. Values must be picklable."""
        return [value]

    def from_main(self, function: Callable[[], Result]) -> Result:
        """Run `function` in process 0, and return its result in every process. Results must be picklable.

        Raises:
            Exception: what `function` raises, in every process.
        """
        return function()

    def main_first(self, function: Callable[[], Result]) -> Result:
        """Call `function` in process 0, which may fill caches for the others or fail for all, and then in the others.

        Returns:
            what `function` returns in this process.

        Raises:
            Exception: what `function` raises in process 0, in every process; or what it raises in this one.
        """
        results: list[Result] = []
        self.from_main(lambda: results.append(function()))
        return results[0] if self.is_main else function()

    def barrier(self, what: str) -> None:
        """Wait until all processes are here; `what` says in an error what they were waiting for."""

    def note(self, step: int, phase: str) -> None:
        """Note what this process does, which others report if it is lost.

        Args:
            step: optimizer steps done.
            phase: activity such as "training step 17" or "evaluating"; if it begins with "saving", it is not cut short
                when another process has ended with an error.
        """

    # -- networks ----------------------------------------------------------------------------------------------------

    def wrap(self, model: nn.Module, **options: Any) -> nn.Module:
        """Return a network whose backward pass averages gradients over all processes; alone, this is `model` itself.

        Args:
            model: network on the device of this process, equal in all processes (`equalize`).
            options: options of `DistributedDataParallel` that differ from those chosen here.

        Raises:
            ProcessError: the processes have different networks.
        """
        return model

    def without_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Return a block in which backward passes only accumulate gradients, without averaging."""
        return nullcontext()

    def synchronize_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of process 0, such as running statistics, to all processes."""

    def equalize(self, model: nn.Module) -> None:
        """Copy the parameters and buffers of process 0 to all processes, and check that they are equal.

        Raises:
            ProcessError: the processes have different networks.
        """

    def require_equal(self, model: nn.Module) -> None:
        """Raise unless parameters and buffers are equal, bit for bit, in all processes.

        Raises:
            ProcessError: they differ; the message names the first tensor and the process.
        """


def refuse_sharded(model: nn.Module, reason: str) -> None:
    """Raise if parameters of `model` are divided among processes, as by `fully_shard`.

    Args:
        model: the network.
        reason: what needs whole parameters, why, and what to do, as the end of the message.

    Raises:
        ConfigError: a parameter is a DTensor.
    """
    for name, parameter in model.named_parameters():
        # By name, because importing DTensor takes longer than all other imports.
        if any(kind.__name__ == "DTensor" for kind in type(parameter).__mro__):
            raise ConfigError(f"The parameter {name} is divided among processes (fully_shard), but {reason}")
