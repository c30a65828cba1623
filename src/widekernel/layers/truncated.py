"""An ablation: strips made of tiles, with tiles beyond the border of the image dropped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel.layers.sources import KernelSource
from widekernel.layers.strips import ShuffledStrips
from widekernel.ops.jit_trace import static_shape


class TruncatedTiles(KernelSource):
    """The strips of another source without the tiles whose center lies outside the image.

    This equals a tile convolution with padding N // 2. Near a border, no single kernel computes it, so the layer cannot be
    folded. An ablation: exact but slow.

    Args:
        source: provides the arranged tiles.
    """

    num_branches = 2

    def __init__(self, source: ShuffledStrips) -> None:
        super().__init__()
        self.source = source
        self.channels = source.channels

    def responses(self, x: Tensor) -> list[Tensor]:
        """Convolve with every tile at every pixel, then shift the maps and add them up."""
        wide, tall = self.source.arranged()
        return [self._shift_add(x, wide, 3), self._shift_add(x, tall, 2)]

    def published_macs(self, height: int, width: int) -> int:
        """Count one tile convolution that keeps the size of the image."""
        return self.source.tiles.numel() * height * width

    def _shift_add(self, x: Tensor, tiles: Tensor, axis: int) -> Tensor:
        channels, count, tile_size, _ = static_shape(tiles)
        maps = F.conv2d(x, tiles.reshape(-1, 1, tile_size, tile_size), padding=tile_size // 2, groups=channels)
        maps = maps.unflatten(1, (channels, count))
        total = torch.zeros_like(x)
        for i in range(count):
            offset = i * tile_size - self.source.kernel_size // 2 + tile_size // 2
            total = _add_shifted(total, maps[:, :, i], offset, axis)
        return total


def _add_shifted(total: Tensor, image: Tensor, offset: int, axis: int) -> Tensor:
    """Add an image shifted along an axis so that pixel `offset` moves to 0; pixels shifted out of the image are dropped."""
    if torch.jit.is_tracing():
        return total + _shifted(image, offset, axis)
    extent = image.shape[axis]
    # If all pixels are shifted out, an empty part is padded: the tile then has a gradient of 0 instead of none, which
    # training on several processes would refuse.
    offset = max(-extent, min(offset, extent))
    length, left_pad = extent - abs(offset), max(0, -offset)
    part = image.narrow(axis, max(0, offset), length)
    return total + F.pad(part, _padding(axis, left_pad, extent - length - left_pad))


def _shifted(image: Tensor, offset: int, axis: int) -> Tensor:
    """Shift an image of any size by padding and narrowing, which also works in a traced graph."""
    reach = abs(offset)
    return F.pad(image, _padding(axis, reach, reach)).narrow(axis, reach + offset, image.shape[axis])


def _padding(axis: int, left_pad: int, right_pad: int) -> list[int]:
    return [left_pad, right_pad, 0, 0] if axis == 3 else [0, 0, left_pad, right_pad]
