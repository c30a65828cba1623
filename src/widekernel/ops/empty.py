"""The operators for images without pixels, for which backends with their own kernels launch nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    Anchor,
    memory_format,
)


def _sum(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _branches(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> list[Tensor]:
    return [_sum(x) for _ in kernels]


def _sum_of_branches(xs: Sequence[Tensor], *others: Any) -> Tensor:
    return _sum(xs[0])


def _weight_grad(x: Tensor, grad: Tensor, kernel_size: tuple[int, int], anchor: Anchor) -> Tensor:
    return x.new_zeros(x.shape[1], 1, *kernel_size)


EMPTY: dict[str, Callable[..., Any]] = {
    DEPTHWISE_SUM: _sum,
    DEPTHWISE_WEIGHT_GRAD: _weight_grad,
    DEPTHWISE_BRANCHES: _branches,
    DEPTHWISE_SUM_OF_BRANCHES: _sum_of_branches,
}
"""For each operator, the function that returns its result."""
