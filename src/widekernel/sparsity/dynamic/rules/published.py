"""Rule that reproduces the code of SLaK and Shift-wise convolution; `published_slak` lists the differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from widekernel.sparsity.dynamic.blocks import Group
from widekernel.sparsity.dynamic.densities import densities_above_threshold, erk_densities, uniform_densities
from widekernel.sparsity.dynamic.ranking import generator_for, largest, smallest
from widekernel.sparsity.dynamic.schedules import prune_fraction
from widekernel.sparsity.dynamic.state import MaskState

DENSE_FROM = 0.99  # layers drawn at least this dense lose their mask


def allocate_densities(state: MaskState, scores: Mapping[str, Tensor] | None) -> None:
    """Set the density of every parameter.

    SNIP's densities count the scores strictly above a threshold; tiles and single weights have separate thresholds.
    """
    config, density = state.config, 1 - state.config.sparsity
    shapes = {name: tuple(parameter.shape) for name, parameter in state.parameters.items()}
    if config.init in ("snip", "snip_mask"):
        assert scores is not None
        for kind in ("element", "block"):
            groups = state.groups_of_kind(kind)
            ranked = {group.names[0]: block_scores(state, group, scores) for group in groups}
            found = densities_above_threshold(ranked, density) if groups else {}
            for group in groups:
                state.densities.update(dict.fromkeys(group.names, found[group.names[0]]))
    elif config.init == "erk":
        state.densities = erk_densities(shapes, density)
    else:
        state.densities = uniform_densities(shapes, density)


def block_scores(state: MaskState, group: Group, scores: Mapping[str, Tensor]) -> Tensor:
    """Return the mean score of every block of every parameter of a group: (parameters, blocks)."""
    sums = zip(state.block_sums(group, scores), group.blocks)
    return torch.stack([total / blocks.sizes().to(total) for total, blocks in sums])


def draw_masks(state: MaskState, scores: Mapping[str, Tensor] | None) -> None:
    """Make every block live with a probability equal to its layer's density."""
    for group in state.groups:
        if state.config.init == "from_weights":
            live = state.nonzero_blocks(group)
        else:
            device = state.masks[group.names[0]].device
            generator = generator_for(device, state.config.seed, 0, group.names[0])
            drawn = torch.rand(group.count, generator=generator, device=device) < state.densities[group.names[0]]
            live = [drawn] * len(group.names)
        state.set_live_blocks(group, live)


def almost_dense(state: MaskState) -> list[str]:
    """Return the parameters whose drawn density is so high that the published code removes their masks."""
    return [name for name, mask in state.masks.items() if mask.float().mean().item() >= DENSE_FROM]


def update_masks(state: MaskState, step: int, number: int, growth: Mapping[str, Tensor] | None) -> bool:
    """Prune all layers, then grow all layers; a weight that is pruned and grows again keeps its value.

    Args:
        state: the masks, which are changed; the caller changes the weights.
        step: optimizer steps done.
        number: number of this update, counted from 1.
        growth: growth scores by parameter name; None for random growth.

    Returns:
        always True.
    """
    rate, config = prune_fraction(state.config, step), state.config
    removed: dict[str, int] = {}
    parts: list[Group] = []
    for group in state.groups:
        aligned = len(group.names) == 1 or number % config.share_every == 0
        parts += [group] if aligned else group.split()
    for part in parts:
        scores = state.block_sums(part, state.parameters)
        live, removed[part.names[0]] = prune(scores, state.live_blocks(part), rate)
        state.set_live_blocks(part, [live] * len(part.names))
    for part in parts:
        (live, *_), count = state.live_blocks(part), removed[part.names[0]]
        if growth is None:
            generator = generator_for(live.device, config.seed, number, part.names[0])
            live = grow_at_random(live, count, torch.rand(live.shape, generator=generator, device=live.device))
        else:
            total: Tensor = sum(state.block_sums(part, growth))  # type: ignore[assignment]
            live = live | largest(total, min(count, int((~live).sum())), ~live)
        state.set_live_blocks(part, [live] * len(part.names))
    return True


def prune(scores: Sequence[Tensor], live: Sequence[Tensor], rate: float) -> tuple[Tensor, int]:
    """Remove the smallest blocks of parameters that share a mask.

    Args:
        scores: sum of |weight| of each block, (blocks,) for each parameter.
        live: the current masks, in the same form; the first one counts.
        rate: share of the live blocks to remove, rounded up.

    Returns:
        the new mask, and the number of blocks to remove. Dead blocks are ranked together with live ones.
    """
    total: Tensor = sum(scores)  # type: ignore[assignment]
    living = int(live[0].sum())
    count = math.ceil(rate * living)
    if count == 0:
        return total != 0, 0
    everything = torch.ones_like(live[0])
    return ~smallest(total, min(total.numel() - living + count, total.numel()), everything), count


def grow_at_random(live: Tensor, count: int, uniform: Tensor) -> Tensor:
    """Grow each dead block with the probability count / dead blocks.

    Args:
        live: bool mask.
        count: blocks to grow, on average.
        uniform: random numbers from 0 to 1, of the mask's shape.
    """
    dead = int((~live).sum())
    return live | (~live & (uniform < count / dead)) if dead else live


@torch.no_grad()
def mask_momentum(optimizer: Optimizer, state: MaskState) -> None:
    """Set SGD's momentum to zero outside the masks; other moments continue there, as in the published code."""
    for name, parameter in state.parameters.items():
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            buffer.mul_(state.masks[name])


def momentum_scores(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    """Return Adam's m / (√v + 1e-8), or SGD's momentum buffer; None before the first step and for other optimizers."""
    found = optimizer.state.get(parameter, {})
    if "exp_avg" in found:
        return found["exp_avg"] / (found["exp_avg_sq"].sqrt() + 1e-8)
    return found.get("momentum_buffer")
