"""Networks of every task, from their settings and from what model files say of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.dense.backbone import Pyramid, build_pyramid
from widekernel.dense.detection.fcos import Fcos, FcosDetectionOptions, FcosOptions
from widekernel.dense.detection.two_stage import (
    CascadeRCNN,
    MaskRCNN,
    TwoStageDetector,
    TwoStageOptions,
    cascade_options,
    mask_rcnn_options,
)
from widekernel.dense.segmentation import Segmenter, SegmenterOptions
from widekernel.errors import CheckpointError
from widekernel.tasks.assembly import build_model, construction_explained
from widekernel.tasks.config import FIRST_TASK
from widekernel.tasks.network_config import BackboneConfig, DetectorConfig, SegmenterConfig

Detector = Fcos | CascadeRCNN | MaskRCNN

_FCOS_MAPS, _ALL_MAPS = 3, 4


class UnknownTaskError(CheckpointError):
    """Error for a network of a task that this version does not know."""


def build_segmenter(config: SegmenterConfig, num_classes: int, pretrained: bool = False) -> Segmenter:
    """Build UPerNet on a backbone.

    Args:
        config: its settings.
        num_classes: number of classes.
        pretrained: whether the backbone starts from timm's weights.

    Raises:
        ConfigError: there is no such backbone, it does not accept its arguments, or it has too few maps.
    """
    options = SegmenterOptions(
        num_classes=num_classes,
        channels=config.channels,
        pool_scales=tuple(config.pool_scales),
        dropout=config.dropout,
        align_corners=config.align_corners,
        auxiliary_channels=config.auxiliary_channels,
        auxiliary_weight=config.auxiliary_weight,
    )
    return Segmenter(_build_backbone(config, _ALL_MAPS, pretrained), options)


def build_detector(config: DetectorConfig, num_classes: int, masks: bool, pretrained: bool = False) -> Detector:
    """Build a detector on a backbone.

    Args:
        config: its settings.
        num_classes: number of classes, without the background.
        masks: whether a detector of masks predicts them.
        pretrained: whether the backbone starts from timm's weights.

    Raises:
        ConfigError: there is no such backbone, it does not accept its arguments, or it has too few maps.
    """
    if config.detector == "fcos":
        kept = FcosDetectionOptions(
            threshold=config.score_threshold, overlap=config.overlap_threshold, number=config.max_detections
        )
        backbone = _build_backbone(config, _FCOS_MAPS, pretrained)
        return Fcos(backbone, FcosOptions(num_classes=num_classes, channels=config.channels, detections=kept))
    backbone = _build_backbone(config, _ALL_MAPS, pretrained)
    if config.detector == "mask_rcnn":
        return MaskRCNN(backbone, _configured(mask_rcnn_options(num_classes, masks), config))
    return CascadeRCNN(backbone, _configured(cascade_options(num_classes, masks), config))


def _configured(options: TwoStageOptions, config: DetectorConfig) -> TwoStageOptions:
    """Return the published settings of a two-stage detector with those that the user may change."""
    rpn, roi = options.rpn, options.roi
    if config.proposals is not None:
        # In training, the published numbers keep their ratio to that in evaluation.
        times = rpn.training_proposals.number // rpn.proposals.number
        rpn = replace(
            rpn,
            proposals=replace(rpn.proposals, number=config.proposals),
            training_proposals=replace(rpn.training_proposals, number=times * config.proposals),
        )
    rpn = replace(rpn, anchors=replace(rpn.anchors, scale=config.anchor_scale))
    roi = replace(
        roi,
        fc_channels=config.fc_channels,
        sample=replace(roi.sample, number=config.roi_samples),
        score_threshold=config.score_threshold,
        overlap_threshold=config.overlap_threshold,
        most=config.max_detections,
    )
    return replace(options, channels=config.channels, rpn=rpn, roi=roi)


def _build_backbone(config: BackboneConfig, maps: int, pretrained: bool) -> Pyramid:
    with construction_explained(config.name, config.args, pretrained):
        return build_pyramid(config.name, config.args, maps, config.norms, pretrained)


def build_network(task: str, name: str, num_classes: int, args: dict[str, Any], details: dict[str, Any]) -> nn.Module:
    """Build the network that a model file describes, with initial weights.

    Args:
        task: what it does.
        name: name of the network or of its backbone.
        num_classes: number of classes.
        args: arguments of the network or of its backbone.
        details: settings of its heads.

    Raises:
        UnknownTaskError: the task is unknown.
        CheckpointError: the settings of the heads are incomplete or unknown.
        ConfigError: there is no such network, or it does not accept its arguments.
    """
    if task not in BUILDERS:
        raise UnknownTaskError(f"{task!r}, a task that this version does not know; it knows {', '.join(BUILDERS)}")
    return BUILDERS[task](name, num_classes, args, details)


def _segmenter(name: str, num_classes: int, args: dict[str, Any], details: dict[str, Any]) -> nn.Module:
    return build_segmenter(_config_from(SegmenterConfig, name, args, details), num_classes)


def _detector(name: str, num_classes: int, args: dict[str, Any], details: dict[str, Any]) -> nn.Module:
    return build_detector(_config_from(DetectorConfig, name, args, details), num_classes, bool(details.get("masks", True)))


BUILDERS: dict[str, Callable[[str, int, dict[str, Any], dict[str, Any]], nn.Module]] = {
    FIRST_TASK: lambda name, num_classes, args, details: build_model(name, num_classes, args),
    "segmentation": _segmenter,
    "detection": _detector,
}
"""Builders of networks, by task."""


def _config_from(kind: type[Any], name: str, args: dict[str, Any], details: dict[str, Any]) -> Any:
    """Return the settings of a network from what a model file says of its heads."""
    heads = details.get("heads", {})
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(heads) - known)
    if unknown:
        raise CheckpointError(
            f"The description of the network has the setting {unknown[0]!r}, which this version does not know."
        )
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in heads.items()}
    return kind(name=name, args=args, **values)


def tensor_outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return outputs of any network on images, before thresholds decide, as one tensor for comparisons.

    Of FCOS, these are the outputs of its head; of a two-stage detector, the maps of its neck, and what its heads make of the
    whole image as a RoI.
    """
    if isinstance(model, Fcos):
        outputs = [part for parts in model.outputs(images) for part in parts]
    elif isinstance(model, TwoStageDetector):
        outputs = list(model.neck(model.backbone(images)))
        head = model.roi_head
        for parts, side in ((head.box_heads, head.options.box_size), (head.mask_heads, head.options.mask_size)):
            features = F.adaptive_avg_pool2d(outputs[0], side)
            for part in parts:
                found = part(features)
                outputs += [found] if isinstance(found, Tensor) else found
    else:
        return model(images)  # type: ignore[no-any-return]
    return torch.cat([each.flatten(1) for each in outputs], dim=1)
