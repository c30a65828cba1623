"""Our two-stage detectors for the official configurations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import widekernel
from tests.parity.downstream.arrays import Golden
from tests.parity.downstream.reference import official_file, pyramid
from widekernel.dense.detection.rpn import ProposalOptions
from widekernel.dense.detection.sampling import SampleOptions
from widekernel.dense.detection.two_stage import (
    CascadeRCNN,
    MaskRCNN,
    TwoStageDetector,
    TwoStageOptions,
    cascade_options,
    mask_rcnn_options,
)


def official_detector(shared: Path, golden: Golden, folder: Path) -> TwoStageDetector:
    """Create the detector of a case and load a file with its weights, such as the official programs write."""
    detector = create(golden.manifest["config"])
    widekernel.load_checkpoint(detector, official_file(shared, folder, golden.row["manifest"], golden.row["seed"]))
    return detector


def create(config: dict[str, Any]) -> TwoStageDetector:
    """Create the detector of an official configuration."""
    options = _options(config)
    kind = CascadeRCNN if config["type"] == "CascadeRCNN" else MaskRCNN
    return kind(pyramid(config["backbone"]), options)


def _options(config: dict[str, Any]) -> TwoStageOptions:
    roi_head, training, testing = config["roi_head"], config["train_cfg"], config["test_cfg"]
    heads = roi_head["bbox_head"]
    head = heads[0] if isinstance(heads, list) else heads
    cascaded = config["type"] == "CascadeRCNN"
    options = (cascade_options if cascaded else mask_rcnn_options)(head["num_classes"], "mask_head" in roi_head)
    sampler = training["rpn"]["sampler"]
    rpn = replace(
        options.rpn,
        training=replace(options.rpn.training, sample=SampleOptions(sampler["num"], sampler["pos_fraction"])),
        proposals=_proposals(testing["rpn"]),
        training_proposals=_proposals(training["rpn_proposal"]),
    )
    roi = replace(options.roi, fc_channels=head["fc_out_channels"], most=testing["rcnn"]["max_per_img"])
    return replace(options, rpn=rpn, roi=roi, channels=config["neck"]["out_channels"])


def _proposals(config: dict[str, Any]) -> ProposalOptions:
    return ProposalOptions(config["nms_pre"], config["max_per_img"], config["nms"]["iou_threshold"])
