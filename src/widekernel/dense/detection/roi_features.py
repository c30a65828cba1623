"""Features of regions of interest (RoIs): the level of the pyramid for each one, and RoIAlign on it.

RoIs of a batch are (k, 5): index of the image, x1, y1, x2, y2 in pixels of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from widekernel.errors import ArgumentError, ShapeError

_FINEST_SIZE = 56.0  # RoIs up to twice this side, the geometric mean of width and height, belong to the finest level
_TOLERANCE = 1e-6  # in levels, so that a RoI of exactly 112 pixels belongs to the second level


def as_rois(boxes: Sequence[Tensor]) -> Tensor:
    """Join the boxes of the images of a batch.

    Args:
        boxes: one (n, 4) tensor per image, x1 y1 x2 y2.

    Returns:
        (k, 5) index of the image and box, image by image.
    """
    if not boxes:
        raise ArgumentError("RoIs of a batch need at least one image, but the list of boxes is empty.")
    return torch.cat([torch.cat([each.new_full((len(each), 1), index), each], 1) for index, each in enumerate(boxes)])


def roi_levels(boxes: Tensor, levels: int) -> Tensor:
    """Choose a level of the pyramid for each box: every doubling of sqrt(width * height) goes one level up.

    The boundaries lie at 112, 224, 448 … pixels (Feature Pyramid Networks, section 4.2, with a canonical size of 224).

    Args:
        boxes: (k, 4) x1 y1 x2 y2 in pixels of the batch.
        levels: number of levels.

    Returns:
        (k,) int64, from 0 (finest) to `levels` - 1.
    """
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    size = (width * height).sqrt()
    return torch.log2(size / _FINEST_SIZE + _TOLERANCE).floor().clamp(0, levels - 1).long()


class RoiFeatures(nn.Module):
    """RoIAlign (half-pixel aligned, as many samples per bin as it is wide and high) on the level of each RoI.

    It has no parameters. Nothing waits for the device: all levels see all RoIs, but a RoI of another level as an empty one,
    which costs no samples and adds zero.

    Args:
        size: rows and columns of the output, in bins.
        strides: pixels per cell of each level, fine to coarse.
    """

    def __init__(self, size: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.size = size
        self.strides = tuple(strides)

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Compute the features of RoIs.

        Args:
            features: (N, C, H, W) per level, fine to coarse; further levels than there are strides are not used.
            rois: (k, 5) index of the image, x1 y1 x2 y2 in pixels of the batch.

        Returns:
            (k, C, size, size) in the type of the features. Half-precision features are sampled in float32.

        Raises:
            ShapeError: there are fewer levels than strides.
        """
        if len(features) < len(self.strides):
            raise ShapeError(
                f"RoI features need a map for each of the strides {list(self.strides)}, but got {len(features)}. Give the "
                "outputs of the FPN, fine to coarse."
            )
        kind = torch.promote_types(features[0].dtype, torch.float32)
        rois = rois.to(kind)
        levels = roi_levels(rois[:, 1:], len(self.strides)).unsqueeze(1)
        total = None
        for level, (map_, stride) in enumerate(zip(features, self.strides)):
            mine = torch.cat([rois[:, :1], rois[:, 1:] * (levels == level)], 1)
            found = roi_align(map_.to(kind), mine, self.size, 1 / stride, sampling_ratio=0, aligned=True)
            total = found if total is None else total + found
        assert total is not None
        return total.to(features[0].dtype)

    def extra_repr(self) -> str:
        """State size and strides."""
        return f"size={self.size}, strides={self.strides}"
