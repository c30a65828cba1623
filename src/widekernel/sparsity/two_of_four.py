"""Two of every four consecutive input channels: masks that move within their groups of four."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from widekernel.sparsity.criteria import generator_for, smallest
from widekernel.sparsity.schedules import prune_fraction
from widekernel.sparsity.semi_structured.grouping import group_view, ungroup
from widekernel.sparsity.semi_structured.masks import magnitude_mask
from widekernel.sparsity.state import MaskState


def draw(state: MaskState, scores: Mapping[str, Tensor] | None) -> None:
    """Set the first masks: the two largest scores of four, two at random, or what is not zero; and their densities."""
    for name, parameter in state.parameters.items():
        weight = parameter.detach()
        if state.config.init == "from_weights":
            mask = weight != 0  # which `choices_for` has found to be 2:4
        elif scores is not None and state.config.init in ("snip_mask", "magnitude"):
            mask = magnitude_mask(scores[name])
        else:
            generator = generator_for(weight.device, state.config.seed, 0, name)
            mask = magnitude_mask(torch.rand(weight.shape, generator=generator, device=weight.device))
        state.masks[name].copy_(mask)
        state.densities[name] = mask.float().mean().item()


def update(state: MaskState, step: int, number: int, growth: Mapping[str, Tensor] | None) -> None:
    """Exchange one weight of a group for another one, in the groups whose smaller live weight is smallest."""
    fraction = 0.0 if state.config.growth == "none" else prune_fraction(state.config, step)
    for name, parameter in state.parameters.items():
        weights, real = group_view(parameter.detach().abs())
        alive, _ = group_view(state.masks[name])
        if growth is None:
            generator = generator_for(parameter.device, state.config.seed, number, name)
            ranking = torch.rand(weights.shape, generator=generator, device=weights.device)
        else:
            ranking, _ = group_view(growth[name].detach().abs())
        free = real & ~alive
        movable = alive.any(1) & free.any(1)
        lost, removed = weights.masked_fill(~alive, torch.inf).min(1)
        grown = ranking.masked_fill(~free, -torch.inf).argmax(1)
        moved = min(math.floor(fraction * int(alive.sum())), int(movable.sum()))
        rows = smallest(lost, moved, movable).nonzero().squeeze(1)
        new = alive.clone()
        new[rows, removed[rows]] = False
        new[rows, grown[rows]] = True
        state.masks[name].copy_(ungroup(new, parameter.shape))


def reason_against(shape: tuple[int, ...]) -> str:
    """Say why a weight of `shape` has no groups of four, "" if it has."""
    if len(shape) not in (2, 4):
        return f"has {len(shape)} dimensions, and 2:4 masks are for matrices and two-dimensional kernels"
    if shape[1] < 4:
        return f"has {shape[1]} input channels a group, too few for two of four"
    return ""
