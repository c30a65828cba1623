"""Alternative implementations of pointwise layers: linear layers as 1x1 convolutions, 1x1 convolutions as matrix products.

In training, our kernels compute the weight gradients of convolutions.

On a CPU, different libraries compute the two, and either can be faster, depending on the processor, the number of threads,
the size and the memory layout. `accelerate` measures which one is. The layers here have the constructors and state dicts of
PyTorch's layers; only the computation of the result differs. On other devices there is no gain, and they behave like their
base class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.layers.sides import sides
from widekernel.ops.jit_trace import is_tracing
from widekernel.ops.pointwise_grad import pointwise_conv


class PointwiseLinear(nn.Linear):
    """`nn.Linear` computed as a 1x1 convolution over an image of one column and as many rows as the input has."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        if torch.jit.is_scripting():
            return F.linear(x, self.weight, self.bias)
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            return self._computed(x)

    @torch.jit.unused
    def _computed(self, x: Tensor) -> Tensor:
        # Invalid inputs are left to `F.linear`, so that the error message is about the linear layer that the user wrote.
        if is_tracing() or x.device.type != "cpu" or x.shape[-1:] != (self.in_features,) or x.numel() == 0:
            return super().forward(x)
        # (1, C, rows, 1), stored as NHWC: a view of `x`, unless its rows are not consecutive in memory.
        rows = x.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)
        y = pointwise_conv(rows, self.weight[:, :, None, None], self.bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


class PointwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` that computes 1x1 convolutions as matrix products: one over all pixels, or one per image.

    The result has the memory layout of the input. Anything but a plain 1x1 convolution (with strides or padding, for
    instance) is computed as in `nn.Conv2d`; `reasons_against` says why.
    """

    def reasons_against(self) -> list[str]:
        """List what prevents this layer from being computed as a matrix product; empty if nothing does."""
        return reasons_against_pointwise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) -> (N, C', H, W) or (C', H, W)."""
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            return self._computed(x)

    @torch.jit.unused
    def _computed(self, x: Tensor) -> Tensor:
        if is_tracing():
            return super().forward(x)
        fits = x.dim() in (3, 4) and x.shape[-3] == self.in_channels and x.numel() != 0
        # Looked up at every call, because code that adapts networks changes strides and paddings of existing layers.
        if x.device.type != "cpu" or not fits or self.reasons_against():
            return super().forward(x)
        batched = x if x.dim() == 4 else x.unsqueeze(0)
        matrix = self.weight.flatten(1)
        # Not `is_contiguous(channels_last)`, which fails inside `vmap`. Maps of one pixel come here as well.
        if batched.stride(1) == 1:
            y = F.linear(batched.permute(0, 2, 3, 1), matrix, self.bias).permute(0, 3, 1, 2)
        else:
            y = _product_per_image(batched.flatten(2), matrix, self.bias).unflatten(2, batched.shape[2:])
        return y if x.dim() == 4 else y.squeeze(0)


class PointwiseGradConv2d(nn.Conv2d):
    """`nn.Conv2d` whose 1x1 convolutions have their weight gradient computed by our kernels, in float32 on a CPU.

    Everything else is computed as in `nn.Conv2d`; see `ops.pointwise_grad`.
    """

    def reasons_against(self) -> list[str]:
        """List what prevents our kernels from computing the weight gradient of this layer; empty if nothing does."""
        return reasons_against_pointwise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) -> the same as `nn.Conv2d`."""
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            return self._computed(x)

    @torch.jit.unused
    def _computed(self, x: Tensor) -> Tensor:
        # Looked up at every call, because code that adapts networks changes strides and paddings of existing layers.
        if is_tracing() or x.dim() != 4 or self.reasons_against():
            return super().forward(x)
        return pointwise_conv(x, self.weight, self.bias)


def reasons_against_pointwise(conv: nn.Conv2d) -> list[str]:
    """List what prevents computing a convolution as a matrix product over the channels; empty if nothing does."""
    reasons = []
    if tuple(conv.kernel_size) != (1, 1):
        reasons.append(f"kernel {tuple(conv.kernel_size)} is not 1x1")
    if conv.groups != 1:
        reasons.append(f"{conv.groups} groups")
    if sides(conv.stride) != (1, 1):
        reasons.append(f"stride {sides(conv.stride)} is not 1")
    if not isinstance(conv.padding, str) and sides(conv.padding) != (0, 0):
        reasons.append(f"padding {sides(conv.padding)} is not 0")
    return reasons


def _product_per_image(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """(N, C, pixels) and (C', C) -> (N, C', pixels)."""
    matrices = matrix.expand(x.shape[0], -1, -1)
    if bias is None:
        return torch.bmm(matrices, x)
    # Adding the bias afterwards would read and write the whole result once more.
    return torch.baddbmm(bias[:, None], matrices, x)
