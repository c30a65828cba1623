"""Means of the losses between two rows of metrics, summed on the device so that no step waits for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from widekernel.engine.processes import Processes


class LossMeter:
    """Sums of the named losses of one process, since the last row of metrics."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._sums = torch.zeros(1, dtype=torch.float64, device=device)  # the last one counts the steps

    def add(self, losses: Mapping[str, Tensor], made: Tensor | None = None) -> None:
        """Add the losses of a step; if `made`, a scalar bool on the device, is given and false, add nothing."""
        if not self._names:
            self._names = list(losses)
            self._sums = torch.zeros(len(losses) + 1, dtype=torch.float64, device=self._device)
        one = torch.ones((), dtype=torch.float64, device=self._device)
        values = torch.stack([*(losses[name].detach().double() for name in self._names), one])
        self._sums += values if made is None else torch.where(made, values, torch.zeros_like(values))

    def take_means(self, processes: Processes) -> dict[str, float]:
        """Return the mean of each loss over steps and processes, and start anew; {} if no step was made."""
        *sums, count = processes.sum(self._sums).tolist()
        self._sums.zero_()
        return {name: value / count for name, value in zip(self._names, sums, strict=True)} if count else {}

    def state(self, processes: Processes) -> dict[str, Any]:
        """Return the sums of every process; all processes call this together."""
        return {"names": self._names, "sums": processes.gather(self._sums.tolist())}

    def load_state(self, state: dict[str, Any], processes: Processes) -> None:
        """Restore the sums; if the number of processes has changed, each takes the mean: all steps weigh the same."""
        self._names = list(state["names"])
        every = torch.tensor(state["sums"], dtype=torch.float64)
        own = every[processes.rank] if len(every) == processes.world_size else every.mean(0)
        self._sums = own.to(self._device)
