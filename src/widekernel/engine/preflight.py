"""Checks before the first step for settings that have no effect, or a wrong one, in a run of this length."""

from __future__ import annotations

from widekernel.data.config import processors
from widekernel.engine.config import SparsityConfig, TrainingConfig
from widekernel.engine.reporter import RunLength
from widekernel.errors import ConfigError
from widekernel.sparsity.dynamic.config import with_total_steps

_REFUSE_ABOVE, _NOTE_ABOVE = 0.9, 0.05
"""Share of the initial weights in the final average above which a run is refused, or the user gets a note."""


def check_run_length(config: TrainingConfig, length: RunLength) -> list[str]:
    """Check the settings whose effect depends on the length of a run.

    Args:
        config: settings of the run.
        length: its length.

    Returns:
        notes for the user.

    Raises:
        ConfigError: the averaged weights or the sparsity would hardly change from their initial values.
    """
    warmup = config.schedule.warmup_steps
    if warmup is not None and warmup >= length.steps:
        raise ConfigError(
            f"schedule.warmup_steps is {warmup}, but the run has {length.steps} steps: lower it, or lengthen the run."
        )
    checks = _check_average(config, length.steps), _check_masks(config.sparsity, length.steps), _notes_on_rates(config)
    return [note for notes in checks for note in notes]


def _check_average(config: TrainingConfig, total_steps: int) -> list[str]:
    decay = config.ema.decay
    if decay is None or config.ema.warmup:
        return []
    left = decay**total_steps
    what = (
        f"ema.decay is {decay}, so after the {total_steps} steps of the run {100 * left:.3g} % of the average "
        "would still be the initial weights"
    )
    if left > _REFUSE_ABOVE:
        suited = 1 - 5 / max(total_steps, 10)
        raise ConfigError(f"{what}: set ema.warmup to true, ema.decay to {suited:.3g} or lower, or ema.decay to null.")
    return [f"{what}; ema.warmup avoids this."] if left > _NOTE_ABOVE else []


def _notes_on_rates(config: TrainingConfig) -> list[str]:
    lr, schedule = config.optimizer.lr, config.schedule
    notes = []
    if schedule.kind == "cosine" and schedule.min_lr > lr:
        notes.append(f"schedule.min_lr ({schedule.min_lr}) is above optimizer.lr ({lr}): the learning rate will rise to it.")
    if schedule.warmup_epochs and schedule.warmup_lr > lr:
        notes.append(
            f"schedule.warmup_lr ({schedule.warmup_lr}) is above optimizer.lr ({lr}): the learning rate will fall during "
            "the warm-up."
        )
    return notes


def _check_masks(config: SparsityConfig, total_steps: int) -> list[str]:
    if config.method != "dynamic":
        return []
    dynamic = with_total_steps(config.dynamic, total_steps)
    moves = dynamic.growth != "none" and dynamic.prune_fraction > 0
    if not (moves or dynamic.initial_sparsity is not None) or dynamic.update_interval <= min(dynamic.stop_step, total_steps):
        return []
    last = int(min(dynamic.stop_step, total_steps))
    what = (
        f"sparsity.dynamic.update_interval is {dynamic.update_interval}, but masks move only in the first {last} "
        f"of {total_steps} steps"
    )
    if dynamic.initial_sparsity is not None:
        raise ConfigError(f"{what}, so the sparsity would stay at initial_sparsity ({dynamic.initial_sparsity}): lower it.")
    return [f"{what}, so they never will."]


def notes_on_workers(workers: int) -> list[str]:
    """Return a note if there are more processes that decode images than processors."""
    cores = processors()
    return [f"data.workers is {workers}, but there are {cores} processors here."] if workers > cores else []
