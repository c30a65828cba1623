"""Losses of detectors."""

from __future__ import annotations

import math

import pytest
import torch

from widekernel.dense.detection.losses import aligned_iou, focal_loss, iou_loss


def test_focal_loss_of_background_and_an_object() -> None:
    losses = focal_loss(torch.zeros(2, 3), torch.tensor([-1, 1]))
    background, object_ = 0.75 * 0.25 * math.log(2), 0.25 * 0.25 * math.log(2)
    assert losses[0].tolist() == pytest.approx([background] * 3)
    assert losses[1].tolist() == pytest.approx([background, object_, background])
    assert torch.equal(losses[0], focal_loss(torch.zeros(1, 3), torch.tensor([3]))[0])


def test_overlaps_pair_by_pair() -> None:
    first = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    second = torch.tensor([[1.0, 0.0, 3.0, 2.0], [5.0, 5.0, 6.0, 6.0], [0.0, 0.0, 0.0, 0.0]])
    assert aligned_iou(first, second).tolist() == pytest.approx([1 / 3, 0.0, 0.0])
    assert iou_loss(first, second).tolist() == pytest.approx([math.log(3), -math.log(1e-6), -math.log(1e-6)], rel=1e-5)
