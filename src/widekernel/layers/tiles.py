"""Strips of small square tiles: the number of tiles in a strip, joining tiles into a strip, and cutting a strip.

A row of nk = ceil(K / N) tiles is a strip of nk·N taps, anchored at K // 2, the middle of the K-tap kernel it represents.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from widekernel.errors import ArgumentError
from widekernel.layers.sources import check_odd
from widekernel.ops.jit_trace import static_shape


def check_tiles(kernel_size: int, tile_size: int) -> None:
    """Raise unless a strip of `kernel_size` taps can be made of square tiles of side `tile_size`."""
    check_odd("kernel size", kernel_size)
    check_odd("tile size", tile_size)
    if tile_size >= kernel_size:
        raise ArgumentError(f"tile size {tile_size} is not smaller than the kernel size {kernel_size}: give a smaller tile")


def num_tiles(kernel_size: int, tile_size: int) -> int:
    """Return the number of tiles in a strip of `kernel_size` taps."""
    return math.ceil(kernel_size / tile_size)


def stacked(tiles: Tensor) -> Tensor:
    """Stack tiles (C, nk, N, N) vertically: (C, 1, nk·N, N)."""
    channels, count, height, width = static_shape(tiles)
    return tiles.reshape(channels, 1, count * height, width)


def side_by_side(tiles: Tensor) -> Tensor:
    """Put tiles (C, nk, N, N) side by side: (C, 1, N, nk·N)."""
    channels, count, height, width = static_shape(tiles)
    return tiles.transpose(1, 2).reshape(channels, 1, height, count * width)


def cut_into_tiles(strip: Tensor, tile_size: int) -> Tensor:
    """Cut a strip (C, 1, K, N) or (C, 1, N, K) into tiles (C·nk, 1, N, N); the last tile is padded with zeros.

    The tiles of a channel are consecutive, from the top or from the left.

    Raises:
        ArgumentError: if neither side of the strip is `tile_size`.
    """
    channels, _, kh, kw = strip.shape
    is_tall = kh > kw
    kernel_size = max(kh, kw)
    if min(kh, kw) != tile_size or kernel_size < tile_size:
        raise ArgumentError(
            f"a {kh}x{kw} kernel is not a strip of {tile_size}x{tile_size} tiles: one side must be {tile_size}"
        )
    count = num_tiles(kernel_size, tile_size)
    missing = count * tile_size - kernel_size
    strip = F.pad(strip, (0, 0, 0, missing) if is_tall else (0, missing))
    if is_tall:
        return strip.reshape(channels * count, 1, tile_size, tile_size)
    tiles = strip.reshape(channels, tile_size, count, tile_size).transpose(1, 2)
    return tiles.reshape(channels * count, 1, tile_size, tile_size)


def tile_convolution_padding(kernel_size: int, tile_size: int) -> int:
    """Return the padding along the strip in the authors' tile convolution; it determines how many positions are computed.

    It is the smallest number congruent to K // 2 modulo N that loses no tile touching the image.
    """
    count = num_tiles(kernel_size, tile_size)
    after = count * tile_size - 1 - kernel_size // 2 - (count - 1) * tile_size
    needed = max(after, tile_size - 1)
    return needed + (kernel_size // 2 - needed) % tile_size
