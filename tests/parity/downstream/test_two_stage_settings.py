"""The settings of the published two-stage detectors are ours by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.downstream.reference import manifest, manifest_names
from widekernel.dense.detection.matching import MatchOptions
from widekernel.dense.detection.roi_options import RoiOptions
from widekernel.dense.detection.rpn import ProposalOptions, RpnOptions
from widekernel.dense.detection.sampling import SampleOptions
from widekernel.dense.detection.two_stage import cascade_options, mask_rcnn_options

NAMES = [name for name in manifest_names() if name.startswith(("cascade_", "mask_"))]


@pytest.mark.parametrize("name", NAMES)
def test_settings(name: str, shared: Path) -> None:
    config = manifest(shared, name)["config"]
    options = (cascade_options if config["type"] == "CascadeRCNN" else mask_rcnn_options)(80)
    assert options.channels == config["neck"]["out_channels"]
    check_rpn(options.rpn, config)
    check_roi(options.roi, config)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def matching(config: dict[str, Any]) -> MatchOptions:
    assert config["ignore_iof_thr"] == -1
    parts = (config[key] for key in ("pos_iou_thr", "neg_iou_thr", "min_pos_iou", "match_low_quality"))
    return MatchOptions(*parts)


def sampling(config: dict[str, Any]) -> SampleOptions:
    assert config["type"] == "RandomSampler"
    assert config["neg_pos_ub"] == -1
    return SampleOptions(config["num"], config["pos_fraction"])


def proposals(config: dict[str, Any]) -> ProposalOptions:
    assert config["min_bbox_size"] == 0
    return ProposalOptions(config["nms_pre"], config["max_per_img"], config["nms"]["iou_threshold"])


def check_rpn(rpn: RpnOptions, config: dict[str, Any]) -> None:
    training = config["train_cfg"]["rpn"]
    assert rpn.training.match == matching(training["assigner"])
    assert rpn.training.sample == sampling(training["sampler"])
    assert (-1 if rpn.training.allowed_border is None else rpn.training.allowed_border) == training["allowed_border"]
    assert rpn.proposals == proposals(config["test_cfg"]["rpn"])
    assert rpn.training_proposals == proposals(config["train_cfg"]["rpn_proposal"])
    assert rpn.smoothing == pytest.approx(config["rpn_head"]["loss_bbox"].get("beta", 0))


def check_roi(roi: RoiOptions, config: dict[str, Any]) -> None:
    head, training, testing = config["roi_head"], listed(config["train_cfg"]["rcnn"]), config["test_cfg"]["rcnn"]
    weights = head.get("stage_loss_weights", [1])
    assert [stage.weight for stage in roi.stages] == weights
    assert [stage.match for stage in roi.stages] == [matching(each["assigner"]) for each in training]
    for stage, box_head, each in zip(roi.stages, listed(head["bbox_head"]), training):
        assert roi.sample == sampling(each["sampler"])
        assert each["sampler"]["add_gt_as_proposals"]
        assert list(stage.stds) == box_head["bbox_coder"]["target_stds"]
        assert roi.convs == box_head.get("num_shared_convs", 0)
        assert roi.fcs == box_head.get("num_shared_fcs", 2)
        assert roi.fc_channels == box_head["fc_out_channels"]
        assert (
            (roi.box_loss == "giou")
            == (box_head["loss_bbox"]["type"] == "GIoULoss")
            == box_head.get("reg_decoded_bbox", False)
        )
        assert roi.box_loss_weight == box_head["loss_bbox"]["loss_weight"]
        assert each["mask_size"] == 2 * roi.mask_size
    assert (roi.score_threshold, roi.overlap_threshold) == (testing["score_thr"], testing["nms"]["iou_threshold"])
    assert (roi.most, roi.mask_threshold) == (testing["max_per_img"], testing["mask_thr_binary"])
    assert roi.box_size == head["bbox_roi_extractor"]["roi_layer"]["output_size"]
    assert roi.mask_size == head["mask_roi_extractor"]["roi_layer"]["output_size"]
