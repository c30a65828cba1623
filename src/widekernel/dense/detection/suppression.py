"""Choice of the best boxes: thresholds, the highest scores, non-maximum suppression."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms


class BestPairs(NamedTuple):
    """Pairs of a place and a class, by falling score.

    Attributes:
        scores: (k,)
        places: (k,) int64
        labels: (k,) int64
    """

    scores: Tensor
    places: Tensor
    labels: Tensor


def best_pairs(scores: Tensor, threshold: float, most: int) -> BestPairs:
    """Return the pairs of a place and a class with the highest scores above a threshold.

    Args:
        scores: (places, classes)
        threshold: a score must be higher
        most: highest number of pairs
    """
    places, labels = (scores > threshold).nonzero(as_tuple=True)
    chosen, order = scores[places, labels].sort(descending=True, stable=True)
    order = order[:most]
    return BestPairs(chosen[:most], places[order], labels[order])


def suppress(boxes: Tensor, scores: Tensor, groups: Tensor, overlap: float, most: int | None = None) -> Tensor:
    """Return the numbers of the boxes that stay after non-maximum suppression within groups, by falling score.

    Args:
        boxes: (n, 4) float32
        scores: (n,)
        groups: (n,) int64; boxes of different groups do not suppress each other
        overlap: a box goes if its intersection over union with a better one is higher
        most: highest number of boxes
    """
    return batched_nms(boxes, scores, groups, overlap)[:most]


def suppress_by_class(
    boxes: Tensor, scores: Tensor, threshold: float, overlap: float, most: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best boxes of several classes.

    Args:
        boxes: (n, 4), or (n, classes * 4) with a box for each class
        scores: (n, classes), without a background class
        threshold: a score must be higher
        overlap: as in `suppress`
        most: highest number of boxes, over all classes

    Returns:
        boxes (k, 4), scores (k,) and labels (k,), by falling score
    """
    places, labels = (scores > threshold).nonzero(as_tuple=True)
    by_class = boxes.unflatten(1, (-1, 4))
    chosen = by_class[places, labels if by_class.shape[1] > 1 else torch.zeros_like(labels)]
    best = scores[places, labels]
    kept = suppress(chosen, best, labels, overlap, most)
    return chosen[kept], best[kept], labels[kept]
