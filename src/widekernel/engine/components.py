"""Everything in a run that has a state; a training state is the union of these components."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from widekernel.engine.acceleration import Acceleration
from widekernel.engine.autocast import make_autocast
from widekernel.engine.average import Average
from widekernel.engine.config import TrainingConfig
from widekernel.engine.optimization import create_optimizer, load_optimizer
from widekernel.engine.optimizer_step import OptimizerStep, Trained, can_be_deferred
from widekernel.engine.processes import Processes, refuse_sharded
from widekernel.engine.progress import Progress
from widekernel.engine.reporter import RunLength
from widekernel.engine.run_context import RunContext
from widekernel.engine.sparsification import create_sparsification
from widekernel.engine.task import Task

_SPARSITY_NEEDS = "sparsity needs whole parameters: masks are chosen from all weights of a layer. Leave fully_shard out."
_ACCELERATE_NEEDS = (
    "loop.accelerate needs whole parameters: process 0 runs the network alone. Set it to false, or leave fully_shard out."
)


@dataclass
class Components:
    """Components of a run, all of which are equal in all processes except the sums of losses.

    Random generators are missing, because all random numbers are functions of seed, step and position.

    Args:
        trained: network, optimizer, scaler, sparsity and moving average
        step: the optimizer step, which holds the sums of losses and counts skipped steps
        acceleration: the layers that are fastest on this machine
        progress: how far the run is
    """

    trained: Trained
    step: OptimizerStep
    acceleration: Acceleration
    progress: Progress = field(default_factory=Progress)

    def state(self, processes: Processes) -> dict[str, Any]:
        """Return the state of every component, as tensors and plain containers; all processes call this together."""
        trained = self.trained
        return {
            "model": trained.model.state_dict(),
            "ema": None if trained.average is None else trained.average.module.state_dict(),
            "optimizer": trained.optimizer.state_dict(),
            "scaler": trained.scaler.state_dict(),
            "sparsity": trained.sparsity.state(),
            "acceleration": self.acceleration.state(),
            "skipped": self.step.counts(),
            "meters": self.step.meter.state(processes),
            "progress": self.progress.state(),
        }

    def load_state(self, state: dict[str, Any], processes: Processes) -> None:
        """Restore every component from a result of `state`, which another number of processes may have made."""
        trained = self.trained
        trained.model.load_state_dict(state["model"])
        if trained.average is not None:
            trained.average.module.load_state_dict(state["ema"])
        load_optimizer(trained.optimizer, state["optimizer"])
        trained.scaler.load_state_dict(state["scaler"])
        trained.sparsity.load_state(state.get("sparsity"))
        self.acceleration.load_state(state.get("acceleration"))
        self.step.meter.load_state(state["meters"], processes)
        self.progress = Progress.from_state(state["progress"])
        self.step.set_counts(state["skipped"])
        self.step.deferred = self.step.can_defer and not (self.progress.skipped or self.progress.rollbacks)
        processes.require_equal(trained.model)


def create_components(
    model: nn.Module, task: Task, config: TrainingConfig, length: RunLength, context: RunContext
) -> Components:
    """Create everything that has a state, for a network that is equal in all processes.

    Raises:
        ConfigError: a setting does not fit the network or the device.
    """
    processes, device = context.processes, context.device
    autocast = make_autocast(config.loop.precision, device)
    if config.sparsity.method != "none":
        refuse_sharded(model, _SPARSITY_NEEDS)
    if config.loop.accelerate:
        refuse_sharded(model, _ACCELERATE_NEEDS)
    sparsity = create_sparsification(model, config.sparsity, config.seed, length.steps)
    optimizer = create_optimizer(sparsity.trained(model), config.optimizer, fused=device.type in ("cuda", "cpu"))
    decay = config.ema.decay
    average = None if decay is None else Average(model, decay, config.ema.warmup)
    sparsity.attach(optimizer, average, length.steps)
    scaler = torch.amp.GradScaler(device.type, enabled=config.loop.precision == "fp16")
    if config.loop.compile is not None:
        model.compile(mode=config.loop.compile)
    trained = Trained(model, processes.wrap(model), optimizer, scaler, sparsity, average)
    deferred = device.type == "cuda" and can_be_deferred(trained)
    step = OptimizerStep(trained, task, config.optimizer, autocast, processes, deferred)
    averaged = None if average is None else average.module
    return Components(trained, step, Acceleration(model, averaged, task, config.loop, autocast, context))
