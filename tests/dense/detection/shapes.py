"""Small two-stage detectors, and batches of generated scenes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tests.data.scenes import SHAPES, Scene, make_scene
from widekernel.dense.backbone import build_pyramid
from widekernel.dense.detection.roi_options import RoiOptions
from widekernel.dense.detection.rpn import ProposalOptions
from widekernel.dense.detection.sampling import SampleOptions
from widekernel.dense.detection.structures import ImageSize, Targets
from widekernel.dense.detection.two_stage import (
    CascadeRCNN,
    MaskRCNN,
    TwoStageDetector,
    TwoStageOptions,
    cascade_options,
    mask_rcnn_options,
)

CLASSES = len(SHAPES)
KINDS = ["cascade", "mask"]


def small_options(kind: str, masks: bool = True) -> TwoStageOptions:
    options = (cascade_options if kind == "cascade" else mask_rcnn_options)(CLASSES, masks)
    few = ProposalOptions(100, 50)
    roi: RoiOptions = replace(options.roi, fc_channels=64, sample=SampleOptions(48, 0.25), most=20)
    return replace(options, rpn=replace(options.rpn, proposals=few, training_proposals=few), roi=roi, channels=32)


def small_detector(kind: str, masks: bool = True) -> TwoStageDetector:
    """Create a detector whose backbone has no batch norms, so that images do not depend on each other in it."""
    torch.manual_seed(0)
    backbone = build_pyramid("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "conv_mlp": False})
    return (CascadeRCNN if kind == "cascade" else MaskRCNN)(backbone, small_options(kind, masks))


def batch(first: int = 0, count: int = 2) -> tuple[Tensor, list[ImageSize], list[Targets], list[int]]:
    """Return images with padding, sizes, targets and seeds."""
    seeds = list(range(first, first + count))
    images, sizes, targets = torch.zeros(count, 3, 96, 160), [], []
    for image, seed in zip(images, seeds):
        scene = make_scene(seed)
        height, width = scene.labels.shape
        image[:, :height, :width] = torch.from_numpy(scene.image).permute(2, 0, 1) / 64.0 - 2
        sizes.append(ImageSize(height, width))
        targets.append(targets_of(scene, 96, 160))
    return images, sizes, targets, seeds


def targets_of(scene: Scene, height: int, width: int) -> Targets:
    masks = torch.zeros(len(scene.instances), height, width, dtype=torch.uint8)
    for mask, instance in zip(masks, scene.instances):
        mask[: instance.mask.shape[0], : instance.mask.shape[1]] = torch.from_numpy(instance.mask)
    boxes = torch.tensor([instance.box for instance in scene.instances])
    return Targets(boxes, torch.tensor([instance.shape for instance in scene.instances]), masks)


def nothing(targets: Targets) -> Targets:
    """Return the targets of an image without objects."""
    assert targets.masks is not None
    return Targets(targets.boxes[:0], targets.labels[:0], targets.masks[:0])
