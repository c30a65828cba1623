"""Default rule: exact counts; the smallest weights are pruned, as many grow, and all others stay zero."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from widekernel.sparsity.dynamic.blocks import Group
from widekernel.sparsity.dynamic.densities import erk_densities, uniform_densities, whole_counts
from widekernel.sparsity.dynamic.ranking import at_random, generator_for, largest, protected_by_fan_in, smallest
from widekernel.sparsity.dynamic.rules import semi_structured
from widekernel.sparsity.dynamic.schedules import prune_fraction, sparsity_at
from widekernel.sparsity.dynamic.state import MaskState
from widekernel.sparsity.semi_structured.config import SEMI_STRUCTURED

_SCORED = ("snip", "snip_mask", "magnitude")


def allocate_densities(state: MaskState, scores: Mapping[str, Tensor] | None) -> None:
    """Set the final density of every parameter.

    Args:
        state: the state whose `densities` are set.
        scores: nonnegative scores of the parameters' shapes, if `init` ranks weights.
    """
    config, density = state.config, 1 - state.config.sparsity
    shapes = {name: tuple(parameter.shape) for name, parameter in state.parameters.items()}
    if config.block == SEMI_STRUCTURED:
        return  # set with the masks, because incomplete groups of four keep more
    if config.init == "erk":
        state.densities = erk_densities(shapes, density)
    elif config.init in _SCORED:
        assert scores is not None
        for group, kept in zip(state.groups, _best_blocks(state, scores, density)):
            state.densities.update(dict.fromkeys(group.names, kept.sum().item() / group.count))
    elif config.init == "from_weights":
        for group in state.groups:
            for name, live in zip(group.names, state.nonzero_blocks(group)):
                state.densities[name] = live.sum().item() / group.count
    else:
        state.densities = uniform_densities(shapes, density)


def draw_masks(state: MaskState, scores: Mapping[str, Tensor] | None) -> None:
    """Set the first masks, as `init` says, with exactly as many live blocks as the densities ask for at step 0."""
    config = state.config
    if config.block == SEMI_STRUCTURED:
        semi_structured.draw_masks(state, scores)
        return
    if config.init == "from_weights":
        for group in state.groups:
            state.set_live_blocks(group, state.nonzero_blocks(group))
        return
    counts = target_counts(state, 0)
    for group in state.groups:
        count = counts[group.names[0]]
        everywhere = torch.ones(group.count, dtype=torch.bool, device=state.parameters[group.names[0]].device)
        if config.init in ("snip_mask", "magnitude"):
            assert scores is not None
            ranking = _mean_scores(state, group, scores)
        elif config.min_fan_in:
            generator = generator_for(everywhere.device, config.seed, 0, group.names[0])
            ranking = torch.rand(group.count, generator=generator, device=everywhere.device)
        else:
            generator = generator_for(everywhere.device, config.seed, 0, group.names[0])
            state.set_live_blocks(group, [at_random(count, everywhere, generator)] * len(group.names))
            continue
        ranking = _protect_fan_in(state, group, ranking, everywhere)
        state.set_live_blocks(group, [largest(ranking, count, everywhere)] * len(group.names))


def target_counts(state: MaskState, step: int) -> dict[str, int]:
    """Return the number of live blocks of each group, by its first name, after `step` optimizer steps."""
    config = state.config
    share = 1.0
    if config.initial_sparsity is not None and config.sparsity > 0:
        share = sparsity_at(config, step) / config.sparsity
    counts: dict[str, int] = {}
    for kind in ("element", "block"):
        groups = state.groups_of_kind(kind)
        sizes = {group.names[0]: group.count for group in groups}
        densities = {name: 1 - (1 - state.densities[name]) * share for name in sizes}
        least = {group.names[0]: min(group.count, _fewest(state, group)) for group in groups}
        counts.update(whole_counts(sizes, densities, least))
    return counts


def update_masks(state: MaskState, step: int, number: int, growth: Mapping[str, Tensor] | None) -> bool:
    """Prune the smallest weights, and grow as many others.

    Args:
        state: the masks, which are changed; the caller changes the weights.
        step: optimizer steps done.
        number: number of this update, counted from 1.
        growth: growth scores by parameter name; None for random growth.

    Returns:
        False if nothing was changed because a score is not finite.
    """
    ranked = [state.parameters] if growth is None else [state.parameters, growth]
    if not all(bool(torch.isfinite(values[name]).all()) for values in ranked for name in state.parameters):
        return False
    if state.config.block == SEMI_STRUCTURED:
        semi_structured.update_masks(state, step, number, growth)
        return True
    counts = target_counts(state, step)
    for group in state.groups:
        aligned = len(group.names) == 1 or group.always_shared or number % state.config.share_every == 0
        parts = [group] if aligned else group.split()
        for part in parts:
            _prune_and_grow(state, part, counts[group.names[0]], step, number, growth)
    return True


def _prune_and_grow(
    state: MaskState, group: Group, count: int, step: int, number: int, growth: Mapping[str, Tensor] | None
) -> None:
    """Update the masks of a group so that `count` blocks are live, including newly grown ones."""
    config = state.config
    score = state.block_magnitudes(group, state.parameters)
    # Tile sets that were ranked separately have separate masks; the shared mask is chosen among all of their blocks.
    live = torch.stack(state.live_blocks(group)).any(0)
    living = int(live.sum())
    moved = 0 if config.growth == "none" else math.floor(prune_fraction(config, step) * count)
    moved = min(moved, count - _fewest(state, group))
    if not config.regrow:
        moved = min(moved, group.count - living)
    kept = min(count - moved, living)
    survivors = live & ~smallest(_protect_fan_in(state, group, score, live), living - kept, live)
    free = ~survivors if config.regrow else ~live
    new = min(count - kept, int(free.sum()))
    if growth is None:
        grown = at_random(new, free, generator_for(free.device, config.seed, number, group.names[0]))
    else:
        grown = largest(state.block_magnitudes(group, growth), new, free)
    state.set_live_blocks(group, [survivors | grown] * len(group.names))


def _fewest(state: MaskState, group: Group) -> int:
    """Return the smallest number of blocks that have to stay live."""
    return group.blocks[0].shape[0] * _fan_in(state, group)


def _fan_in(state: MaskState, group: Group) -> int:
    """Return the smallest number of weights of each output channel that have to stay live."""
    return min(state.config.min_fan_in, math.prod(group.blocks[0].shape[1:]))


def _protect_fan_in(state: MaskState, group: Group, score: Tensor, live: Tensor) -> Tensor:
    if not state.config.min_fan_in:
        return score
    kept = protected_by_fan_in(score, live, group.blocks[0].shape, _fan_in(state, group))
    return score.masked_fill(kept, torch.inf)


def _mean_scores(state: MaskState, group: Group, scores: Mapping[str, Tensor]) -> Tensor:
    """Return the mean score of the weights of each block, over all parameters of the group."""
    total: Tensor = sum(state.block_sums(group, scores))  # type: ignore[assignment]
    if group.blocks[0].kind == "element" and len(group.names) == 1:
        return total
    sizes = sum(blocks.sizes() for blocks in group.blocks)
    return total / sizes.to(total)  # type: ignore[union-attr]


def _best_blocks(state: MaskState, scores: Mapping[str, Tensor], density: float) -> list[Tensor]:
    """Mark the blocks with the largest mean scores among all groups whose blocks are of the same kind."""
    ranked = [_mean_scores(state, group, scores) for group in state.groups]
    kept: dict[int, Tensor] = {}
    for kind in ("element", "block"):
        places = [place for place, group in enumerate(state.groups) if group.blocks[0].kind == kind]
        if places:
            flat = torch.cat([ranked[place].flatten() for place in places])
            best = largest(flat, round(flat.numel() * density), torch.ones_like(flat, dtype=torch.bool))
            kept.update(zip(places, best.split([ranked[place].numel() for place in places])))
    return [kept[place] for place in range(len(state.groups))]
