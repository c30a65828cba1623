"""The operators computed by PyTorch's own convolutions, called only in forms that are not pathologically slow.

Measured on a CPU (2 cores, AVX-512), a contiguous depthwise convolution slows down with the *width* of the kernel: 31x31 and
5x51 run at a twentieth of their channels_last speed, while 51x5 is not slower. PyTorch's own weight gradient is up to a
hundred times slower than the forward pass. So wide kernels run channels_last, and the weight gradient is a forward depthwise
convolution of N*C channels with the gradient as the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel.ops.problem import Anchor, Dilations, memory_format, touching
from widekernel.ops.reference import epilogue

NAME = "portable"
"""The name of the backend that runs these functions."""

# Kernels (or, in the weight gradient, outputs) wider than this run faster in channels_last on a CPU.
WIDEST_CONTIGUOUS_KERNEL = 8


def depthwise_sum(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[Anchor],
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = False,
    dilations: Dilations = (),
) -> Tensor:
    """Compute `reference.depthwise_sum`, each rectangle as a grouped convolution."""
    dilations = dilations or (1,) * len(kernels)
    if scale is None:  # the first convolution adds the bias
        return epilogue(_sum(x, kernels, anchors, bias, dilations), None, None, relu)
    return epilogue(_sum(x, kernels, anchors, None, dilations), scale, bias, relu)


def _sum(
    x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], bias: Tensor | None, dilations: Dilations
) -> Tensor:
    layout = memory_format(x)
    if x.numel() == 0:
        return torch.zeros_like(x, memory_format=layout)
    if x.device.type == "cpu" and any(kernel.shape[3] > WIDEST_CONTIGUOUS_KERNEL for kernel in kernels):
        x = x.contiguous(memory_format=torch.channels_last)
    y: Tensor | None = None
    for kernel, anchor, dilation in zip(kernels, anchors, dilations):
        part = _one_rectangle(x, kernel, anchor, dilation, bias if y is None else None)
        y = part if y is None else y.add_(part)
    assert y is not None
    return y.contiguous(memory_format=layout)


def depthwise_weight_grad(
    x: Tensor, grad: Tensor, kernel_size: tuple[int, int], anchor: Anchor, dilation: int = 1
) -> Tensor:
    """Compute `reference.depthwise_weight_grad` as a convolution of all channels of all images."""
    batch, channels, height, width = x.shape
    result = x.new_zeros(channels, 1, *kernel_size)
    if x.numel() == 0:
        return result
    rows = touching(kernel_size[0], anchor[0], height, dilation)
    columns = touching(kernel_size[1], anchor[1], width, dilation)
    planes = x.reshape(1, batch * channels, height, width)
    window = grad.reshape(batch * channels, 1, height, width)
    if _is_half_precision_on_cpu(x):
        # With kernels as large as an image, convolutions in half precision take minutes; float32 is also more accurate.
        planes, window = planes.float(), window.float()
    taps = columns.stop - columns.start
    if x.device.type == "cpu" and taps > WIDEST_CONTIGUOUS_KERNEL:
        planes = planes.contiguous(memory_format=torch.channels_last)
        window = window.contiguous(memory_format=torch.channels_last)
    row, column = anchor[0] - rows.start, anchor[1] - columns.start
    below, right = rows.stop - 1 - anchor[0], columns.stop - 1 - anchor[1]
    # The output of this convolution has one pixel per tap, so it has as many on each side of the anchor as there are taps.
    around = max(row, below), max(column, right)
    padding = around[0] * dilation, around[1] * dilation
    sums = F.conv2d(planes, window, padding=padding, stride=dilation, groups=batch * channels)
    sums = sums[..., around[0] - row :, around[1] - column :][..., : row + below + 1, : column + right + 1]
    result[:, 0, rows, columns] = sums.reshape(batch, channels, *sums.shape[-2:]).sum(0)
    return result


def _one_rectangle(x: Tensor, kernel: Tensor, anchor: Anchor, dilation: int, bias: Tensor | None) -> Tensor:
    height, width = x.shape[-2:]
    rows = touching(kernel.shape[2], anchor[0], height, dilation)
    columns = touching(kernel.shape[3], anchor[1], width, dilation)
    row, column = anchor[0] - rows.start, anchor[1] - columns.start
    kernel = kernel[:, :, rows, columns]
    above, below, left, right = row, kernel.shape[2] - 1 - row, column, kernel.shape[3] - 1 - column
    # conv2d pads both sides equally: pad by the larger amount and crop the surplus from the output.
    around = max(above, below), max(left, right)
    if _is_half_precision_on_cpu(x):
        # In half precision, outputs wider than inputs take minutes: make the kernel symmetric instead.
        kernel = F.pad(kernel, (around[1] - left, around[1] - right, around[0] - above, around[0] - below))
        row, column = around
    if x.device.type == "cpu":
        kernel = kernel.contiguous(memory_format=memory_format(x))
    padding = around[0] * dilation, around[1] * dilation
    y = F.conv2d(x, kernel, bias, padding=padding, dilation=dilation, groups=x.shape[1])
    top, left = (around[0] - row) * dilation, (around[1] - column) * dilation
    return y[..., top : top + height, left : left + width]


def _is_half_precision_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
