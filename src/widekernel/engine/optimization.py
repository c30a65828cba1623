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

_IMPLEMENTATION = ("fused", "foreach", "capturable")
"""Options of an optimizer that change how it computes."""


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
    _check_options(config.name, given)
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


def _check_options(name: str, given: dict[str, Any]) -> None:
    """Raise a `ConfigError` if the optimizer does not take one of the settings `given`, which timm would leave out."""
    info = get_optimizer_info(name.lower())
    for key, value in given.items():
        if not getattr(info, f"has_{key}"):
            raise ConfigError(
                f"optimizer.{key} is {value}, but the optimizer {name!r} has no {key}: leave it out, or choose another "
                "optimizer.name."
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
