"""One topology update: moving the masks, and the weights that this removed and grew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from widekernel.sparsity.dynamic.state import MaskState


class Rule(Protocol):
    """Interface of a rule that draws and moves masks; the modules in `rules` implement it."""

    def allocate_densities(self, state: MaskState, scores: Mapping[str, Tensor] | None) -> None:
        """Set the final density of every parameter."""

    def draw_masks(self, state: MaskState, scores: Mapping[str, Tensor] | None) -> None:
        """Set the first masks."""

    def update_masks(self, state: MaskState, step: int, number: int, growth: Mapping[str, Tensor] | None) -> bool:
        """Move the masks; return False if nothing was changed because a score is not finite."""


@dataclass(frozen=True)
class TopologyChange:
    """The weights that a topology update moved.

    Attributes:
        survivors: parameter name -> bool tensor, weights that were live before and are live now.
        new: parameter name -> bool tensor, weights that have grown.
        removed: number of weights removed.
    """

    survivors: dict[str, Tensor]
    new: dict[str, Tensor]
    removed: int


def move_masks(state: MaskState, rule: Rule, step: int, growth: Mapping[str, Tensor] | None) -> TopologyChange | None:
    """Move the masks and set removed weights to zero.

    Args:
        state: the masks.
        rule: the rule that moves them.
        step: optimizer steps done.
        growth: growth scores by parameter name; None for random growth.

    Returns:
        the change; None if nothing moved because a score is not finite.
    """
    former = {name: mask.clone() for name, mask in state.masks.items()}
    # The published code counts intervals, so a skipped update has a number too.
    number = step // state.config.update_interval
    if not rule.update_masks(state, step, number, growth):
        return None
    for name, parameter in state.parameters.items():
        if not parameter.requires_grad:  # frozen after the masks were drawn: stays as it is
            state.masks[name].copy_(former[name])
    state.mask_weights()
    survivors = {name: former[name] & mask for name, mask in state.masks.items()}
    new = {name: mask & ~former[name] for name, mask in state.masks.items()}
    removed = sum(int((former[name] & ~mask).sum()) for name, mask in state.masks.items())
    return TopologyChange(survivors, new, removed)
