"""The operators built from PyTorch's convolutions alone, for graphs that other programs read.

TorchScript, recorded traces and decomposed exported programs consist of these functions. Such a graph loads without
widekernel, and counters, converters and other runtimes know every operation in it. Nothing depends on the size of the image.
TorchScript can compile all functions. PyTorch's own rules differentiate them: the forward pass is as fast as `torch_conv`,
the backward pass is slower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel.ops.jit_trace import static_shape
from widekernel.ops.problem import is_channels_last
from widekernel.ops.torch_conv import WIDEST_CONTIGUOUS_KERNEL


def depthwise_sum(
    x: Tensor,
    kernels: list[Tensor],
    anchors: list[tuple[int, int]],
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = False,
    dilations: list[int] | None = None,
) -> Tensor:
    """Compute `ops.depthwise_sum` of one or more rectangles; arguments are not checked."""
    image = _in_fast_layout(x, kernels)
    y = _convolve(image, kernels[0], anchors[0], bias if scale is None else None, 1 if dilations is None else dilations[0])
    for i in range(1, len(kernels)):
        y = y + _convolve(image, kernels[i], anchors[i], None, 1 if dilations is None else dilations[i])
    if scale is not None:
        y = y * scale.view(-1, 1, 1)
        if bias is not None:
            y = y + bias.view(-1, 1, 1)
    return _in_layout_of(y.relu() if relu else y, x)


def depthwise_branches(
    x: Tensor, kernels: list[Tensor], anchors: list[tuple[int, int]], dilations: list[int] | None = None
) -> list[Tensor]:
    """Compute `ops.depthwise_branches`; arguments are not checked."""
    image = _in_fast_layout(x, kernels)
    branches: list[Tensor] = []
    for i in range(len(kernels)):
        dilation = 1 if dilations is None else dilations[i]
        branches.append(_in_layout_of(_convolve(image, kernels[i], anchors[i], None, dilation), x))
    return branches


def depthwise_weight_grad(
    x: Tensor, grad: Tensor, kernel_size: tuple[int, int], anchor: tuple[int, int], dilation: int = 1
) -> Tensor:
    """Compute `ops.depthwise_weight_grad`; arguments are not checked.

    A recorded graph accepts only the batch size that it was recorded with.
    """
    batch, channels, height, width = x.shape
    padded = F.pad(x, _padding([kernel_size[0], kernel_size[1]], anchor, dilation))
    # Every channel of every image becomes a separate channel, with its gradient as the kernel, which moves from tap to tap.
    extent = [height + (kernel_size[0] - 1) * dilation, width + (kernel_size[1] - 1) * dilation]
    planes = padded.reshape(1, batch * channels, extent[0], extent[1])
    windows = grad.reshape(batch * channels, 1, height, width)
    sums = F.conv2d(planes, windows, stride=dilation, groups=batch * channels)
    return sums.reshape(batch, channels, kernel_size[0], kernel_size[1]).sum(0).unsqueeze(1)


def _convolve(x: Tensor, kernel: Tensor, anchor: tuple[int, int], bias: Tensor | None, dilation: int) -> Tensor:
    sizes = static_shape(kernel)
    left, right, above, below = _padding(sizes[2:], anchor, dilation)
    if left == right and above == below:
        return F.conv2d(x, kernel, bias, padding=[above, left], dilation=dilation, groups=sizes[0])
    return F.conv2d(F.pad(x, [left, right, above, below]), kernel, bias, dilation=dilation, groups=sizes[0])


def _padding(kernel_size: list[int], anchor: tuple[int, int], dilation: int) -> list[int]:
    """Return how far, in pixels, the kernel reaches to the left, to the right, above and below the output pixel."""
    row, column = anchor[0] * dilation, anchor[1] * dilation
    return [column, (kernel_size[1] - 1) * dilation - column, row, (kernel_size[0] - 1) * dilation - row]


def _in_fast_layout(x: Tensor, kernels: list[Tensor], limit: int = WIDEST_CONTIGUOUS_KERNEL) -> Tensor:
    """Return `x` in the layout in which convolutions with these kernels are not pathologically slow; see `torch_conv`."""
    widest = 0
    for kernel in kernels:
        widest = max(widest, static_shape(kernel)[3])
    if x.device.type == "cpu" and widest > limit:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def _in_layout_of(y: Tensor, x: Tensor) -> Tensor:
    if is_channels_last(x):
        return y.contiguous(memory_format=torch.channels_last)
    return y.contiguous()
