"""An ablation: strips out of tiles of which those beyond the border of the image are dropped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel.layers.sources import KernelSource
from widekernel.layers.tiles import ShuffledStrips
from widekernel.ops.jit_trace import static_shape


class TruncatedTiles(KernelSource):
    """The strips of another source, with the tiles dropped whose middle lies outside the image.

    This is what padding the tile convolution by N // 2 does: near a border it computes something that no single kernel
    does. An ablation; it is exact but slow, and cannot be folded.

    Args:
        source: whose arranged tiles are used.
    """

    num_branches = 2

    def __init__(self, source: ShuffledStrips) -> None:
        super().__init__()
        self.source = source
        self.channels = source.channels

    def responses(self, x: Tensor) -> list[Tensor]:
        """Convolve with every tile at every pixel, then shift and add the maps."""
        wide, tall = self.source.arranged()
        return [self._shift_add(x, wide, 3), self._shift_add(x, tall, 2)]

    def published_macs(self, height: int, width: int) -> int:
        """Count one tile convolution of the image's own size."""
        return self.source.tiles.numel() * height * width

    def _shift_add(self, x: Tensor, tiles: Tensor, axis: int) -> Tensor:
        channels, count, small, _ = static_shape(tiles)
        maps = F.conv2d(x, tiles.reshape(-1, 1, small, small), padding=small // 2, groups=channels)
        maps = maps.unflatten(1, (channels, count))
        total = torch.zeros_like(x)
        for i in range(count):
            offset = i * small - self.source.big // 2 + small // 2
            total = _plus_moved(total, maps[:, :, i], offset, axis)
        return total


def _plus_moved(total: Tensor, image: Tensor, offset: int, axis: int) -> Tensor:
    """Add an image whose pixel at `offset` comes to 0 along an axis; what leaves the image is lost."""
    if torch.jit.is_tracing():
        return total + _moved(image, offset, axis)
    extent = image.shape[axis]
    if abs(offset) >= extent:
        return total
    length, before = extent - abs(offset), max(0, -offset)
    part = image.narrow(axis, max(0, offset), length)
    return total + F.pad(part, _along(axis, before, extent - length - before))


def _moved(image: Tensor, offset: int, axis: int) -> Tensor:
    """Move an image of any size, as a recorded graph must: by padding, and a cut as long as the image."""
    reach = abs(offset)
    return F.pad(image, _along(axis, reach, reach)).narrow(axis, reach + offset, image.shape[axis])


def _along(axis: int, before: int, after: int) -> list[int]:
    return [before, after, 0, 0] if axis == 3 else [0, 0, before, after]
