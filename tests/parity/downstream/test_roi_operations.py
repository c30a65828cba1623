"""The building blocks of the second stage against the official ones, on stored or generated inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity.downstream.arrays import Golden, filler
from widekernel.dense.detection.mask_pasting import paste_masks, sample_mask
from widekernel.dense.detection.roi_features import RoiFeatures, roi_levels
from widekernel.dense.detection.roi_losses import class_loss, giou_loss, mask_loss
from widekernel.dense.detection.roi_targets import mask_targets

CANVAS = (256, 320)
STRIDES = (4, 8, 16, 32)


@pytest.fixture(scope="module")
def operations(shared: Path) -> Golden:
    return Golden(shared, "det_ops_s700")


def test_levels(operations: Golden) -> None:
    assert torch.equal(roi_levels(operations["in:rois"][:, 1:], 4), operations["roi:levels"])


@pytest.mark.parametrize("size", [7, 14])
def test_features(operations: Golden, shared: Path, size: int) -> None:
    shapes = [(2, 4, CANVAS[0] // stride, CANVAS[1] // stride) for stride in STRIDES]
    maps = [torch.from_numpy(filler(shared).make_input(710 + level, shape)) for level, shape in enumerate(shapes)]
    operations.check(f"roi:features{size}", RoiFeatures(size, STRIDES)(maps, operations["in:rois"]), 1e-6)


def test_pasting(operations: Golden, shared: Path) -> None:
    """The masks are those of the whole canvas, although only the part around each box is sampled."""
    probabilities = torch.from_numpy(3 * filler(shared).make_input(720, (9, 28, 28))).sigmoid()
    boxes = operations["in:paste_boxes"]
    whole = torch.stack([sample_mask(*parts, range(60), range(80)) for parts in zip(probabilities, boxes)])
    operations.check("paste:soft_whole_canvas", whole, 1e-6)
    pasted = paste_masks(probabilities, boxes, 60, 80)
    for name in ("mask_whole_canvas", "mask_cpu_way"):
        assert torch.equal(pasted, operations.bits(f"paste:{name}", 80)), name


def test_mask_targets(operations: Golden, shared: Path) -> None:
    seed = int(operations.arrays["mask_target:gt_seed"])
    ((_, _, masks),) = filler(shared).make_targets(seed, [CANVAS], CANVAS, 5)
    boxes = operations["in:mask_target_boxes"]
    before = boxes.clone()
    targets = mask_targets(torch.from_numpy(masks), boxes, operations["in:mask_target_gt"], 28)
    assert torch.equal(targets.bool(), operations.bits("mask_target:packed", 28))
    assert torch.equal(boxes, before)


def check_loss(operations: Golden, name: str, loss: torch.Tensor, values: torch.Tensor) -> None:
    assert loss.item() == pytest.approx(operations[f"loss:{name}"].item(), rel=1e-6)
    operations.check(f"loss:{name}:grad", torch.autograd.grad(loss, values)[0], 2e-6)


def test_giou_loss(operations: Golden) -> None:
    """The official number has the weight 10 and is that of 50 RoIs, of which 24 are positive."""
    boxes = operations["in:loss_boxes"].requires_grad_()
    check_loss(operations, "giou", giou_loss(boxes, operations["in:loss_targets"]).sum() * 10 / 50, boxes)


def test_class_loss(operations: Golden) -> None:
    """The official numbers leave out some RoIs, whose gradients are zero."""
    logits, labels = operations["in:loss_rcnn_logits"].requires_grad_(), operations["in:loss_labels"]
    used = operations["loss:rcnn_ce:grad"].abs().sum(1) > 0
    loss = class_loss(logits[used], labels[used], used.sum())
    check_loss(operations, "rcnn_ce", loss, logits)


def test_mask_loss(operations: Golden, shared: Path) -> None:
    """The gradients tell the classes, and with their signs the targets."""
    gradients = operations.arrays["loss:mask_bce:grad"]
    labels = np.abs(gradients).sum((2, 3)).argmax(1)
    targets = gradients[np.arange(3), labels] < 0
    logits = torch.from_numpy(filler(shared).make_input(740, gradients.shape)).requires_grad_()
    loss = mask_loss(logits, torch.from_numpy(targets).float(), torch.from_numpy(labels), torch.tensor(3.0))
    check_loss(operations, "mask_bce", loss, logits)
