"""What the points of FCOS are trained towards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from widekernel.dense.detection.constants import constant
from widekernel.dense.detection.structures import Targets

BACKGROUND = -1


class FcosTargets(NamedTuple):
    """Targets of all points of a batch, over the maps from fine to coarse.

    Attributes:
        labels: (N, n) int64, the class, or `BACKGROUND`
        distances: (N, n, 4) float32, pixels from the point to the left, top, right and bottom side of its box; meaningless
            for background
    """

    labels: Tensor
    distances: Tensor


def point_ranges(bounds: Sequence[float], counts: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return the lowest and highest distance (n, 2) that each point is responsible for.

    Args:
        bounds: the distances, rising, at which a map hands over to the next coarser one
        counts: number of points of each map, one map more than bounds
        device: where the ranges are wanted
    """
    limits = constant([-1.0, *bounds, math.inf], device)
    ranges = torch.stack([limits[:-1], limits[1:]], dim=1)
    parts = [ranges[number].expand(count, 2) for number, count in enumerate(counts)]
    return torch.cat(parts)


def fcos_targets(points: Tensor, ranges: Tensor, targets: Sequence[Targets]) -> FcosTargets:
    """Assign points to boxes.

    A point stands for a box that contains it strictly, if the largest of its four distances lies in the point's range (with
    its bounds); of several boxes, for that of the smallest area. The host does not wait for the device.

    Args:
        points: (n, 2) x, y
        ranges: (n, 2) from `point_ranges`
        targets: objects of each image
    """
    return FcosTargets(*map(torch.stack, zip(*(_of_an_image(points, ranges, target) for target in targets))))


def _of_an_image(points: Tensor, ranges: Tensor, target: Targets) -> tuple[Tensor, Tensor]:
    boxes = target.boxes.float()
    if not len(boxes):
        return torch.full((len(points),), BACKGROUND, device=points.device), points.new_zeros(len(points), 4)
    distances = torch.cat([points[:, None] - boxes[:, :2], boxes[:, 2:] - points[:, None]], dim=2)  # (n, k, 4)
    largest = distances.amax(dim=2)
    fits = (distances.amin(dim=2) > 0) & (largest >= ranges[:, :1]) & (largest <= ranges[:, 1:])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    smallest, chosen = torch.where(fits, areas, torch.inf).min(dim=1)
    labels = torch.where(smallest.isfinite(), target.labels[chosen], BACKGROUND)
    return labels, distances.gather(1, chosen[:, None, None].expand(-1, 1, 4)).squeeze(1)


def centerness(distances: Tensor) -> Tensor:
    """Return how central points lie in their boxes, given positive distances (..., 4): 1 in the center, 0 at a side."""
    horizontal, vertical = distances[..., 0::2], distances[..., 1::2]
    ratios = horizontal.amin(-1) / horizontal.amax(-1) * (vertical.amin(-1) / vertical.amax(-1))
    return ratios.sqrt()
