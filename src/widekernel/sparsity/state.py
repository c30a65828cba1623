"""The masks of a network and what else an update needs to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from widekernel.sparsity.blocks import Group
from widekernel.sparsity.config import DynamicSparsityConfig


@dataclass
class MaskState:
    """Masks and the parameters that they belong to.

    Attributes:
        config: the settings.
        parameters: masked parameters by name.
        groups: their blocks, and which belong together.
        masks: bool tensors of the parameters' shapes, changed in place only.
        densities: share of each that is to be kept in the end.
        fresh: what the last update let grow and no step has trained yet.
    """

    config: DynamicSparsityConfig
    parameters: dict[str, nn.Parameter]
    groups: list[Group]
    masks: dict[str, Tensor] = field(default_factory=dict)
    densities: dict[str, float] = field(default_factory=dict)
    fresh: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, parameter in self.parameters.items():
            # In the weight's own memory order, in which the two are multiplied at every step.
            self.masks[name] = torch.ones_like(parameter, dtype=torch.bool, requires_grad=False)
        self.densities = dict.fromkeys(self.parameters, 1.0)

    def alive(self, group: Group) -> list[Tensor]:
        """Say which blocks of each parameter of a group live."""
        return [blocks.alive(self.masks[name]) for name, blocks in zip(group.names, group.blocks)]

    def sums(self, group: Group, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Add up the magnitudes of `values` (by parameter name) within each block."""
        return [blocks.sums(values[name].detach().abs()) for name, blocks in zip(group.names, group.blocks)]

    def ranking(self, group: Group, values: Mapping[str, Tensor]) -> Tensor:
        """Give the magnitude by which the blocks of a group are ranked: the sum over all its parameters.

        Tiles at the edge of a window may be smaller than the others and are ranked by the mean.
        """
        total = torch.stack(self.sums(group, values)).sum(0) if len(group.names) > 1 else self.sums(group, values)[0]
        if group.blocks[0].tile is None:
            return total
        sizes = torch.stack([blocks.sizes() for blocks in group.blocks]).sum(0)
        return total / sizes.to(total)

    def set_alive(self, group: Group, alive: Sequence[Tensor]) -> None:
        """Let exactly these blocks of each parameter of a group live."""
        for name, blocks, live in zip(group.names, group.blocks, alive):
            self.masks[name].copy_(blocks.expand(live))

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Set all weights outside the masks to zero."""
        for name, parameter in self.parameters.items():
            parameter.mul_(self.masks[name])


@dataclass(frozen=True)
class Churn:
    """What one update did, over all layers.

    Attributes:
        step: optimizer steps done when it happened.
        removed: weights removed.
        grown: weights grown.
        active: live weights after it.
    """

    step: int
    removed: int
    grown: int
    active: int
