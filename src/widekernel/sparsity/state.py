"""The masks of a network and what else an update needs to know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
            self.masks[name] = _ones_like(parameter)
        self.densities = dict.fromkeys(self.parameters, 1.0)
        self._chosen, self._all_groups = dict(self.parameters), self.groups

    @property
    def chosen(self) -> dict[str, nn.Parameter]:
        """The parameters that were chosen to be masked, with those whose masks were given up."""
        return dict(self._chosen)

    def give_up(self, names: Iterable[str]) -> set[str]:
        """Mask all parameters that were chosen but these; name those that have no mask now.

        Parameters that share a mask are given up together only. What had no mask before starts from one that lets all live.
        """
        names = set(names)
        self.groups = [group for group in self._all_groups if not set(group.names) <= names]
        masked = {name for group in self.groups for name in group.names}
        for name, parameter in self._chosen.items():  # in the network's order
            mask = self.masks.pop(name, None)
            self.parameters.pop(name, None)
            if name in masked:
                fresh = mask is None or name in names
                self.masks[name] = _ones_like(parameter) if fresh else mask  # type: ignore[assignment]
                self.parameters[name] = parameter
        self.densities = {name: self.densities.get(name, 1.0) for name in self.parameters}
        return set(self._chosen) - masked

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

    def follow(self) -> None:
        """Move masks to where their parameters are by now."""
        for name, parameter in self.parameters.items():
            for held in (self.masks, self.fresh):
                if name in held and held[name].device != parameter.device:
                    held[name] = torch.empty_like(parameter, dtype=torch.bool, requires_grad=False).copy_(held[name])

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Set all weights outside the masks to zero."""
        for name, parameter in self.parameters.items():
            parameter.mul_(self.masks[name])


def _ones_like(parameter: Tensor) -> Tensor:
    """Let all weights live, in their own memory order, in which the two are multiplied at every step."""
    return torch.ones_like(parameter, dtype=torch.bool, requires_grad=False)


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
