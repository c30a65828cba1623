"""Hidden units: how a block tells compaction which units can be removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class HiddenUnits:
    """The hidden units of a block: a layer writes them, an activation follows, and another layer reads them.

    Between the two layers nothing mixes the units or depends on how many there are. All names are those of submodules,
    with dots for nested ones.

    Attributes:
        first: linear layer or 1x1 convolution whose outputs are the units.
        activation: elementwise activation of the units.
        second: linear layer or 1x1 convolution whose inputs are the units.
        others: further submodules that see the units; a hook on one of them prevents the removal of units.
    """

    first: str
    activation: str
    second: str
    others: tuple[str, ...] = ()

    @property
    def seen_by(self) -> tuple[str, ...]:
        """Every submodule that sees the units."""
        return self.first, self.activation, self.second, *self.others


@runtime_checkable
class Compactable(Protocol):
    """A module from which `widekernel.sparsity.compact` may remove hidden units."""

    def hidden_units(self) -> HiddenUnits | None:
        """Return the hidden units, or None if the module, as configured, has none that can be removed."""
