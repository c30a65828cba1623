"""Two of every four consecutive input channels: masks that move within their groups of four."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from widekernel.errors import ArgumentError
from widekernel.sparsity.criteria import generator_for, smallest
from widekernel.sparsity.schedules import prune_fraction
from widekernel.sparsity.state import MaskState


def quarters(weight: Tensor) -> Tensor:
    """Give a weight (out, in, ...) as (groups, 4): four consecutive input channels of one tap and output channel."""
    return weight.movedim(1, -1).reshape(-1, 4)


def from_quarters(groups: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Give back the weight of `shape` (out, in, ...)."""
    return groups.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def draw(state: MaskState, scores: Mapping[str, Tensor] | None) -> None:
    """Set the first masks: the two largest scores of four, two at random, or what is not zero.

    Raises:
        ArgumentError: `init` is from_weights and more than two of four weights are not zero.
    """
    for name, parameter in state.parameters.items():
        generator = generator_for(parameter.device, state.config.seed, 0, name)
        if state.config.init == "from_weights":
            ranking = quarters((parameter.detach() != 0).float())
            too_many = int((ranking.sum(1) > 2).sum())
            if too_many:
                raise ArgumentError(
                    f"{too_many} of {len(ranking)} groups of four in {name} have more than two weights that are not zero: "
                    "use init='magnitude'"
                )
        elif scores is not None and state.config.init in ("snip_mask", "magnitude"):
            ranking = quarters(scores[name])
        else:
            size = parameter.numel() // 4, 4
            ranking = torch.rand(size, generator=generator, device=parameter.device)
        _set(state, name, _two_largest(ranking))


def update(state: MaskState, step: int, number: int, growth: Mapping[str, Tensor] | None) -> None:
    """Exchange one weight of a group for another one, in the groups whose smaller live weight is smallest."""
    for name, parameter in state.parameters.items():
        alive, weights = quarters(state.masks[name]), quarters(parameter.detach().abs())
        if growth is None:
            generator = generator_for(parameter.device, state.config.seed, number, name)
            ranking = torch.rand(weights.shape, generator=generator, device=weights.device)
        else:
            ranking = quarters(growth[name].abs())
        lost, removed = weights.masked_fill(~alive, torch.inf).min(1)
        grown = ranking.masked_fill(alive, -torch.inf).argmax(1)
        moved = 0 if state.config.growth == "none" else math.floor(prune_fraction(state.config, step) * alive.sum().item())
        moved = min(moved, len(lost))
        rows = smallest(lost, moved, torch.ones_like(lost, dtype=torch.bool)).nonzero().squeeze(1)
        new = alive.clone()
        new[rows, removed[rows]] = False
        new[rows, grown[rows]] = True
        _set(state, name, new)


def reason_against(shape: tuple[int, ...]) -> str:
    """Say why a weight of `shape` has no groups of four, "" if it has."""
    if shape[1] % 4:
        return f"has {shape[1]} input channels a group, no multiple of four"
    return ""


def _two_largest(ranking: Tensor) -> Tensor:
    alive = torch.zeros_like(ranking, dtype=torch.bool)
    return alive.scatter_(1, torch.sort(ranking, dim=1, descending=True, stable=True).indices[:, :2], True)


def _set(state: MaskState, name: str, alive: Tensor) -> None:
    state.masks[name].copy_(from_quarters(alive, tuple(state.parameters[name].shape)))
