"""Everything in a run that has a state; a training state is the union of these components."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from widekernel.engine.optimizer_step import OptimizerStep, Trained
from widekernel.engine.processes import Processes
from widekernel.engine.progress import Progress


@dataclass
class Components:
    """Components of a run, all of which are equal in all processes except the sums of losses.

    Random generators are missing, because all random numbers are functions of seed, step and position.

    Args:
        trained: network, optimizer, scaler, sparsity and moving average
        step: the optimizer step, which holds the sums of losses and counts skipped steps
        progress: how far the run is
    """

    trained: Trained
    step: OptimizerStep
    progress: Progress = field(default_factory=Progress)

    def state(self, processes: Processes) -> dict[str, Any]:
        """Return the state of every component, as tensors and plain containers; all processes call this together."""
        trained = self.trained
        self.progress.skipped, self.progress.skipped_in_a_row, _ = self.step.skipped()
        return {
            "model": trained.model.state_dict(),
            "ema": None if trained.average is None else trained.average.module.state_dict(),
            "optimizer": trained.optimizer.state_dict(),
            "scaler": trained.scaler.state_dict(),
            "sparsity": trained.sparsity.state(),
            "meters": self.step.meter.state(processes),
            "progress": self.progress.state(),
        }

    def load_state(self, state: dict[str, Any], processes: Processes) -> None:
        """Restore every component from a result of `state`, which another number of processes may have made."""
        trained = self.trained
        trained.model.load_state_dict(state["model"])
        if trained.average is not None:
            trained.average.module.load_state_dict(state["ema"])
        trained.optimizer.load_state_dict(state["optimizer"])
        trained.scaler.load_state_dict(state["scaler"])
        trained.sparsity.load_state(state.get("sparsity"))
        self.step.meter.load_state(state["meters"], processes)
        self.progress = Progress.from_state(state["progress"])
        self.step.set_skipped(self.progress.skipped, self.progress.skipped_in_a_row)
        processes.require_equal(trained.model)
