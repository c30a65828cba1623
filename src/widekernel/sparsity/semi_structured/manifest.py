"""Record of its 2:4 layers that a network carries."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from widekernel.sparsity.semi_structured.grouping import Axis


@dataclass(frozen=True)
class MaskedWeight:
    """Grouping and choices of one 2:4 weight.

    Attributes:
        axis: which weights form a group, see `group_view`.
        groups: number of groups of the convolution.
        choices: (G,) uint8.
    """

    axis: Axis
    groups: int
    choices: Tensor


@dataclass(frozen=True)
class Manifest:
    """The 2:4 weights of a plain network; a converted or loaded network carries it.

    Attributes:
        weights: grouping and choices by parameter name.
        dense: weights that `convert` left in dense form although they are 2:4, each with the reason.
    """

    weights: dict[str, MaskedWeight]
    dense: dict[str, str] = field(default_factory=dict)
