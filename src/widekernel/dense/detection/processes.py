"""How a detector takes means over the processes that train it together."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class MeanOverProcesses(Protocol):
    """Function that returns the mean of values over the processes that train together.

    The losses of each process are divided by such means, and their gradients averaged, which gives the quotients of the
    whole batch.
    """

    def __call__(self, values: Tensor, least: Tensor | float = 0.0) -> Tensor:
        """Return the mean, in a tensor of the shape of `values`.

        Args:
            values: counts or weights of this process, not negative
            least: the sum over all processes counts as this at least, so that a divisor is not 0. As a bound of the sum
                rather than of the mean, it does not depend on the number of processes.
        """


def alone(values: Tensor, least: Tensor | float = 0.0) -> Tensor:
    """Return the mean of values over processes if there is only one: the values, at least `least`."""
    return values.clamp(min=least)
