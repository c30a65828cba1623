"""Optimizer of a configuration, created by timm's factory."""

from typing import Any

from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn
from torch.optim import Optimizer

from widekernel.engine.optimization_config import OptimizerConfig
from widekernel.engine.parameter_groups import needs_own_groups, parameter_groups
from widekernel.errors import ConfigError, in_short, nearest

_FUSED = ("adam", "adamw", "sgd", "momentum")
"""Optimizers of timm that PyTorch implements, and whose fused form can skip a step on the device."""


_OPTIONAL = ("momentum", "eps", "betas")
"""Settings that not every optimizer has."""


def check_optimizer_name(name: str) -> None:
    """Raise a `ConfigError` unless timm knows an optimizer of this name."""
    known = [str(each) for each in list_optimizers()]
    if name.lower() not in known:
        raise ConfigError(f"optimizer.name is {name!r}, which timm does not know.{nearest(name, known)}")


def create_optimizer(trained: nn.Module | list[nn.Parameter], config: OptimizerConfig, fused: bool = False) -> Optimizer:
    """Create the configured optimizer for a network, or for a list of parameters that are not weights.

    In a network, weight decay applies only to weights of two or more dimensions, unless settings say otherwise; parameters
    in a list do not decay.

    Args:
        trained: the network or the parameters.
        config: settings of the optimizer.
        fused: use PyTorch's fused implementation if the optimizer has one.

    Raises:
        ConfigError: timm knows no optimizer of that name, or the optimizer does not take a setting.
    """
    check_optimizer_name(config.name)
    given: dict[str, Any] = {key: getattr(config, key) for key in _OPTIONAL if getattr(config, key) is not None}
    _refuse_without_effect(config.name, given)
    if isinstance(trained, list):
        # Parameters that are not weights are neither decayed nor grouped by layer.
        config = OptimizerConfig(name=config.name, lr=config.lr, weight_decay=0.0)
    elif needs_own_groups(config):
        given["param_group_fn"] = lambda network: parameter_groups(network, config)
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
        options = "".join(f", {key} {given[key]}" for key in _OPTIONAL if key in given)
        raise ConfigError(
            f"The optimizer {config.name!r} cannot be created with lr {config.lr}, weight_decay {config.weight_decay}"
            f"{options} ({in_short(error).rstrip('.')}). Leave out what it does not take, or choose another optimizer.name."
        ) from error


def _refuse_without_effect(name: str, given: dict[str, Any]) -> None:
    """Raise a `ConfigError` if the optimizer `name` does not have one of the settings `given`, which timm would ignore."""
    info = get_optimizer_info(name.lower().rpartition("_")[2])
    for key, value in given.items():
        if not getattr(info, f"has_{key}"):
            raise ConfigError(f"optimizer.{key} is {value!r}, but {name} has no {key}: leave it out (null).")
