"""Networks inside larger ones, such as the backbone of a segmentation network, and the layouts of the larger ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

from torch import nn

from widekernel.models.layouts.layout import Expected, Layout, Rule, State, Upgrade

ValueT = TypeVar("ValueT")
# Our names and the authors' of a network inside larger ones.
_AROUND = re.compile(r"^(backbone\.)?(body\.)?")


@dataclass(frozen=True)
class Nesting:
    """The place of a network inside a larger one, under our names and under those of the authors' files.

    Attributes:
        body: the inner network, which may have layouts of its own; for a network that contains no other, the network itself.
        native: prefix of its keys in our layout.
        official: prefix of its keys in the authors' files of the larger network.
        others: rules for the larger network's other keys.
        optional: prefixes of our keys that are missing together in files of the inner network alone.
        removed: prefixes of keys, under our names, that belong to parts that the larger network leaves out.
    """

    body: nn.Module
    native: str = ""
    official: str = ""
    others: tuple[Rule, ...] = ()
    optional: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def local(self, key: str) -> str:
        """Return one of our keys without the prefix of the inner network."""
        return key.removeprefix(self.native)

    def layout(self, inner: Layout) -> Layout:
        """Return the layout of the larger network from a layout of the inner one."""
        rules = (
            replace(rule, official=f"{self.official}{rule.official}", native=f"{self.native}{rule.native}")
            for rule in inner.rules
        )
        # Other parts of the backbone, such as the norms of its maps, are defined after its stages.
        parts = (
            rule.official.removeprefix(self.official) for rule in self.others if rule.official.startswith(self.official)
        )
        order = (*inner.part_order, *(part.split(".")[0] for part in parts)) if inner.part_order else ()
        return replace(
            inner,
            rules=(*self.others, *rules),
            part_order=order,
            ordered=self.official,
            upgrade=None if inner.upgrade is None else self._upgrade(inner),
        )

    def _upgrade(self, inner: Layout) -> Upgrade:
        def upgrade(state: State, expected: Expected) -> tuple[State, str]:
            assert inner.upgrade is not None
            inside = Expected(self._inside(expected.shapes), self._inside(expected.eps))
            upgraded, note = inner.upgrade(self._inside(state), inside)
            outside = {key: value for key, value in state.items() if not key.startswith(self.official)}
            return {**{f"{self.official}{key}": value for key, value in upgraded.items()}, **outside}, note

        return upgrade

    def _inside(self, values: Mapping[str, ValueT]) -> dict[str, ValueT]:
        prefix = self.official
        return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


@runtime_checkable
class Nested(Protocol):
    """A module that says which network of ours it contains."""

    def nesting(self) -> Nesting:
        """Return where that network is."""


def nesting_of(network: nn.Module) -> Nesting:
    """Return which network of ours is inside a network, and where.

    It is the network itself, unless the network says otherwise, or its child `backbone` does: its other children are then
    heads, whose keys are those of the authors' files.
    """
    if isinstance(network, Nested):
        return network.nesting()
    backbone = network._modules.get("backbone")
    if not isinstance(backbone, Nested):
        return Nesting(network)
    inner = backbone.nesting()
    prefix = "backbone."
    others = [replace(rule, official=f"{prefix}{rule.official}", native=f"{prefix}{rule.native}") for rule in inner.others]
    heads = (name for name in network._modules if name != "backbone")
    others += [Rule(f"{name}.{{rest}}", f"{name}.{{rest}}") for name in heads]
    removed = tuple(f"{prefix}{part}" for part in inner.removed)
    return Nesting(inner.body, f"{prefix}{inner.native}", f"{prefix}{inner.official}", tuple(others), removed=removed)


def innermost(key: str) -> str:
    """Return a key without the prefixes that a network has inside larger ones."""
    return _AROUND.sub("", key, count=1)
