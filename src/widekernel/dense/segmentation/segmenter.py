"""A network for semantic segmentation: a feature pyramid, UPerNet, and an auxiliary head for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from widekernel.dense.backbone import Pyramid
from widekernel.dense.segmentation.heads import FCNHead, UPerHead
from widekernel.errors import ArgumentError
from widekernel.settings import require, require_number, require_whole, require_within

# The auxiliary head reads the second coarsest map.
_AUXILIARY_LEVEL = -2


@dataclass(frozen=True)
class SegmenterOptions:
    """The heads of a network for semantic segmentation.

    Attributes:
        num_classes: number of classes.
        channels: width of UPerNet.
        pool_scales: sides of the maps to which UPerNet pools the coarsest map.
        dropout: rate at which whole channels are dropped before the classifiers.
        align_corners: whether resizing lets the centers of the corner pixels coincide; RepLKNet does so for Cityscapes.
        auxiliary_channels: width of the auxiliary head; None for no such head.
        auxiliary_weight: weight of its loss.
    """

    num_classes: int
    channels: int = 512
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1
    align_corners: bool = False
    auxiliary_channels: int | None = 256
    auxiliary_weight: float = 0.4

    def __post_init__(self) -> None:
        require_whole("num_classes", self.num_classes, 1)
        require_whole("channels", self.channels, 1)
        require(len(self.pool_scales) > 0, "pool_scales", self.pool_scales, "at least one side")
        for scale in self.pool_scales:
            require_whole("pool_scales", scale, 1)
        require_within("dropout", self.dropout, 0, 1)
        if self.auxiliary_channels is not None:
            require_whole("auxiliary_channels", self.auxiliary_channels, 1)
        require_number("auxiliary_weight", self.auxiliary_weight)
        require(self.auxiliary_weight >= 0, "auxiliary_weight", self.auxiliary_weight, "0 or more")


class SegmenterOutput(NamedTuple):
    """What a segmenter returns in training.

    Attributes:
        logits: logits (N, classes, H', W') at the finest map's size.
        auxiliary: logits (N, classes, H'', W'') of the auxiliary head; None if there is none.
    """

    logits: Tensor
    auxiliary: Tensor | None


class Segmenter(nn.Module):
    """UPerNet on a feature pyramid.

    Args:
        backbone: the feature pyramid, of at least two levels.
        options: the heads.

    Raises:
        ArgumentError: the pyramid has a single level.
    """

    def __init__(self, backbone: Pyramid, options: SegmenterOptions) -> None:
        super().__init__()
        if len(backbone.channels) < 2:
            raise ArgumentError(
                f"the pyramid has {len(backbone.channels)} level, but UPerNet fuses at least 2: give more out_indices"
            )
        self.options = options
        self.backbone = backbone
        self.decode_head = UPerHead(
            backbone.channels,
            options.channels,
            options.num_classes,
            options.pool_scales,
            options.dropout,
            options.align_corners,
        )
        self.auxiliary_head = None
        if options.auxiliary_channels is not None:
            width = backbone.channels[_AUXILIARY_LEVEL]
            self.auxiliary_head = FCNHead(width, options.auxiliary_channels, options.num_classes, options.dropout)

    def forward(self, images: Tensor) -> Tensor | SegmenterOutput:
        """(N, 3, H, W) -> logits (N, classes, H/4, W/4); in training, with those of the auxiliary head."""
        maps = self.backbone(images)
        logits = self.decode_head(maps)
        if not self.training:
            return logits  # type: ignore[no-any-return]
        auxiliary = None if self.auxiliary_head is None else self.auxiliary_head(maps[_AUXILIARY_LEVEL])
        return SegmenterOutput(logits, auxiliary)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable the recomputation of the backbone's activations in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)
