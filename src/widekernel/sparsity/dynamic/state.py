"""Masks of a network, and the information about them that topology updates need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from widekernel.sparsity.dynamic.blocks import Group
from widekernel.sparsity.dynamic.config import DynamicSparsityConfig


@dataclass
class MaskState:
    """Masks and the parameters that they belong to.

    Attributes:
        config: the settings.
        parameters: masked parameters by name.
        groups: blocks of all parameters, grouped by those that belong together.
        masks: bool tensors of the parameters' shapes, changed in place only.
        densities: share of each parameter to keep in the end.
        fresh: weights that grew at the last update and that no step has trained yet.
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
        self._selected, self._all_groups = dict(self.parameters), self.groups

    @property
    def selected(self) -> dict[str, nn.Parameter]:
        """The parameters that were selected for masking, including those that were left dense."""
        return dict(self._selected)

    def active(self) -> int:
        """Return the number of live weights of all masked parameters."""
        return sum(self.live_counts().values())

    def live_counts(self) -> dict[str, int]:
        """Return the number of live weights of each masked parameter."""
        return {name: int(mask.sum()) for name, mask in self.masks.items()}

    def groups_of_kind(self, kind: str) -> list[Group]:
        """Return the groups whose blocks are single weights ("element") or larger ("block")."""
        return [group for group in self.groups if group.blocks[0].kind == kind]

    def set_mask(self, name: str, mask: Tensor) -> None:
        """Set the mask of a parameter, and its density to that of the mask."""
        self.masks[name].copy_(mask)
        self.densities[name] = mask.float().mean().item()

    def leave_dense(self, names: Iterable[str]) -> set[str]:
        """Mask all selected parameters except these, and return the names of those that have no mask now.

        Parameters that share a mask are left dense together or not at all. A parameter that had no mask before starts with
        a mask in which all weights are live.
        """
        names = set(names)
        self.groups = [group for group in self._all_groups if not set(group.names) <= names]
        masked = {name for group in self.groups for name in group.names}
        for name, parameter in self._selected.items():  # in the network's order
            mask = self.masks.pop(name, None)
            self.parameters.pop(name, None)
            if name in masked:
                all_live = mask is None or name in names
                self.masks[name] = _ones_like(parameter) if all_live else mask  # type: ignore[assignment]
                self.parameters[name] = parameter
        self.densities = {name: self.densities.get(name, 1.0) for name in self.parameters}
        return set(self._selected) - masked

    def live_blocks(self, group: Group) -> list[Tensor]:
        """Return which blocks of each parameter of a group are live."""
        return [blocks.live(self.masks[name]) for name, blocks in zip(group.names, group.blocks)]

    def set_live_blocks(self, group: Group, live: Sequence[Tensor]) -> None:
        """Make exactly these blocks of each parameter of a group live."""
        for name, blocks, each in zip(group.names, group.blocks, live):
            self.masks[name].copy_(blocks.expand(each))

    def nonzero_blocks(self, group: Group) -> list[Tensor]:
        """Return which blocks of each parameter of a group hold a weight that is not zero."""
        return [blocks.live(self.parameters[name].detach() != 0) for name, blocks in zip(group.names, group.blocks)]

    def block_sums(self, group: Group, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the sum of the magnitudes of `values` (by parameter name) within each block, for each parameter."""
        return [blocks.sums(values[name].detach().abs()) for name, blocks in zip(group.names, group.blocks)]

    def block_magnitudes(self, group: Group, values: Mapping[str, Tensor]) -> Tensor:
        """Return the magnitude by which the blocks of a group are ranked: the sum over all its parameters.

        Tiles at the edge of a window may be smaller than the others, so tiles are ranked by the mean.
        """
        sums = self.block_sums(group, values)
        total = torch.stack(sums).sum(0) if len(group.names) > 1 else sums[0]
        if group.blocks[0].tile is None:
            return total
        sizes = torch.stack([blocks.sizes() for blocks in group.blocks]).sum(0)
        return total / sizes.to(total)

    def follow_parameters(self) -> None:
        """Move the masks to the devices of their parameters."""
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
    """Return an all-live mask in the memory order of the parameter, which it is multiplied with at every step."""
    return torch.ones_like(parameter, dtype=torch.bool, requires_grad=False)
