"""What a controller needs before the first step: what is masked, averages of the weights, and scores of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
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
        _check_tensors(masks)
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


def _check_tensors(masks: object) -> None:
    if not isinstance(masks, Mapping):
        raise ArgumentError(f"masks is a {type(masks).__name__}: give a dict of parameter names and bool tensors")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor):
            raise ArgumentError(f"the mask of {name} is a {type(mask).__name__}: give a bool tensor (torch.as_tensor)")


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
    """Compute |weight · gradient| on a copy of the network in training mode, without touching the random numbers.

    Raises:
        ArgumentError: `batch` is no pair, or its targets are not what cross-entropy takes.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        length = f" of {len(batch)}" if isinstance(batch, (tuple, list, dict, str)) else ""
        raise ArgumentError(f"batch is a {type(batch).__name__}{length}: give a pair, batch=(inputs, targets)")
    devices = sorted({parameter.device.index or 0 for parameter in parameters.values() if parameter.is_cuda})
    with torch.random.fork_rng(devices):
        trial = copy.deepcopy(model).train()
        inputs, targets = batch
        with torch.enable_grad():
            outputs = trial(inputs)
            if loss is F.cross_entropy:
                _check_targets(outputs, targets)
            loss(outputs, targets).backward()
    scores = {}
    for name, parameter in trial.named_parameters():
        if name in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else average(parameter.grad)
            scores[name] = (parameter.detach() * gradient).abs()
    return {name: scores[name] for name in parameters}


def _check_targets(outputs: object, targets: object) -> None:
    """Raise unless cross-entropy takes these: class numbers, or a probability for every output."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        found = f"outputs are a {type(outputs).__name__}, the targets a {type(targets).__name__}"
        raise ArgumentError(f"batch: cross-entropy takes two tensors; the network's {found}. Give a loss that takes these")
    if targets.dtype == torch.int64 or (targets.is_floating_point() and targets.shape == outputs.shape):
        return
    raise ArgumentError(
        f"batch: the targets are {targets.dtype} {tuple(targets.shape)}; cross-entropy takes class numbers (torch.int64) or "
        f"probabilities of the outputs' shape {tuple(outputs.shape)}: convert them (targets.long()), or give another loss"
    )
