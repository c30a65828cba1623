"""Optimizer and learning-rate schedule of a configuration, created by timm's factories."""

from dataclasses import replace
from typing import Any

from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from widekernel.engine.config import OptimizerConfig, ScheduleConfig
from widekernel.engine.reporter import RunLength
from widekernel.errors import ConfigError, in_short, nearest

_FUSED = ("adam", "adamw", "sgd", "momentum")
"""Optimizers of timm that PyTorch implements, and whose fused form can skip a step on the device."""

_IMPLEMENTATION = ("fused", "foreach", "capturable")
"""Options of an optimizer that change how it computes."""


def check_optimizer_name(name: str) -> None:
    """Raise a `ConfigError` unless timm knows an optimizer of this name."""
    known = [str(each) for each in list_optimizers()]
    if name.lower() not in known:
        raise ConfigError(f"optimizer.name is {name!r}, which timm does not know.{nearest(name, known)}")


def create_optimizer(trained: nn.Module | list[nn.Parameter], config: OptimizerConfig, fused: bool = False) -> Optimizer:
    """Create the configured optimizer for a network, or for a list of parameters that are not weights.

    In a network, weight decay applies only to weights of two or more dimensions; parameters in a list do not decay.

    Args:
        trained: the network or the parameters.
        config: settings of the optimizer.
        fused: use PyTorch's fused implementation if the optimizer has one.

    Raises:
        ConfigError: timm knows no optimizer of that name, or the optimizer does not take a setting.
    """
    check_optimizer_name(config.name)
    _check_options(config)
    options: dict[str, Any] = {"eps": config.eps, "betas": config.betas}
    if isinstance(trained, list):
        # Parameters that are not weights are neither decayed nor grouped by layer.
        config = replace(config, weight_decay=0.0, layer_decay=None)
    given = {key: value for key, value in options.items() if value is not None}
    if fused and config.name.lower() in _FUSED:
        given["fused"] = True
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


def _check_options(config: OptimizerConfig) -> None:
    """Raise a `ConfigError` if timm would leave out a setting that the optimizer does not take."""
    info = get_optimizer_info(config.name.lower())
    for key, value, takes in (("betas", config.betas, info.has_betas), ("eps", config.eps, info.has_eps)):
        if value is not None and not takes:
            raise ConfigError(
                f"optimizer.{key} is {value}, but the optimizer {config.name!r} has no {key}: leave it out, or choose "
                "another optimizer.name."
            )


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restore the state of an optimizer, which another device may have saved, but keep its own implementation.

    The options that choose an implementation are among the saved ones. If a fused optimizer took those of one that is not,
    it could not skip steps on the device.
    """
    own = [{key: group[key] for key in _IMPLEMENTATION if key in group} for group in optimizer.param_groups]
    saved = state["param_groups"]
    groups = [{**theirs, **mine} for theirs, mine in zip(saved, own)] if len(saved) == len(own) else saved
    optimizer.load_state_dict({**state, "param_groups": groups})


def create_schedule(optimizer: Optimizer, config: ScheduleConfig, length: RunLength) -> CosineLRScheduler:
    """Create a schedule of linear warm-up and half a cosine, counted in optimizer steps.

    Its `step_update(k)` sets the learning rates of step `k`, counted from 0.
    """
    warmup = config.warmup(length.steps_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=length.steps - warmup,
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_lr_init=config.warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )
