"""Optimizer and learning-rate schedule of a configuration, created by timm's factories."""

from dataclasses import replace
from typing import Any

from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from widekernel.engine.config import OptimizerConfig, ScheduleConfig
from widekernel.errors import ConfigError, in_short, nearest


def create_optimizer(trained: nn.Module | list[nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """Create the configured optimizer for a network, or for a list of parameters that are not weights.

    In a network, weight decay applies only to weights of two or more dimensions; parameters in a list do not decay.

    Raises:
        ConfigError: timm knows no optimizer of that name, or the optimizer does not take a setting.
    """
    known = [str(name) for name in list_optimizers()]
    if config.name.lower() not in known:
        raise ConfigError(f"optimizer.name is {config.name!r}, which timm does not know.{nearest(config.name, known)}")
    options: dict[str, Any] = {"eps": config.eps, "betas": config.betas}
    if isinstance(trained, list):
        # Parameters that are not weights are neither decayed nor grouped by layer.
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
            f"The optimizer {config.name!r} cannot be created with lr {config.lr}, weight_decay {config.weight_decay}"
            f"{''.join(f', {key} {value}' for key, value in given.items())} ({in_short(error).rstrip('.')}). Leave out what "
            "it does not take, or choose another optimizer.name."
        ) from error


def create_schedule(optimizer: Optimizer, config: ScheduleConfig, steps_per_epoch: int) -> CosineLRScheduler:
    """Create a schedule of linear warm-up and half a cosine, counted in optimizer steps.

    Its `step_update(k)` sets the learning rates of step `k`, counted from 0.
    """
    total = config.epochs * steps_per_epoch
    # A warm-up that fills the whole run would leave no step for the cosine.
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
