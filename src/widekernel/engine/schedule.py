"""Learning rate and weight decay of every optimizer step."""

from __future__ import annotations

import math

from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer
from typing_extensions import override

from widekernel.engine.optimization_config import OptimizerConfig, ScheduleConfig
from widekernel.engine.parameter_groups import CONSTANT_DECAY
from widekernel.engine.reporter import RunLength


class RateSchedule(Scheduler):
    """Learning rate by optimizer step: a warm-up, and then the course that the settings choose.

    timm's schedules lack the constant and the exponential course, the warm-up of the published recipes, which reaches the
    peak with its last step, and that of the published segmentation and detection runs, which multiplies the course. With the
    default settings, the rates are those of timm's `CosineLRScheduler`, bit for bit.

    Args:
        optimizer: the optimizer; a group's `lr_scale` multiplies its rates
        config: settings of the schedule
        length: length of the run
    """

    def __init__(self, optimizer: Optimizer, config: ScheduleConfig, length: RunLength) -> None:
        self._config = config
        self._warmup = config.warmup(length.steps_per_epoch)
        self._steps = length.steps
        self._unit = config.decay_epochs * length.steps_per_epoch
        self._milestones = [round(epoch * length.steps_per_epoch) for epoch in config.milestones]
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=False)

    @override
    def _get_lr(self, t: int) -> list[float]:
        if self._config.warmup_factor is not None:
            factor = self._factor(t, self._config.warmup_factor)
            return [self._course(peak, t, 0) * factor for peak in self.base_values]
        if t < self._warmup:
            return [self._in_warmup(peak, t) for peak in self.base_values]
        return [self._course(peak, t, self._warmup) for peak in self.base_values]

    def _in_warmup(self, peak: float, step: int) -> float:
        start, kind = self._config.warmup_lr, self._config.warmup_kind
        if kind == "constant":
            return start
        steps = self._warmup if kind == "linear" else self._warmup - 1
        return start + step * ((peak - start) / steps) if steps else start

    def _factor(self, step: int, first: float) -> float:
        """Return the factor of a warm-up that multiplies the course."""
        if step >= self._warmup:
            return 1.0
        return first if self._config.warmup_kind == "constant" else 1 - (1 - step / self._warmup) * (1 - first)

    def _course(self, peak: float, step: int, start: int) -> float:
        """Return the learning rate of step `step` without a warm-up; the course begins with step `start`."""
        config, done, length = self._config, step - start, self._steps - start
        if config.kind == "constant":
            return peak
        if config.kind == "cosine":
            angle = math.pi * min(done, length) / length
            return config.min_lr + 0.5 * (peak - config.min_lr) * (1 + math.cos(angle))
        if config.kind == "poly":
            return config.min_lr + (peak - config.min_lr) * (1 - min(done, length) / length) ** config.power
        if config.kind == "multistep":
            times: float = sum(step >= milestone for milestone in self._milestones)
        else:
            times = done // max(1, round(self._unit)) if config.kind == "step" else done / self._unit
        return max(peak * config.gamma**times, min(peak, config.min_lr))


class StepSchedule:
    """Schedule of a run: `step_update(k)` sets the learning rates and the weight decay of step `k`, counted from 0.

    Args:
        rates: learning rates
        optimizer: the optimizer
        decay: weight decay in the first step and, half a cosine later, after the last one; `None` leaves it alone
        steps: optimizer steps of the run
    """

    def __init__(self, rates: RateSchedule, optimizer: Optimizer, decay: tuple[float, float] | None, steps: int) -> None:
        self._rates, self._optimizer, self._decay, self._steps = rates, optimizer, decay, steps
        groups = optimizer.param_groups
        self._decayed = [n for n, group in enumerate(groups) if group["weight_decay"] > 0 and not group.get(CONSTANT_DECAY)]

    def step_update(self, step: int) -> None:
        """Set the learning rates and the weight decay of step `step`, counted from 0."""
        self._rates.step_update(step)
        if self._decay is None:
            return
        first, last = self._decay
        value = last + 0.5 * (first - last) * (1 + math.cos(math.pi * step / self._steps))
        for number in self._decayed:
            self._optimizer.param_groups[number]["weight_decay"] = value


def create_schedule(
    optimizer: Optimizer, config: ScheduleConfig, length: RunLength, decay: OptimizerConfig | None = None
) -> StepSchedule:
    """Create the schedule of a run.

    Args:
        optimizer: the optimizer, with the peak learning rates.
        config: settings of the learning rate.
        length: length of the run.
        decay: settings of the weight decay; without them, it stays as it is.
    """
    ends = None
    if decay is not None and decay.weight_decay_end is not None:
        ends = decay.weight_decay, decay.weight_decay_end
    return StepSchedule(RateSchedule(optimizer, config, length), optimizer, ends, length.steps)
