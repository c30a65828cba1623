"""The head of FCOS: two towers of convolutions, and three outputs for each position of each map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from widekernel.dense.conv_norm import conv_norm
from widekernel.dense.detection.losses import wide
from widekernel.errors import ArgumentError

# Share of positions that a new head takes for objects.
_FIRST_GUESS = 0.01


class FcosOutputs(NamedTuple):
    """Outputs for each map, fine to coarse.

    Attributes:
        logits: (N, classes, H, W)
        log_distances: (N, 4, H, W) float32 at least, logarithms of the pixels to the left, top, right and bottom side
        centerness: (N, 1, H, W), logits
    """

    logits: list[Tensor]
    log_distances: list[Tensor]
    centerness: list[Tensor]


class Scale(nn.Module):
    """A learned factor of one map."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply a tensor by the factor."""
        return x * self.scale


class FcosHead(nn.Module):
    """Head of FCOS (Tian et al., ICCV 2019) in its original form, with the official key names.

    The centerness belongs to the tower of the classes; distances are not measured in strides.

    Args:
        num_classes: number of classes
        channels: channels of the maps and of the towers, a multiple of 32
        maps: number of maps, which share everything but their scales
        depth: convolutions in a tower
    """

    def __init__(self, num_classes: int, channels: int = 256, maps: int = 5, depth: int = 4) -> None:
        super().__init__()
        if num_classes < 1 or channels < 32 or channels % 32:
            raise ArgumentError(
                f"num_classes is {num_classes} and channels {channels}; at least one class is needed, and a multiple of 32 "
                "channels for the group norms."
            )
        self.cls_convs = nn.Sequential(*(conv_norm(channels, channels, 3, norm="group") for _ in range(depth)))
        self.reg_convs = nn.Sequential(*(conv_norm(channels, channels, 3, norm="group") for _ in range(depth)))
        self.conv_cls = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.conv_reg = nn.Conv2d(channels, 4, 3, padding=1)
        self.conv_centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in range(maps))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        assert self.conv_cls.bias is not None
        nn.init.constant_(self.conv_cls.bias, math.log(_FIRST_GUESS / (1 - _FIRST_GUESS)))

    def forward(self, maps: Sequence[Tensor]) -> FcosOutputs:
        """Maps (N, C, H_i, W_i) -> outputs."""
        if len(maps) != len(self.scales):
            raise ArgumentError(f"There are {len(maps)} maps, but the head is built for {len(self.scales)}.")
        logits, log_distances, centers = [], [], []
        for map_, scale in zip(maps, self.scales):
            objects = self.cls_convs(map_)
            logits.append(self.conv_cls(objects))
            centers.append(self.conv_centerness(objects))
            log_distances.append(wide(scale(self.conv_reg(self.reg_convs(map_)))))
        return FcosOutputs(logits, log_distances, centers)
