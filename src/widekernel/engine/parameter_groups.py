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
from widekernel.layers.layer_groups import LAST_GROUP, dense_layer_groups, layer_groups

CONSTANT_DECAY = "constant_decay"
"""Key of a group whose weight decay does not follow `optimizer.weight_decay_end`."""

_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, GlobalResponseNorm)


def needs_own_groups(config: OptimizerConfig) -> bool:
    """Return whether the groups differ from those that timm makes for an optimizer."""
    decays = config.norm_weight_decay, config.bias_weight_decay
    own = config.layer_groups != "blocks" or config.decayed != "weights" or config.decay_response_norms
    return own or any(value is not None for value in decays)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the groups of timm, refined by the settings that timm does not have, in the order of the parameters.

    Raises:
        ConfigError: the network does not have the layer groups that the settings name.
    """
    excluded: set[str] = getattr(model, "no_weight_decay", set)()
    grouped = config.layer_decay is not None and config.layer_groups != "blocks"
    if config.layer_decay is None or grouped:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=excluded)
    else:
        groups = param_groups_layer_decay(model, config.weight_decay, excluded, layer_decay=config.layer_decay)
    usual = {id(each): {**group, "params": []} for group in groups for each in group["params"]}
    decays = _all_but_batch_norms(model, config) if config.decayed == "all_but_batch_norms" else _own_decays(model, config)
    from_head = _from_head(model, config.layer_groups) if grouped else {}
    refined: dict[tuple, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in usual:  # frozen
            continue
        group = {**usual[id(parameter)], **decays.get(name, {}), "params": []}
        if config.layer_decay is not None and grouped:
            group["lr_scale"] = config.layer_decay ** from_head[name]
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


def _all_but_batch_norms(model: nn.Module, config: OptimizerConfig) -> dict[str, dict[str, Any]]:
    """Return the weight decay of every parameter, by name, if only batch, instance and group norms have none."""
    options: dict[str, dict[str, Any]] = {}
    for prefix, module in model.named_modules():
        decay = 0.0 if isinstance(module, (_BatchNorm, _InstanceNorm, nn.GroupNorm)) else config.weight_decay
        for short, _ in module.named_parameters(recurse=False):
            options[f"{prefix}.{short}" if prefix else short] = {"weight_decay": decay}
    return options


def _from_head(model: nn.Module, kind: str) -> dict[str, int]:
    """Return, for each parameter, how many layer groups lie between it and the head, and one; 0 for the head itself."""
    if kind == "convnext12":
        last, found = LAST_GROUP, layer_groups(model)
    else:
        by, _, number = kind.partition("_wise")
        last, found = int(number) + 1, dense_layer_groups(model, by, int(number))
    unknown = [name for name, group in found.items() if group is None]
    if unknown:
        size = "" if kind == "convnext12" else " of this depth"
        raise ConfigError(
            f"optimizer.layer_groups is {kind!r}, but {type(model).__name__} is not built like ConvNeXt{size}: it has the "
            f"parameter {unknown[0]!r}. Use blocks."
        )
    return {name: last - group for name, group in found.items() if group is not None}
