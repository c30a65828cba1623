"""Checkpoint layouts: ordered tables that map official key names to ours and back."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

from torch import Tensor

State = dict[str, Tensor]

# PyTorch's order within a layer.
_TENSOR_ORDER = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Rule:
    """A pair of key templates; `{i}`, `{j}` and `{k}` match numbers, `{rest}` matches anything.

    Attributes:
        official: template of the key in the authors' checkpoint.
        native: template of the key in ours.
        official_dims: number of axes in the authors' checkpoint, for vectors that have further axes of length 1 there.
        channels_first: whether these axes come after that of the vector, not before it.
    """

    official: str
    native: str
    official_dims: int | None = None
    channels_first: bool = False

    def to_native(self, value: Tensor) -> Tensor:
        """Remove the further axes of length 1 from an official tensor."""
        return value.flatten() if self.official_dims else value

    def to_official(self, value: Tensor) -> Tensor:
        """Restore the further axes of length 1."""
        if not self.official_dims:
            return value
        ones = [1] * (self.official_dims - 1)
        return value.view(-1, *ones) if self.channels_first else value.view(*ones, -1)


@dataclass(frozen=True)
class Expected:
    """The requirements of a network on a state dict in an official layout.

    Attributes:
        shapes: official key -> shape of the tensor.
        eps: official name of a batch norm -> its `eps`, which is added to the variance.
    """

    shapes: Mapping[str, tuple[int, ...]]
    eps: Mapping[str, float]


Upgrade = Callable[[State, Expected], tuple[State, str]]


@dataclass(frozen=True)
class Layout:
    """The names of a network's weights in the authors' code.

    Attributes:
        family: name of the official network, as in the `Signature` that recognizes it.
        rules: key templates, tried in order in both directions.
        part_order: names of the parts of the authors' modules in the order of their definition, which is that of the keys
            in their files: official conversion scripts pair weights by position. If empty, the order is that of our keys.
        generated: patterns of our keys that official files lack, because the authors' code generates these tensors.
        upgrade: converts other official forms (merged kernels, strips to be cut into tiles) to the one that the rules
            describe, given what the network expects; returns a note on what it did, or "".
        ordered: prefix of the official keys that `part_order` is for; the other keys follow in our order.
        folded: whether the rules are for our folded form.
    """

    family: str
    rules: tuple[Rule, ...]
    part_order: tuple[str, ...] = ()
    generated: tuple[str, ...] = ()
    upgrade: Upgrade | None = field(default=None, compare=False)
    ordered: str = ""
    folded: bool = False

    def to_native(self, official: str) -> tuple[str, Rule] | None:
        """Return our key for an official key, with the rule that maps it; None if no rule does."""
        for rule in self.rules:
            match = _pattern(rule.official).fullmatch(official)
            if match:
                return rule.native.format(**match.groupdict()), rule
        return None

    def to_official(self, native: str) -> tuple[str, Rule] | None:
        """Return the official key for one of ours, with the rule that maps it; None if no rule does."""
        for rule in self.rules:
            match = _pattern(rule.native).fullmatch(native)
            if match:
                return rule.official.format(**match.groupdict()), rule
        return None

    def is_generated(self, native: str) -> bool:
        """Return whether official files lack our key because the authors' code generates the tensor."""
        return any(re.search(pattern, native) for pattern in self.generated)

    def position(self, official: str) -> tuple[int, ...]:
        """Return the sort key that puts an official key at its position in the authors' files."""
        if not official.startswith(self.ordered):
            return (sys.maxsize,)
        order = (*self.part_order, *_TENSOR_ORDER)
        return tuple(
            int(part) if part.isdigit() else order.index(part) if part in order else -1 for part in official.split(".")
        )


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    out = ""
    for i, part in enumerate(parts):
        if i % 2 == 0:
            out += re.escape(part)
        else:
            out += f"(?P<{part}>.+)" if part == "rest" else rf"(?P<{part}>\d+)"
    return re.compile(out)
