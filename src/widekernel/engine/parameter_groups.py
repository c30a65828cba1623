"""Groups of parameters with their own weight decay and their own share of the learning rate."""

from __future__ import annotations

from typing import Any

from timm.layers.grn import GlobalResponseNorm
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from widekernel.engine.optimization_config import OptimizerConfig
from widekernel.errors import ConfigError
from widekernel.layers.layer_groups import LAST_GROUP, layer_groups

CONSTANT_DECAY = "constant_decay"
"""Key of a group whose weight decay does not follow `optimizer.weight_decay_end`."""

_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, GlobalResponseNorm)


def needs_own_groups(config: OptimizerConfig) -> bool:
    """Return whether the groups differ from those that timm makes for an optimizer."""
    decays = config.norm_weight_decay, config.bias_weight_decay
    return config.layer_groups != "blocks" or config.decay_response_norms or any(value is not None for value in decays)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the groups of timm, refined by the settings that timm does not have, in the order of the parameters.

    Raises:
        ConfigError: the network does not have the layer groups that the settings name.
    """
    excluded: set[str] = getattr(model, "no_weight_decay", set)()
    twelve = config.layer_groups == "convnext12"
    if config.layer_decay is None or twelve:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=excluded)
    else:
        groups = param_groups_layer_decay(model, config.weight_decay, excluded, layer_decay=config.layer_decay)
    usual = {id(each): {**group, "params": []} for group in groups for each in group["params"]}
    decays, layers = _own_decays(model, config), _layers(model) if twelve else {}
    refined: dict[tuple, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in usual:  # frozen
            continue
        group = {**usual[id(parameter)], **decays.get(name, {}), "params": []}
        if twelve and config.layer_decay is not None:
            group["lr_scale"] = config.layer_decay ** (LAST_GROUP - layers[name])
        key = tuple(sorted((option, value) for option, value in group.items() if option != "params"))
        refined.setdefault(key, group)["params"].append(parameter)
    return list(refined.values())


def _own_decays(model: nn.Module, config: OptimizerConfig) -> dict[str, dict[str, Any]]:
    """Return the options of the parameters, by name, whose weight decay is set apart from that of the others."""
    options: dict[str, dict[str, Any]] = {}
    for prefix, module in model.named_modules():
        for short, _ in module.named_parameters(recurse=False):
            name = f"{prefix}.{short}" if prefix else short
            if config.decay_response_norms and isinstance(module, GlobalResponseNorm):
                options[name] = {"weight_decay": config.weight_decay}
                continue
            of_norm = config.norm_weight_decay if isinstance(module, _NORMS) else None
            own = config.bias_weight_decay if short == "bias" and config.bias_weight_decay is not None else of_norm
            if own is not None:
                options[name] = {"weight_decay": own, CONSTANT_DECAY: True}
    return options


def _layers(model: nn.Module) -> dict[str, int]:
    found = layer_groups(model)
    unknown = [name for name, group in found.items() if group is None]
    if unknown:
        raise ConfigError(
            f"optimizer.layer_groups is 'convnext12', but {type(model).__name__} is not built like ConvNeXt: it has the "
            f"parameter {unknown[0]!r}. Use blocks."
        )
    return {name: group for name, group in found.items() if group is not None}
