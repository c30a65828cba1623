"""Bilinear resizing of maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Resize maps (N, C, H, W) bilinearly to `size`, height and width, without antialiasing.

    Args:
        x: the maps; returned as they are if they have that size.
        size: height and width of the result.
        align_corners: whether the centers of the corner pixels coincide; if not, the outer edges of these pixels do.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)
