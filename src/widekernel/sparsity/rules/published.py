"""What the code of SLaK and Shift-wise does, for those who want their masks: see `published_slak` for the differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from widekernel.sparsity.allocation import erk_densities, strictly_above
from widekernel.sparsity.blocks import Group
from widekernel.sparsity.criteria import generator_for, largest, smallest
from widekernel.sparsity.schedules import prune_fraction
from widekernel.sparsity.state import MaskState

DENSE_FROM = 0.99  # layers drawn at least this dense lose their mask


def allocate(state: MaskState, scores: Mapping[str, Tensor] | None) -> None:
    """Set the densities of all parameters; those of SNIP count what is strictly above the threshold.

    Tiles and single weights have thresholds of their own.
    """
    config, density = state.config, 1 - state.config.sparsity
    if config.init in ("snip", "snip_mask"):
        assert scores is not None
        for kind in ("element", "block"):
            groups = [group for group in state.groups if group.blocks[0].kind == kind]
            ranked = {group.names[0]: block_scores(state, group, scores) for group in groups}
            found = strictly_above(ranked, density) if groups else {}
            for group in groups:
                state.densities.update(dict.fromkeys(group.names, found[group.names[0]]))
    elif config.init == "erk":
        state.densities = erk_densities({name: tuple(p.shape) for name, p in state.parameters.items()}, density)
    else:
        state.densities = dict.fromkeys(state.parameters, density)


def block_scores(state: MaskState, group: Group, scores: Mapping[str, Tensor]) -> Tensor:
    """Give the mean score of every block of every parameter of a group: (parameters, blocks)."""
    sums = zip(state.sums(group, scores), group.blocks)
    return torch.stack([total / blocks.sizes().to(total) for total, blocks in sums])


def draw(state: MaskState, scores: Mapping[str, Tensor] | None) -> None:
    """Draw every block with the probability of its layer's density; parameters that come out dense are given up."""
    for group in state.groups:
        alive = state.alive(group)
        if state.config.init == "from_weights":
            live = [blocks.alive(state.parameters[n].detach() != 0) for n, blocks in zip(group.names, group.blocks)]
        else:
            device = alive[0].device
            generator = generator_for(device, state.config.seed, 0, group.names[0])
            drawn = torch.rand(group.count, generator=generator, device=device) < state.densities[group.names[0]]
            live = [drawn] * len(alive)
        state.set_alive(group, live)


def almost_dense(state: MaskState) -> list[str]:
    """Name the parameters whose drawn density is so high that the published code gives up their masks."""
    return [name for name, mask in state.masks.items() if mask.float().mean().item() >= DENSE_FROM]


def update(state: MaskState, step: int, number: int, growth: Mapping[str, Tensor] | None) -> bool:
    """Prune all layers, then grow all layers; a weight that is removed and grows again keeps its value."""
    rate, config = prune_fraction(state.config, step), state.config
    removed: dict[str, int] = {}
    parts: list[Group] = []
    for group in state.groups:
        aligned = len(group.names) == 1 or number % config.share_every == 0
        parts += [group] if aligned else [Group((name,), (b,)) for name, b in zip(group.names, group.blocks)]
    for part in parts:
        scores = state.sums(part, state.parameters)
        alive, removed[part.names[0]] = prune(scores, state.alive(part), rate)
        state.set_alive(part, [alive] * len(part.names))
    for part in parts:
        (alive, *_), count = state.alive(part), removed[part.names[0]]
        if growth is None:
            generator = generator_for(alive.device, config.seed, number, part.names[0])
            alive = grow_where(alive, count, torch.rand(alive.shape, generator=generator, device=alive.device))
        else:
            total: Tensor = sum(state.sums(part, growth))  # type: ignore[assignment]
            alive = alive | largest(total, min(count, int((~alive).sum())), ~alive)
        state.set_alive(part, [alive] * len(part.names))
    return True


def prune(scores: Sequence[Tensor], alive: Sequence[Tensor], rate: float) -> tuple[Tensor, int]:
    """Remove the smallest blocks of parameters that share a mask.

    Args:
        scores: sum of |weight| of each block, (blocks,) for each parameter.
        alive: the masks so far, likewise; the first one counts.
        rate: share of the live blocks to remove, rounded up.

    Returns:
        The new mask and how many blocks were to be removed. Dead blocks are ranked along with live ones.
    """
    total: Tensor = sum(scores)  # type: ignore[assignment]
    living = int(alive[0].sum())
    count = math.ceil(rate * living)
    if count == 0:
        return total != 0, 0
    everything = torch.ones_like(alive[0])
    return ~smallest(total, min(total.numel() - living + count, total.numel()), everything), count


def grow_where(alive: Tensor, count: int, uniform: Tensor) -> Tensor:
    """Let dead blocks grow with the probability count / dead blocks, given uniform random numbers of `alive`'s shape."""
    dead = int((~alive).sum())
    return alive | (~alive & (uniform < count / dead)) if dead else alive


@torch.no_grad()
def mask_momentum(optimizer: Optimizer, state: MaskState) -> None:
    """Set SGD's momentum to zero outside the masks; the moments of other optimizers run on, as in the published code."""
    for name, parameter in state.parameters.items():
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            buffer.mul_(state.masks[name])


def momentum_scores(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    """Give Adam's m / (√v + 1e-8), or the momentum buffer of SGD; None before the first step or for other optimizers."""
    found = optimizer.state.get(parameter, {})
    if "exp_avg" in found:
        return found["exp_avg"] / (found["exp_avg_sq"].sqrt() + 1e-8)
    return found.get("momentum_buffer")
