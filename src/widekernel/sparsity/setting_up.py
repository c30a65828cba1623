"""What a controller needs before the first step: what is masked, averages of the weights, and scores of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from widekernel.errors import ArgumentError
from widekernel.sparsity.config import DynamicSparsityConfig
from widekernel.sparsity.processes import average
from widekernel.sparsity.selection import Choice, choose, unwrap
from widekernel.sparsity.semi_structured.grouping import group_view
from widekernel.sparsity.two_of_four import reason_against


def choices_for(model: nn.Module, config: DynamicSparsityConfig, masks: dict[str, Tensor] | None) -> list[Choice]:
    """Decide what is masked: as `config` says, or exactly what `masks` are given for.

    Raises:
        ArgumentError: masks belong to another network, or nothing can be masked.
    """
    if masks is not None:
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        wrong = [name for name, mask in masks.items() if shapes.get(name) != tuple(mask.shape)]
        if wrong or not masks:
            what = f"{wrong[0]} {tuple(masks[wrong[0]].shape)}" if wrong else "none at all"
            found = shapes.get(wrong[0], "no such parameter") if wrong else f"{len(shapes)} parameters"
            raise ArgumentError(
                f"the masks belong to another network: they hold {what}, where this one has {found}. Give masks of this one"
            )
        choices = choose(model, "all", ())
        refused = [choice for choice in choices if choice.name in masks and choice.reason]
        if refused:
            raise ArgumentError(f"{refused[0].name} has a mask, but {refused[0].reason}: leave its mask out")
        return [
            Choice(
                choice.name, choice.shape, choice.reason or ("" if choice.name in masks else "is not among the masks given")
            )
            for choice in choices
        ]
    choices = choose(model, config.layers, config.exclude)
    if config.block != "2:4":
        return choices
    weights = dict(model.named_parameters())
    choices = [
        Choice(choice.name, choice.shape, choice.reason or _reason_against(weights[choice.name], config))
        for choice in choices
    ]
    if not any(choice.masked for choice in choices):
        raise ArgumentError(
            "no layer has groups of four input channels to be masked 2:4: depthwise layers have one each. Select others "
            "with layers, or use another block"
        )
    return choices


def _reason_against(weight: Tensor, config: DynamicSparsityConfig) -> str:
    reason = reason_against(tuple(weight.shape))
    if reason or config.init != "from_weights":
        return reason
    groups, _ = group_view(weight.detach() != 0)
    return "is not 2:4 now" if bool((groups.sum(1) > 2).any()) else ""


def averaged_weights(network: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Give the averaged weights by name, as the network holds them now.

    Raises:
        ArgumentError: the network lacks one of them.
    """
    inner = network if hasattr(network, "update_parameters") or hasattr(network, "update") else None
    found = dict(unwrap(inner.module if inner is not None else network).named_parameters())  # type: ignore[arg-type]
    for name, parameter in parameters.items():
        if name not in found or found[name].shape != parameter.shape:
            raise ArgumentError(f"averages: {type(network).__name__} has no {name} of shape {tuple(parameter.shape)}")
    return {name: found[name] for name in parameters}


def snip_scores(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batch: tuple[Tensor, Tensor],
    loss: Callable[[Any, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Compute |weight · gradient| on a copy of the network in training mode, without touching the random numbers."""
    devices = sorted({parameter.device.index or 0 for parameter in parameters.values() if parameter.is_cuda})
    with torch.random.fork_rng(devices):
        trial = copy.deepcopy(model).train()
        inputs, targets = batch
        with torch.enable_grad():
            loss(trial(inputs), targets).backward()
    scores = {}
    for name, parameter in trial.named_parameters():
        if name in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else average(parameter.grad)
            scores[name] = (parameter.detach() * gradient).abs()
    return {name: scores[name] for name in parameters}
