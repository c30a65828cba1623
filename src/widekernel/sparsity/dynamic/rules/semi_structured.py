"""Exact rule for 2:4 blocks: two of every four consecutive input channels are live, and masks move within the four."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from widekernel.sparsity.dynamic.ranking import generator_for, smallest
from widekernel.sparsity.dynamic.schedules import prune_fraction
from widekernel.sparsity.dynamic.state import MaskState
from widekernel.sparsity.semi_structured.grouping import group_view, ungroup
from widekernel.sparsity.semi_structured.masks import magnitude_mask


def draw_masks(state: MaskState, scores: Mapping[str, Tensor] | None) -> None:
    """Set the first masks and their densities.

    Depending on `init`, a mask keeps the two largest scores of four, two of four at random, or the nonzero weights.
    """
    for name, parameter in state.parameters.items():
        weight = parameter.detach()
        if state.config.init == "from_weights":
            mask = weight != 0  # `select_parameters` has checked that these weights are 2:4
        elif scores is not None and state.config.init in ("snip_mask", "magnitude"):
            mask = magnitude_mask(scores[name])
        else:
            generator = generator_for(weight.device, state.config.seed, 0, name)
            mask = magnitude_mask(torch.rand(weight.shape, generator=generator, device=weight.device))
        state.set_mask(name, mask)


def update_masks(state: MaskState, step: int, number: int, growth: Mapping[str, Tensor] | None) -> None:
    """Prune one weight and grow another in the groups of four whose smaller live weight is smallest.

    Args:
        state: the masks, which are changed.
        step: optimizer steps done.
        number: number of this update, counted from 1.
        growth: growth scores by parameter name; None for random growth.
    """
    fraction = 0.0 if state.config.growth == "none" else prune_fraction(state.config, step)
    for name, parameter in state.parameters.items():
        weights, real = group_view(parameter.detach().abs())
        live, _ = group_view(state.masks[name])
        if growth is None:
            generator = generator_for(parameter.device, state.config.seed, number, name)
            ranking = torch.rand(weights.shape, generator=generator, device=weights.device)
        else:
            ranking, _ = group_view(growth[name].detach().abs())
        free = real & ~live
        movable = live.any(1) & free.any(1)
        lost, removed = weights.masked_fill(~live, torch.inf).min(1)
        grown = ranking.masked_fill(~free, -torch.inf).argmax(1)
        moved = min(math.floor(fraction * int(live.sum())), int(movable.sum()))
        rows = smallest(lost, moved, movable).nonzero().squeeze(1)
        new = live.clone()
        new[rows, removed[rows]] = False
        new[rows, grown[rows]] = True
        state.masks[name].copy_(ungroup(new, parameter.shape))


def reason_against(weight: Tensor, from_weights: bool) -> str:
    """Return why a weight cannot have a 2:4 mask, or "" if it can.

    Args:
        weight: weight of a layer.
        from_weights: whether its zeros become its mask, so that they must be 2:4.
    """
    if weight.dim() not in (2, 4):
        return f"has {weight.dim()} dimensions, and 2:4 masks are for matrices and two-dimensional kernels"
    if weight.shape[1] < 4:
        return f"has {weight.shape[1]} input channels per group, too few for two of four"
    if not from_weights:
        return ""
    groups, _ = group_view(weight.detach() != 0)
    return "is not 2:4 now" if bool((groups.sum(1) > 2).any()) else ""
