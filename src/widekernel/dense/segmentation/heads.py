"""Heads for semantic segmentation: UPerNet, and the small convolutional head that training adds to it.

Xiao et al., Unified Perceptual Parsing for Scene Understanding, ECCV 2018.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from widekernel.dense.conv_norm import conv_norm
from widekernel.dense.segmentation.resizing import resize
from widekernel.errors import ShapeError


class UPerHead(nn.Module):
    """UPerNet: a pyramid of poolings of the coarsest map, and a feature pyramid on the other maps.

    Args:
        in_channels: number of channels of each map, from fine to coarse.
        channels: width of the head.
        num_classes: number of classes.
        pool_scales: sides of the maps to which the coarsest one is pooled.
        dropout: rate at which whole channels are dropped before the classifier.
        align_corners: how maps are resized; see `resize`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.conv_seg = _classifier(channels, num_classes)
        finer, coarsest = in_channels[:-1], in_channels[-1]
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), conv_norm(coarsest, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = conv_norm(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(conv_norm(width, channels, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(conv_norm(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = conv_norm(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """One map (N, C, H', W') per level, from fine to coarse -> logits (N, num_classes, H, W) of the finest size.

        Raises:
            ShapeError: the head is trained on a single image, whose pooled pixel has no variance.
        """
        self._check(maps[-1])
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        laterals.append(self._pooled(maps[-1]))
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + resize(laterals[i], laterals[i - 1].shape[2:], self.align_corners)
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals)]
        outputs.append(laterals[-1])
        size = outputs[0].shape[2:]
        fused = self.fpn_bottleneck(torch.cat([resize(x, size, self.align_corners) for x in outputs], dim=1))
        return self.conv_seg(self.dropout(fused))  # type: ignore[no-any-return]

    def _pooled(self, x: Tensor) -> Tensor:
        """Return the coarsest map, enriched by what its surroundings of several sizes contain."""
        pooled = [resize(module(x), x.shape[2:], self.align_corners) for module in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))  # type: ignore[no-any-return]

    def _check(self, x: Tensor) -> None:
        if not self.training or x.shape[0] > 1:
            return
        for module in self.psp_modules:
            pooling, layer = module[0], module[1]  # type: ignore[index]
            if pooling.output_size == 1 and isinstance(layer.bn, nn.BatchNorm2d) and layer.bn.training:
                raise ShapeError(
                    "the batch has 1 image, but the head pools an image to 1 pixel, which a batch norm cannot normalize "
                    "alone: train with at least 2 images per process, or with synchronized batch norms"
                )


class FCNHead(nn.Module):
    """One 3x3 convolution and a classifier; training adds its loss to that of the main head.

    Args:
        in_channels: number of channels of the map.
        channels: width of the head.
        num_classes: number of classes.
        dropout: rate at which whole channels are dropped before the classifier.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv_seg = _classifier(channels, num_classes)
        self.convs = nn.Sequential(conv_norm(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes, H, W)."""
        return self.conv_seg(self.dropout(self.convs(x)))  # type: ignore[no-any-return]


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    classifier = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(classifier.weight, std=0.01)
    assert classifier.bias is not None
    nn.init.zeros_(classifier.bias)
    return classifier
