"""Batch norm in training in native code, forward and backward."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from widekernel.ops.cpu import library as native


class Statistics(NamedTuple):
    """The statistics of every channel, (C,) each.

    Attributes:
        mean: the mean.
        variance: the variance, with the number of pixels as divisor.
        factor: 1 / sqrt(variance + eps).
    """

    mean: Tensor
    variance: Tensor
    factor: Tensor


def layout_of(x: Tensor) -> torch.memory_format | None:
    """Return the layout of a map (N, C, H, W) without gaps in memory; None if there are gaps or the order is another."""
    for layout in (torch.contiguous_format, torch.channels_last):
        if x.is_contiguous(memory_format=layout):
            return layout
    return None


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Statistics]:
    """Normalize every channel over all images and pixels: (x - mean) / sqrt(variance + eps) · weight + bias.

    Args:
        x: (N, C, H, W), not empty, float32 on a CPU, in one of the layouts of `layout_of`.
        weight: (C,), contiguous float32, or None for 1.
        bias: (C,), contiguous float32, or None for 0.
        eps: added to the variance.

    Returns:
        the result, in the layout of `x`, and the statistics.
    """
    y = torch.empty_like(x)
    found = Statistics(*x.new_empty(3, x.shape[1]))
    factors = [None if values is None else values.data_ptr() for values in (weight, bias)]
    _run(x, [x, None, y], factors, eps, [values.data_ptr() for values in found], [None, None])
    return y, found


def batch_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, found: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `batch_norm`.

    Args:
        grad: gradient of the result, in the layout of `x`.
        x: the map that was normalized.
        weight: (C,) or None.
        found: the statistics that `batch_norm` returned.

    Returns:
        the gradients of `x`, weight and bias.
    """
    for_x = torch.empty_like(x)
    for_weight, for_bias = x.new_empty(2, x.shape[1])
    sums = [for_weight.data_ptr(), for_bias.data_ptr()]
    statistics = [values.data_ptr() for values in found]
    _run(x, [x, grad, for_x], [None if weight is None else weight.data_ptr(), None], 0.0, statistics, sums, backward=True)
    return for_x, for_weight, for_bias


def _run(
    x: Tensor,
    maps: list[Tensor | None],
    factors: list[int | None],
    eps: float,
    statistics: list[int],
    sums: Sequence[int | None],
    backward: bool = False,
) -> None:
    loaded = native.load()
    images, channels, height, width = x.shape
    # Not those of the tensor: the strides of dimensions of size 1 are arbitrary.
    strides = channels * height * width, height * width, width, 1
    if layout_of(x) is torch.channels_last:
        strides = channels * height * width, 1, width * channels, channels
    tensors = [native.Tensor(None if part is None else part.data_ptr(), *strides) for part in maps]
    sizes = torch.get_num_threads(), images, channels, height, width, backward
    call = native.BatchNorm(*sizes, *tensors, *factors, eps, *statistics, *sums)
    loaded.check(loaded.calls.wk_batch_norm_run(ctypes.byref(call)))
