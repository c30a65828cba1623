"""What a network remembers about its 2:4 layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from widekernel.sparsity.semi_structured.grouping import Axis


@dataclass(frozen=True)
class MaskedWeight:
    """Layout and choices of one 2:4 weight.

    Attributes:
        axis: which weights form a group, see `group_view`.
        groups: of the convolution.
        choices: (G,) uint8.
    """

    axis: Axis
    groups: int
    choices: Tensor


@dataclass(frozen=True)
class Manifest:
    """The 2:4 weights of a plain network, by parameter name; a converted or loaded network carries it.

    Attributes:
        weights: what is known of each.
        dense: layers that `convert` left in dense form though they are 2:4, with the reason.
    """

    weights: dict[str, MaskedWeight]
    dense: dict[str, str] = field(default_factory=dict)
