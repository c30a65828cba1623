"""The building blocks of the detectors against the official ones, on stored inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from tests.parity.downstream.arrays import Golden
from widekernel.dense.detection.anchors import (
    AnchorOptions,
    base_anchors,
    covered_cells,
    grid_anchors,
    grid_points,
    inside,
)
from widekernel.dense.detection.box_coding import decode_deltas, decode_distances, encode_deltas
from widekernel.dense.detection.fcos import fcos_losses
from widekernel.dense.detection.fcos_head import FcosOutputs
from widekernel.dense.detection.fcos_targets import FcosTargets
from widekernel.dense.detection.losses import focal_loss, iou_loss
from widekernel.dense.detection.matching import NEGATIVE, MatchOptions, match
from widekernel.dense.detection.rpn import RpnOutputs, rpn_losses
from widekernel.dense.detection.rpn_targets import RpnTargets
from widekernel.dense.detection.suppression import best_pairs, suppress, suppress_by_class

CANVAS = (256, 320)
# Heights and widths that the flags of the anchors imply.
PADDED, IMAGE = (228, 272), (221, 266)
SIZES = [(64, 80), (32, 40), (16, 20), (8, 10), (4, 5)]
STDS = [(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)]


@pytest.fixture(scope="module")
def operations(shared: Path) -> Golden:
    return Golden(shared, "det_ops_s700")


def test_anchors(operations: Golden) -> None:
    options = AnchorOptions()
    for level, (anchors, stride) in enumerate(zip(grid_anchors(SIZES, options), options.strides)):
        operations.check(f"anchors:base{level}", base_anchors(stride, options), 1e-7)
        operations.check(f"anchors:grid{level}", anchors, 1e-7)


def test_flags_of_anchors(operations: Golden) -> None:
    options = AnchorOptions()
    for level, (anchors, size, stride) in enumerate(zip(grid_anchors(SIZES, options), SIZES, options.strides)):
        rows, columns = covered_cells(size, PADDED, stride)
        valid = torch.zeros(*size, 3, dtype=torch.bool)
        valid[:rows, :columns] = True
        assert torch.equal(valid.flatten(), operations.bits(f"anchors:valid{level}", len(anchors)))
        within = operations.bits(f"anchors:inside{level}_border0", len(anchors))
        assert torch.equal(valid.flatten() & inside(anchors, IMAGE, 0), within)
        assert torch.equal(valid.flatten(), operations.bits(f"anchors:inside{level}_border-1", len(anchors)))


def test_points(operations: Golden) -> None:
    sizes = [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)]
    for level, points in enumerate(grid_points(sizes, (8, 16, 32, 64, 128))):
        assert torch.equal(points, operations[f"points:{level}"])


@pytest.mark.parametrize("number", range(4))
def test_deltas(operations: Golden, number: int) -> None:
    boxes, stds = operations["in:coder_boxes"], STDS[number]
    operations.check(f"coder:encode_std{number}", encode_deltas(boxes, operations["in:coder_gt"], stds), 1e-6)
    deltas = operations["in:coder_deltas"]
    operations.check(f"coder:decode_std{number}", decode_deltas(boxes, deltas, stds), 1e-6)
    operations.check(f"coder:decode_clip_std{number}", decode_deltas(boxes, deltas, stds, CANVAS), 1e-6)
    several = operations["in:coder_deltas_3_classes"]
    operations.check(f"coder:decode_classes_std{number}", decode_deltas(boxes, several, stds, CANVAS), 1e-6)


def test_distances(operations: Golden) -> None:
    points, distances = operations["in:points"], operations["in:distances"]
    operations.check("distance:decode", decode_distances(points, distances), 1e-7)
    operations.check("distance:decode_clip", decode_distances(points, distances, CANVAS), 1e-7)


def test_overlaps_of_torchvision(operations: Golden) -> None:
    first, second = operations["in:overlap_a"], operations["in:overlap_b"]
    operations.check("overlap:iou", box_iou(first, second), 1e-7)
    operations.check("overlap:giou", generalized_box_iou(first, second), 1e-6)


def test_matching_of_anchors(operations: Golden) -> None:
    anchors = torch.cat(grid_anchors(SIZES, AnchorOptions()))
    matches = match(operations["in:assign_gt"], anchors, MatchOptions(0.7, 0.3, 0.3, low_quality=True))
    # The official code counts boxes from 1; 0 is negative and -1 neither.
    assert torch.equal(matches.index + 1, operations["assign:rpn_gt_inds"].long())
    operations.check("assign:rpn_max_overlaps", matches.overlap, 1e-7)


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("overlap", [0.5, 0.6, 0.7])
def test_matching_of_proposals(operations: Golden, overlap: float, low_quality: bool) -> None:
    options = MatchOptions(overlap, overlap, overlap, low_quality)
    index = match(operations["in:assign_gt"], operations["in:assign_proposals"], options).index
    name = f"assign:rcnn_{overlap}_{'low' if low_quality else 'nolow'}"
    assert torch.equal(index + 1, operations[f"{name}_gt_inds"])
    labels = torch.where(index >= 0, operations["in:assign_labels"][index], -1)
    assert torch.equal(labels, operations[f"{name}_labels"])


def test_matching_without_boxes(operations: Golden) -> None:
    index = match(torch.zeros(0, 4), operations["in:assign_proposals"], MatchOptions(0.5, 0.5)).index
    assert torch.equal(index + 1, operations["assign:no_gt_gt_inds"])
    assert (index == NEGATIVE).all()


@pytest.mark.parametrize("overlap", [0.5, 0.7])
def test_suppression(operations: Golden, overlap: float) -> None:
    boxes, scores, groups = (operations[f"in:nms_{name}"] for name in ("boxes", "scores", "groups"))
    assert torch.equal(suppress(boxes, scores, torch.zeros_like(groups), overlap), operations[f"nms:keep_{overlap}"])
    kept = suppress(boxes, scores, groups, overlap)
    assert torch.equal(kept, operations[f"nms:batched_keep_{overlap}"])
    kept_boxes = torch.cat([boxes[kept], scores[kept, None]], dim=1)
    operations.check(f"nms:batched_dets_{overlap}", kept_boxes, 1e-7)


@pytest.mark.parametrize("most", [20, -1])
def test_suppression_by_class(operations: Golden, most: int) -> None:
    scores = operations["in:mc_logits"].softmax(dim=1)[:, :-1]
    boxes, best, labels = suppress_by_class(operations["in:mc_boxes"], scores, 0.05, 0.5, None if most < 0 else most)
    operations.check(f"multiclass:dets_{most}", torch.cat([boxes, best[:, None]], dim=1), 1e-7)
    assert torch.equal(labels, operations[f"multiclass:labels_{most}"])


def test_suppression_of_boxes_that_the_classes_share(operations: Golden) -> None:
    scores = operations["in:mc_logits"].softmax(dim=1)[:, :-1]
    boxes, best, labels = suppress_by_class(operations["in:mc_boxes"][:, :4].contiguous(), scores, 0.05, 0.5, 20)
    operations.check("multiclass:agnostic_dets", torch.cat([boxes, best[:, None]], dim=1), 1e-7)
    assert torch.equal(labels, operations["multiclass:agnostic_labels"])


def test_best_pairs(operations: Golden) -> None:
    pairs = best_pairs(operations["in:topk_scores"], 0.05, 40)
    for name, value in (("scores", pairs.scores), ("labels", pairs.labels), ("rows", pairs.places)):
        assert torch.equal(value, operations[f"topk:{name}"])


def check_loss(operations: Golden, name: str, loss: Tensor, *inputs: Tensor) -> None:
    assert loss.item() == pytest.approx(operations[f"loss:{name}"].item(), rel=1e-6)
    gradients = torch.autograd.grad(loss, inputs)
    operations.check(f"loss:{name}:grad", gradients[0], 2e-6)


def test_focal_loss(operations: Golden) -> None:
    logits = operations["in:loss_logits"].requires_grad_()
    check_loss(operations, "focal", focal_loss(logits, operations["in:loss_labels"]).sum() / 7, logits)


def test_iou_loss(operations: Golden) -> None:
    boxes, weights = operations["in:loss_boxes"].requires_grad_(), operations["in:loss_weights"]
    losses = iou_loss(boxes, operations["in:loss_targets"])
    check_loss(operations, "iou_log", (losses * weights).sum() / weights.sum(), boxes)


@pytest.mark.parametrize(("name", "smoothing"), [("smooth_l1_ninth", 1 / 9), ("l1", 0.0)])
def test_loss_of_deltas(operations: Golden, name: str, smoothing: float) -> None:
    """The official numbers weigh the first 9 of 24 anchors."""
    deltas = operations["in:loss_deltas"].requires_grad_()
    positive = torch.arange(24) < 9
    wanted = torch.where(positive[:, None], operations["in:loss_delta_targets"], 0.0)
    targets = RpnTargets(positive[None], ~positive[None], wanted[None])
    outputs = RpnOutputs([torch.zeros(1, 1, 24, 1)], [deltas.t().reshape(1, 4, 24, 1)])
    check_loss(operations, name, rpn_losses(outputs, targets, smoothing)["rpn_box"], deltas)


def test_loss_of_anchors(operations: Golden) -> None:
    """Officially, class 0 is the object, and some anchors have no weight."""
    logits = operations["in:loss_rpn_logits"].requires_grad_()
    weighted, object_ = operations["in:loss_rpn_weights"] > 0, operations["in:loss_rpn_labels"] == 0
    targets = RpnTargets((weighted & object_)[None], (weighted & ~object_)[None], torch.zeros(1, 24, 4))
    outputs = RpnOutputs([logits.view(1, 1, 24, 1)], [torch.zeros(1, 4, 24, 1)])
    check_loss(operations, "rpn_bce", rpn_losses(outputs, targets, 0.0)["rpn_cls"], logits)


def test_loss_of_centerness(operations: Golden) -> None:
    """The wanted values are the stored weights, so distances are made to have them as their centerness."""
    logits, wanted = operations["in:loss_centerness"].requires_grad_(), operations["in:loss_weights"]
    distances = torch.ones(1, 24, 4)
    distances[0, :, 0] = wanted**2
    outputs = FcosOutputs([torch.zeros(1, 5, 24, 1)], [torch.zeros(1, 4, 24, 1)], [logits.view(1, 1, 24, 1)])
    targets = FcosTargets(torch.zeros(1, 24, dtype=torch.int64), distances)
    check_loss(operations, "centerness_bce", fcos_losses(outputs, targets)["centerness"], logits)
