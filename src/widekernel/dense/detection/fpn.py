"""The feature pyramid network of the detectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.errors import ArgumentError


class BareConv(nn.Module):
    """A convolution with bias under the official name `conv`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        return self.conv(x)


class FeaturePyramidNetwork(nn.Module):
    """Feature pyramid network (Lin et al., CVPR 2017) with the official key names.

    Convolutions have a bias, and neither norm nor activation. Coarse maps are enlarged to the size of the next finer one by
    the nearest neighbor.

    Args:
        in_channels: channels of the maps, fine to coarse
        channels: channels of all outputs
        outputs: number of outputs, at least as many as inputs
        extra: how maps beyond the inputs arise: "pool" takes every second pixel of the one before, "convs" convolves it with
            stride 2, from the second one on after a ReLU
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int = 256, outputs: int = 5, extra: Literal["pool", "convs"] = "pool"
    ) -> None:
        super().__init__()
        if outputs < len(in_channels) or not in_channels:
            raise ArgumentError(
                f"outputs is {outputs} with {len(in_channels)} inputs; at least one input is needed, and no fewer outputs."
            )
        if extra not in ("pool", "convs"):
            raise ArgumentError(f"extra is {extra!r}, but must be 'pool' or 'convs'.")
        self.outputs = outputs
        self.lateral_convs = nn.ModuleList(BareConv(number, channels, 1) for number in in_channels)
        self.fpn_convs = nn.ModuleList(BareConv(channels, channels, 3) for _ in in_channels)
        if extra == "convs":
            self.fpn_convs.extend(BareConv(channels, channels, 3, 2) for _ in range(outputs - len(in_channels)))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps (N, C_i, H_i, W_i), fine to coarse -> `outputs` maps (N, channels, H_i, W_i)."""
        if len(features) != len(self.lateral_convs):
            raise ArgumentError(f"There are {len(features)} maps, but the pyramid has {len(self.lateral_convs)} inputs.")
        sums = [conv(feature) for conv, feature in zip(self.lateral_convs, features)]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], size=sums[i - 1].shape[-2:], mode="nearest")
        maps = [conv(summed) for conv, summed in zip(self.fpn_convs, sums)]
        while len(maps) < self.outputs:
            maps.append(self._extra(maps[-1], len(maps)))
        return maps

    def _extra(self, last: Tensor, number: int) -> Tensor:
        if len(self.fpn_convs) == len(self.lateral_convs):
            return F.max_pool2d(last, 1, 2)
        return self.fpn_convs[number](last if number == len(self.lateral_convs) else last.relu())
