"""Packing of weights for native calls."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from widekernel.ops.pointwise_reference import ReferenceBlock


def missing() -> str | None:
    """Return why there are no native calls on this machine; None if there are."""
    return None


def pack(
    first: Tensor,
    first_bias: Tensor | None,
    activation: str,
    second: Tensor | None,
    second_bias: Tensor | None,
    norm_eps: float | None,
) -> Callable[..., Tensor]:
    """Pack the weights of a block; takes the arguments of `ReferenceBlock`, and the result computes the same."""
    return ReferenceBlock(first, first_bias, activation, second, second_bias, norm_eps)
