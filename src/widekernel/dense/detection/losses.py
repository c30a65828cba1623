"""Losses of detectors per element, as the official code defines them; sums and normalizers are the caller's.

All are computed in float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

# Smallest union, and smallest overlap in a logarithm.
EPSILON = 1e-6


def wide(values: Tensor) -> Tensor:
    """Return values in float32, or as they are if they are more precise."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def focal_loss(logits: Tensor, labels: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """Focal loss of independent classes (Lin et al., ICCV 2017).

    Args:
        logits: (n, classes)
        labels: (n,) int64; a label outside 0..classes - 1 means background
        gamma: exponent that weighs down what is already right
        alpha: weight of the positive class; 1 - alpha is that of the others

    Returns:
        (n, classes)
    """
    logits = wide(logits)
    wanted = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
    return sigmoid_focal_loss(logits, wanted.to(logits.dtype), alpha, gamma)


def aligned_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes (n, 4) and boxes (n, 4), pair by pair: (n,)."""
    sides = torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])
    common = sides.clamp(min=0).prod(dim=1)
    union = (first[:, 2:] - first[:, :2]).prod(dim=1) + (second[:, 2:] - second[:, :2]).prod(dim=1) - common
    return common / union.clamp(min=EPSILON)


def iou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Negative logarithm of the intersection over union (n,), which counts as 1e-6 at least (UnitBox, Yu et al., 2016)."""
    return -aligned_iou(wide(boxes), wide(targets)).clamp(min=EPSILON).log()
