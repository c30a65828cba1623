"""Losses of the second stage; all are computed in float32 at least."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel.dense.detection.losses import EPSILON, wide


def class_loss(logits: Tensor, labels: Tensor, number: Tensor) -> Tensor:
    """Cross entropy.

    Args:
        logits: (k, classes + 1), the background last
        labels: (k,) int64
        number: scalar by which the sum is divided
    """
    return F.cross_entropy(wide(logits), labels, reduction="sum") / number


def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """One minus the generalized intersection over union (Rezatofighi et al., CVPR 2019), pair by pair.

    Args:
        boxes: (n, 4) x1 y1 x2 y2
        targets: (n, 4)

    Returns:
        (n,), from 0 to 2. Areas of union and hull count as 1e-6 at least.
    """
    boxes, targets = wide(boxes), wide(targets)
    common = _area(torch.maximum(boxes[:, :2], targets[:, :2]), torch.minimum(boxes[:, 2:], targets[:, 2:]))
    union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (targets[:, 2:] - targets[:, :2]).prod(1) - common
    union = union.clamp(min=EPSILON)
    hull = _area(torch.minimum(boxes[:, :2], targets[:, :2]), torch.maximum(boxes[:, 2:], targets[:, 2:]))
    hull = hull.clamp(min=EPSILON)
    return 1 - (common / union - (hull - union) / hull)


def _area(first: Tensor, last: Tensor) -> Tensor:
    return (last - first).clamp(min=0).prod(1)


def mask_loss(logits: Tensor, targets: Tensor, labels: Tensor, number: Tensor) -> Tensor:
    """Binary cross entropy on the map of each RoI's class, averaged over its cells.

    Args:
        logits: (p, classes, m, m)
        targets: (p, m, m), 0 or 1
        labels: (p,) int64
        number: scalar by which the sum over RoIs is divided
    """
    chosen = wide(logits[torch.arange(len(labels), device=labels.device), labels])
    total = F.binary_cross_entropy_with_logits(chosen, targets.to(chosen.dtype), reduction="sum")
    return total / (number * (targets.shape[1] * targets.shape[2]))
