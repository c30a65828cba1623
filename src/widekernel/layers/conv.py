"""A drop-in depthwise convolution that runs on our operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from widekernel import ops
from widekernel.layers.sides import sides


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` that runs size-preserving depthwise convolutions of stride 1 on `ops.depthwise_sum`.

    It has the constructor and the state dict of `nn.Conv2d`, so it can replace one anywhere. The operator does not cover
    strides, dilation, other paddings and several filters per channel; these are computed as in `nn.Conv2d`, and
    `reasons_against` says which of them applies.
    """

    def reasons_against(self) -> list[str]:
        """List what prevents this layer from running on the operator; empty if it runs there."""
        return reasons_against_depthwise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) -> the same as `nn.Conv2d`."""
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            return self._computed(x)

    @torch.jit.unused
    def _computed(self, x: Tensor) -> Tensor:
        # Looked up at every call, because code that adapts networks changes strides and paddings of existing layers.
        if x.dim() not in (3, 4) or not x.dtype.is_floating_point or self.reasons_against():
            return super().forward(x)
        batched = x if x.dim() == 4 else x.unsqueeze(0)
        y = ops.depthwise_sum(batched, [self.weight], [output_tap(self)], self.bias)
        return y if x.dim() == 4 else y.squeeze(0)


def output_tap(conv: nn.Conv2d) -> tuple[int, int]:
    """Return the tap that sits on the output pixel of a convolution that keeps the size."""
    # With padding="same" and an even kernel, PyTorch adds the extra padding on the right and below.
    return (conv.kernel_size[0] - 1) // 2, (conv.kernel_size[1] - 1) // 2


def reasons_against_depthwise(conv: nn.Conv2d) -> list[str]:
    """List what prevents a convolution from running on `ops.depthwise_sum`; empty if it can."""
    reasons = []
    if not conv.in_channels == conv.out_channels == conv.groups:
        reasons.append(f"not depthwise: {conv.in_channels} -> {conv.out_channels} channels, {conv.groups} groups")
    if sides(conv.stride) != (1, 1):
        reasons.append(f"stride {sides(conv.stride)} is not 1")
    if sides(conv.dilation) != (1, 1):
        reasons.append(f"dilation {sides(conv.dilation)} is not 1")
    if conv.padding_mode != "zeros":
        reasons.append(f"padding mode {conv.padding_mode!r} is not 'zeros'")
    if not _keeps_size(conv):
        reasons.append(f"padding {conv.padding} changes the size with a {tuple(conv.kernel_size)} kernel")
    return reasons


def _keeps_size(conv: nn.Conv2d) -> bool:
    if conv.padding == "same":
        return True
    padding = (0, 0) if isinstance(conv.padding, str) else sides(conv.padding)
    return all(2 * pad == size - 1 for pad, size in zip(padding, conv.kernel_size))
