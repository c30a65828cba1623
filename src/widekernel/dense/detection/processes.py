"""How a detector takes means over the processes that train it together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

MeanOverProcesses: TypeAlias = Callable[[Tensor], Tensor]


def alone(value: Tensor) -> Tensor:
    """Return the mean of a value over processes if there is only one: the value."""
    return value
