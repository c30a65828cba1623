"""Optimizer and learning-rate schedule from configuration, on timm's factories."""

from dataclasses import replace
from typing import Any

from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from widekernel.errors import ConfigError, in_short, nearest
from widekernel.training.config import OptimizerConfig, ScheduleConfig


def create_optimizer(trained: nn.Module | list[nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """The configured optimizer, for a network with weight decay only on weights of two and more dimensions.

    Raises:
        ConfigError: timm knows no optimizer of that name, or it does not take a setting.
    """
    known = [str(name) for name in list_optimizers()]
    if config.name.lower() not in known:
        raise ConfigError(f"optimizer.name is {config.name!r}, which timm does not know.{nearest(config.name, known)}")
    options: dict[str, Any] = {"eps": config.eps, "betas": config.betas}
    if isinstance(trained, list):
        # Parameters that are no weights: neither decayed nor grouped by layer.
        config = replace(config, weight_decay=0.0, layer_decay=None)
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return create_optimizer_v2(
            trained,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **given,
        )
    except (TypeError, ValueError, AssertionError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"The optimizer {config.name!r} cannot be made with lr {config.lr}, weight_decay {config.weight_decay}"
            f"{''.join(f', {key} {value}' for key, value in given.items())} ({in_short(error).rstrip('.')}). Leave out what "
            "it does not take, or choose another optimizer.name."
        ) from error


def create_schedule(optimizer: Optimizer, config: ScheduleConfig, steps_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up followed by half a cosine, both counted in optimizer steps.

    `step_update(k)` sets the rates of the step number `k`, counted from 0.
    """
    total = config.epochs * steps_per_epoch
    # a warm-up that fills the whole run would leave no step for the cosine
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=total - warmup,
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_lr_init=config.warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )
