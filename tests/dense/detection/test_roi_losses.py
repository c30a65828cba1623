"""Losses and heads of the second stage."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import generalized_box_iou

from widekernel.dense.detection.box_heads import BoxHead
from widekernel.dense.detection.mask_heads import MaskHead
from widekernel.dense.detection.roi_losses import class_loss, giou_loss, mask_loss
from widekernel.errors import ArgumentError


def boxes(seed: int) -> torch.Tensor:
    corners = torch.rand(20, 2, generator=torch.Generator().manual_seed(seed)) * 30
    return torch.cat([corners, corners + 1 + corners.flip(0)], 1)


def test_giou_loss_agrees_with_torchvision() -> None:
    torch.testing.assert_close(giou_loss(boxes(0), boxes(1)), 1 - generalized_box_iou(boxes(0), boxes(1)).diagonal())


def test_giou_loss_of_empty_boxes_is_finite() -> None:
    point = torch.zeros(1, 4, requires_grad=True)
    loss = giou_loss(point, torch.zeros(1, 4))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert point.grad.isfinite().all()


def test_losses_of_half_precision_are_float32() -> None:
    logits = torch.randn(6, 4).bfloat16()
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    number = torch.tensor(6.0)
    assert class_loss(logits, labels, number).dtype == torch.float32
    torch.testing.assert_close(class_loss(logits, labels, number), torch.nn.functional.cross_entropy(logits.float(), labels))
    masks = mask_loss(torch.zeros(6, 4, 3, 3).bfloat16(), torch.ones(6, 3, 3), labels, number)
    torch.testing.assert_close(masks, torch.tensor(2.0).log())


def test_heads_take_no_rois() -> None:
    head = BoxHead(5, channels=8, fc_channels=16).train()
    before = {key: value.clone() for key, value in head.state_dict().items() if "running" in key}
    logits, deltas = head(torch.empty(0, 8, 7, 7))
    assert (logits.shape, deltas.shape) == ((0, 6), (0, 20))
    assert all(torch.equal(value, head.state_dict()[key]) for key, value in before.items())
    assert MaskHead(5, channels=8)(torch.empty(0, 8, 14, 14)).shape == (0, 5, 28, 28)


def test_start_of_heads() -> None:
    """Scores start almost equal, and boxes almost unchanged."""
    logits, deltas = BoxHead(80)(torch.randn(4, 256, 7, 7))
    assert logits.std() < 0.5
    assert deltas.std() < 0.05


def test_errors() -> None:
    with pytest.raises(ArgumentError, match="not 5 and 0"):
        BoxHead(5, fcs=0)
    with pytest.raises(ArgumentError, match="at least one class"):
        MaskHead(0)
