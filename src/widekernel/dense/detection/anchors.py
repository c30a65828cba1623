"""Anchors of a region proposal network and points of FCOS: fixed places on the maps of a feature pyramid.

A map is flattened by rows, then columns, then the anchors of a position. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from widekernel.dense.detection.constants import constant
from widekernel.errors import ArgumentError


@dataclass(frozen=True)
class AnchorOptions:
    """Settings of the anchors.

    Args:
        strides: stride of each map in pixels, fine to coarse
        scale: side of the square anchor in units of the stride
        ratios: height / width of the anchors of a position; all have the same area

    Raises:
        ArgumentError: if there are no strides or ratios, or one of the numbers is not positive.
    """

    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    scale: float = 8.0
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)

    def __post_init__(self) -> None:
        for name, numbers in (("strides", self.strides), ("scale", (self.scale,)), ("ratios", self.ratios)):
            if not numbers or min(numbers) <= 0:
                raise ArgumentError(f"{name} of anchors are {numbers}, but must be positive numbers, at least one.")


def map_sizes(maps: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the rows and columns of each map (N, C, H, W)."""
    return [(map_.shape[-2], map_.shape[-1]) for map_ in maps]


def base_anchors(stride: int, options: AnchorOptions, device: torch.device | None = None) -> Tensor:
    """Return the anchors (A, 4) at the origin of a map; their center is its top left corner."""
    roots = constant(options.ratios, device).sqrt()
    side = stride * options.scale
    half = torch.stack([side * (1 / roots), side * roots], dim=1) * 0.5
    return torch.cat([-half, half], dim=1)


def grid_anchors(
    sizes: Sequence[tuple[int, int]], options: AnchorOptions, device: torch.device | None = None
) -> list[Tensor]:
    """Return the anchors (rows * columns * A, 4) of each map.

    Args:
        sizes: rows and columns of the maps, one for each stride of the options
        options: settings of the anchors
        device: where the anchors are wanted
    """
    if len(sizes) != len(options.strides):
        raise ArgumentError(
            f"There are {len(sizes)} maps, but anchors for {len(options.strides)} strides {options.strides}. "
            "Give as many strides as there are maps."
        )
    anchors = []
    for (rows, columns), stride in zip(sizes, options.strides):
        corners = _grid(rows, columns, stride, 0.0, device).repeat(1, 2)
        anchors.append((corners[:, None] + base_anchors(stride, options, device)).flatten(0, 1))
    return anchors


def grid_points(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device | None = None
) -> list[Tensor]:
    """Return the points (rows * columns, 2) of each map as x, y: the centers of its cells."""
    return [_grid(rows, columns, stride, 0.5, device) for (rows, columns), stride in zip(sizes, strides)]


def _grid(rows: int, columns: int, stride: int, offset: float, device: torch.device | None) -> Tensor:
    y, x = torch.meshgrid(
        (torch.arange(rows, device=device, dtype=torch.float32) + offset) * stride,
        (torch.arange(columns, device=device, dtype=torch.float32) + offset) * stride,
        indexing="ij",
    )
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def covered_cells(size: tuple[int, int], area: tuple[int, int], stride: int) -> tuple[int, int]:
    """Return how many rows and columns of a map lie over an area of the image, even if only in part.

    Args:
        size: rows and columns of the map
        area: height and width of the area in pixels, from the top left corner
        stride: stride of the map
    """
    return min(-(-area[0] // stride), size[0]), min(-(-area[1] // stride), size[1])


def inside(anchors: Tensor, area: tuple[int, int], border: int) -> Tensor:
    """Return which anchors (n, 4) leave the area (height, width) by no more than `border` pixels.

    The bound on the right and at the bottom is strict.
    """
    x1, y1, x2, y2 = anchors.unbind(-1)
    return (x1 >= -border) & (y1 >= -border) & (x2 < area[1] + border) & (y2 < area[0] + border)
