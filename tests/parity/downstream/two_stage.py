"""Our two-stage detectors for the official configurations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

import widekernel
from tests.parity.downstream.arrays import Golden
from tests.parity.reference import NAMES, arguments
from widekernel.dense.backbone import Pyramid, build_pyramid
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


def create(config: dict[str, Any]) -> TwoStageDetector:
    """Create the detector of an official configuration."""
    options = _options(config)
    kind = CascadeRCNN if config["type"] == "CascadeRCNN" else MaskRCNN
    return kind(pyramid(config["backbone"]), options)


def pyramid(config: dict[str, Any]) -> Pyramid:
    args = {key: value for key, value in config.items() if key not in ("type", "sparse")}
    if args.pop("LoRA", False):
        args["Decom"] = True
    ours = arguments(config["type"], args)
    if config["type"] == "ConvNeXt":  # timm's
        ours["ls_init_value"] = ours.pop("layer_scale")
    return build_pyramid(NAMES[config["type"]], ours)


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


def load(detector: TwoStageDetector, golden: Golden, folder: Path) -> None:
    """Load the generated weights of a case as a file of the official programs."""
    from widekernel.models.layouts.conversion import to_native

    state = golden.weights()
    inner = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    norms = {k: v for k, v in inner.items() if k.startswith("norm")}
    body = to_native(detector.backbone.body, {k: v for k, v in inner.items() if k not in norms}).state
    native = {k: v for k, v in state.items() if not k.startswith("backbone.")}
    native |= {f"backbone.body.{k}": v for k, v in body.items()}
    native |= {f"backbone.norms.{k.removeprefix('norm')}": v for k, v in norms.items()}
    detector.load_state_dict(native)


def official_gradients(detector: TwoStageDetector) -> dict[str, Tensor]:
    """Return the gradients of a detector under the official names of its parameters."""
    from widekernel.models.layouts.registry import layouts_of
    (layout, *_) = layouts_of(detector.backbone.body)
    result = {}
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        g = parameter.grad
        if name.startswith("backbone.body."):
            o, rule = layout.to_official(name.removeprefix("backbone.body."))
            name = "backbone." + o
        name = name.replace("backbone.norms.", "backbone.norm")
        result[name] = g
    return result
