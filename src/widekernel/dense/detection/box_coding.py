"""Boxes relative to other boxes (deltas) and to points (distances)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from widekernel.dense.detection.constants import constant

# Decoding changes a side by no more than this factor in either direction.
LARGEST_RATIO = 1000 / 16
_LIMIT = math.log(LARGEST_RATIO)
Stds = tuple[float, float, float, float]
UNSCALED: Stds = (1.0, 1.0, 1.0, 1.0)


def clip_boxes(boxes: Tensor, area: tuple[int, int]) -> Tensor:
    """Clip boxes (..., 4) to an area given by its height and width."""
    height, width = area
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], dim=-1)


def encode_deltas(references: Tensor, boxes: Tensor, stds: Stds = UNSCALED) -> Tensor:
    """Express boxes relative to others.

    Args:
        references: (n, 4) boxes to start from, of positive width and height
        boxes: (n, 4) boxes to describe
        stds: what the deltas are divided by, so that they vary about as much as a standard normal variable

    Returns:
        (n, 4): shift of the center as shares of the reference's size, logarithms of the ratios of width and height
    """
    centers, sizes = _centers(references)
    wanted, wanted_sizes = _centers(boxes)
    deltas = torch.cat([(wanted - centers) / sizes, (wanted_sizes / sizes).log()], dim=-1)
    return deltas / constant(stds, deltas.device, deltas.dtype)


def decode_deltas(references: Tensor, deltas: Tensor, stds: Stds = UNSCALED, area: tuple[int, int] | None = None) -> Tensor:
    """Return the boxes that deltas describe; the inverse of `encode_deltas`.

    Sides grow or shrink by no more than a factor of 62.5, the limit of the official code in both directions.

    Args:
        references: (n, 4)
        deltas: (n, 4), or (n, k * 4) with k boxes for each reference
        stds: as in encoding
        area: height and width to which boxes are clipped; by default they are not clipped

    Returns:
        Boxes of the shape of `deltas`.
    """
    shape = deltas.shape
    deltas = deltas.unflatten(1, (-1, 4)) * constant(stds, deltas.device, deltas.dtype)
    centers, sizes = (part[:, None] for part in _centers(references))
    centers = centers + sizes * deltas[..., :2]
    half = sizes * deltas[..., 2:].clamp(-_LIMIT, _LIMIT).exp() * 0.5
    boxes = torch.cat([centers - half, centers + half], dim=-1)
    return (boxes if area is None else clip_boxes(boxes, area)).reshape(shape)


def decode_distances(points: Tensor, distances: Tensor, area: tuple[int, int] | None = None) -> Tensor:
    """Return the boxes around points.

    Args:
        points: (n, 2) x, y
        distances: (n, 4) from the point to the left, top, right and bottom side, in pixels
        area: height and width to which boxes are clipped; by default they are not clipped
    """
    boxes = torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)
    return boxes if area is None else clip_boxes(boxes, area)


def _centers(boxes: Tensor) -> tuple[Tensor, Tensor]:
    first, last = boxes[..., :2], boxes[..., 2:]
    return (first + last) * 0.5, last - first
