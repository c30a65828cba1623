"""What a network remembers about its 2:4 layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from widekernel.sparsity.semi_structured.grouping import Axis

ATTRIBUTE = "_widekernel_two_four"


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


def remember(model: nn.Module, record: object) -> None:
    """Let a network carry its controller or manifest; outside of the state dict, but copied along with the network."""
    model.__dict__[ATTRIBUTE] = record


def forget(model: nn.Module) -> None:
    """Remove what `remember` left."""
    model.__dict__.pop(ATTRIBUTE, None)


def recall(model: nn.Module) -> object | None:
    """Give what `remember` left, or None."""
    return model.__dict__.get(ATTRIBUTE)
