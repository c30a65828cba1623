"""The definition of a depthwise convolution with strides, tap by tap in plain PyTorch: the oracle of tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel.ops.patch import Patch


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, patch: Patch, relu: bool = False) -> Tensor:
    """Compute a depthwise convolution, and perhaps the ReLU of it.

        y[n, c, i, j] = bias[c] + Σ weight[c, 0, u, v] · x[n, c, i · down + u - top, j · right + v - left]

    where (down, right) are the strides and (top, left) the padding. Taps beside the image are left out.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, kh, kw).
        bias: (C,), or None.
        patch: kernel, strides and padding.
        relu: whether to apply ReLU.

    Returns:
        (N, C, H', W'), where `patch.size(H, W)` is (H', W').
    """
    height, width = x.shape[2:]
    rows, columns = patch.size(height, width)
    y = x.new_zeros(*x.shape[:2], rows, columns)
    if bias is not None:
        y += bias[:, None, None]
    for u in range(patch.kernel[0]):
        for v in range(patch.kernel[1]):
            at_row = torch.arange(rows) * patch.stride[0] + u - patch.padding[0]
            at_column = torch.arange(columns) * patch.stride[1] + v - patch.padding[1]
            i, j = (at_row >= 0) & (at_row < height), (at_column >= 0) & (at_column < width)
            pixels = x[:, :, at_row[i]][:, :, :, at_column[j]]
            places = torch.nonzero(i), torch.nonzero(j)[:, 0]
            y[:, :, places[0], places[1]] += weight[:, 0, u, v, None, None] * pixels
    return F.relu(y) if relu else y
