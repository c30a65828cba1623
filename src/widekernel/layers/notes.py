"""A note about the positions of a network's weights, which the network carries outside its state dict.

Code that moves weights, such as compaction, removes the note, because the note no longer describes the network.
"""

from __future__ import annotations

from torch import nn

_ATTRIBUTE = "_widekernel_two_four"


def remember(model: nn.Module, note: object) -> None:
    """Attach `note` to `model`; copies of the network keep it."""
    model.__dict__[_ATTRIBUTE] = note


def forget(model: nn.Module) -> None:
    """Remove the note of `model`, if there is one."""
    model.__dict__.pop(_ATTRIBUTE, None)


def recall(model: nn.Module) -> object | None:
    """Return the note of `model`, or None."""
    return model.__dict__.get(_ATTRIBUTE)
