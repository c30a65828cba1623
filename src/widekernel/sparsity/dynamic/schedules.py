"""Schedules of the share of weights that an update moves, and of the sparsity."""

from __future__ import annotations

import math

from widekernel.sparsity.dynamic.config import DynamicSparsityConfig

PUBLISHED_FLOOR = 0.005  # where the published cosine ends


def cosine(start: float, floor: float, step: float, total: float) -> float:
    """Compute half a cosine from `start` at step 0 to `floor` at step `total`, and `floor` from there on."""
    return floor + (start - floor) * (1 + math.cos(math.pi * min(step / total, 1.0))) / 2


def prune_fraction(config: DynamicSparsityConfig, step: int) -> float:
    """Return the share of the live weights that the update after `step` optimizer steps moves."""
    if config.prune_schedule == "constant":
        return config.prune_fraction
    floor = PUBLISHED_FLOOR if config.rule == "published" else 0.0
    return cosine(config.prune_fraction, floor, step, config.stop_step)


def sparsity_at(config: DynamicSparsityConfig, step: int) -> float:
    """Return the sparsity to reach after `step` optimizer steps.

    With `initial_sparsity` s_i: s_f + (s_i - s_f)(1 - t/T)³ up to the last update T (Zhu & Gupta, 2017, eq. 1).
    """
    if config.initial_sparsity is None:
        return config.sparsity
    # T is the last update that takes place, so that it reaches the final sparsity exactly.
    last = math.floor(config.stop_step / config.update_interval) * config.update_interval
    left = 1 - min(step / last, 1.0) if last > 0 else 0.0
    return config.sparsity + (config.initial_sparsity - config.sparsity) * left**3
