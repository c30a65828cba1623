"""Cascade Mask R-CNN and Mask R-CNN against the official ones, from images to masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.parity.downstream.arrays import Golden
from tests.parity.downstream.two_stage import create, load
from widekernel.dense.detection.structures import Detections, ImageSize
from widekernel.dense.detection.two_stage import TwoStageDetector

EVALUATED = [
    "det_cascade_convnext_mini_s505",
    "det_cascade_replknet_mini_s302",
    "det_cascade_slak_mini_s400",
    "det_mask_convnext_mini_s600",
]


class Recorder:
    """Inputs and outputs of modules during a forward pass."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[Tensor, ...]] = {}
        self.outputs: dict[str, Tensor] = {}

    def watch(self, module: nn.Module, name: str) -> None:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            key = name.format(sum(each.startswith(name.split("{")[0]) for each in self.outputs))
            self.inputs[key], self.outputs[key] = inputs, output

        module.register_forward_hook(keep)


@pytest.mark.parametrize("case", EVALUATED)
def test_detections(case: str, shared: Path, tmp_path: Path) -> None:
    golden = Golden(shared, case)
    detector = create(golden.manifest["config"]).eval()
    load(detector, golden, tmp_path)
    recorder = record(detector)
    with torch.inference_mode():
        found = detector(golden.images(), golden.sizes())
        check_stages(golden, recorder)
        resized = detector(golden.images(), [ImageSize(size.height, size.width) for size in golden.sizes()])
    check_detections(golden, "", found)
    check_detections(golden, "norescale:", resized)


def record(detector: TwoStageDetector) -> Recorder:
    recorder, head = Recorder(), detector.roi_head
    recorder.watch(detector.backbone, "feat")
    recorder.watch(detector.neck, "fpn")
    recorder.watch(detector.rpn_head, "rpn")
    recorder.watch(head.box_features, "box_features{}")
    for stage, (box_head, mask_head) in enumerate(zip(head.box_heads, head.mask_heads)):
        recorder.watch(box_head, f"box{stage}")
        recorder.watch(mask_head, f"mask{stage}")
    recorder.watch(head.mask_features, "mask_features")
    return recorder


def check_stages(golden: Golden, recorder: Recorder) -> None:
    outputs = recorder.outputs
    for level in range(4):
        golden.check(f"feat{level}", outputs["feat"][level], 2e-5)
    for level in range(5):
        golden.check(f"fpn{level}", outputs["fpn"][level], 2e-5)
        golden.check(f"rpn_cls{level}", outputs["rpn"].logits[level], 2e-5)
        golden.check(f"rpn_reg{level}", outputs["rpn"].deltas[level], 2e-5)
    stages = sum(name.endswith("_rois") and name.startswith("s") for name in golden.arrays)
    assert stages in (1, 3)
    for stage in range(stages):
        golden.check(f"s{stage}_rois", recorder.inputs[f"box_features{stage}"][1], 0, 1e-3)
        golden.check(f"s{stage}_roi_feats", outputs[f"box_features{stage}"], 3e-4)
        golden.check(f"s{stage}_cls", outputs[f"box{stage}"].logits, 3e-4)
        golden.check(f"s{stage}_reg", outputs[f"box{stage}"].deltas, 3e-4)
        golden.check(f"mask{stage}_logits", outputs[f"mask{stage}"], 3e-4)
    golden.check("mask_rois", recorder.inputs["mask_features"][1], 0, 1e-3)


def check_detections(golden: Golden, prefix: str, found: list[Detections]) -> None:
    for image, each in enumerate(found):
        expected = golden[f"{prefix}dets_img{image}"]
        assert each.boxes.shape == expected[:, :4].shape
        assert (each.boxes - expected[:, :4]).abs().max() <= 1e-3
        assert (each.scores - expected[:, 4]).abs().max() <= 1e-5
        assert torch.equal(each.labels, golden[f"{prefix}labels_img{image}"])
        assert torch.equal(each.labels.bincount(minlength=5), golden[f"{prefix}result_counts_img{image}"])
        assert each.masks is not None
        # The reference groups masks by class.
        ours = each.masks[each.labels.argsort(stable=True)]
        shape = golden.arrays[f"{prefix}masks_img{image}|shape"]
        theirs = golden.bits(f"{prefix}masks_img{image}|packed", int(shape[2]))
        assert ours.shape == theirs.shape
        assert (ours != theirs).sum((1, 2)).max() <= 2
        assert theirs.any()
