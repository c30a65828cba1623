"""Cascade Mask R-CNN and Mask R-CNN against the official ones, from images to masks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.downstream.arrays import Golden, filler
from tests.parity.downstream.gradients import check_gradients, official_gradients
from tests.parity.downstream.two_stage import official_detector
from widekernel.dense.detection import roi_head
from widekernel.dense.detection.box_coding import encode_deltas
from widekernel.dense.detection.roi_features import as_rois
from widekernel.dense.detection.roi_targets import RoiSample
from widekernel.dense.detection.structures import Detections, ImageSize, Targets
from widekernel.dense.detection.two_stage import TwoStageDetector

EVALUATED = [
    "det_cascade_convnext_mini_s505",
    "det_cascade_replknet_mini_s302",
    "det_cascade_slak_mini_s400",
    "det_mask_convnext_mini_s600",
]
TRAINED = [
    "det_cascade_convnext_mini_train_s564",
    "det_cascade_replknet_mini_train_s364",
    "det_cascade_slak_mini_train_s463",
    "det_mask_convnext_mini_train_s660",
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
    detector = official_detector(shared, golden, tmp_path).eval()
    recorder = record(detector)
    with torch.inference_mode():
        found = detector(golden.images(), golden.sizes())
        check_stages(golden, recorder)
        resized = detector(golden.images(), [ImageSize(size.height, size.width) for size in golden.sizes()])
        exact = detector.double()(golden.images().double(), golden.sizes())
        rounding = most_by_rounding(detector, golden, exact)
    check_detections(golden, "", found, exact, rounding)
    check_detections(golden, "norescale:", resized, exact, rounding)


def most_by_rounding(detector: TwoStageDetector, golden: Golden, exact: list[Detections]) -> float:
    """Return by how much rounding to float32 may change scores: twice what perturbing the weights by 4e-7 does.

    Such perturbations leave the order of the detections as it is: the cases were chosen so. How much scores change depends
    on the case (1e-6 to 3e-5), and how much they change by rounding also on the processor and PyTorch's kernels for it.
    """
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for _ in range(3):
        perturbed = copy.deepcopy(detector)
        for weight in perturbed.parameters():
            weight.mul_(1 + 4e-7 * (2 * torch.rand(weight.shape, dtype=torch.float64, generator=generator) - 1))
        for one, other in zip(perturbed(golden.images().double(), golden.sizes()), exact, strict=True):
            largest = max(largest, float((one.scores - other.scores).abs().max()))
    assert 0 < largest < 1e-4
    return max(1e-5, 2 * largest)


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


def check_detections(golden: Golden, prefix: str, found: list[Detections], exact: list[Detections], rounding: float) -> None:
    for image, (each, in_float64) in enumerate(zip(found, exact, strict=True)):
        expected = golden[f"{prefix}dets_img{image}"]
        assert each.boxes.shape == expected[:, :4].shape
        assert (each.boxes - expected[:, :4]).abs().max() <= 1e-3
        # The reference is in float32. Its rounding and ours would add up, so both are compared with float64.
        assert (in_float64.scores - expected[:, 4]).abs().max() <= 1e-5
        assert (each.scores - in_float64.scores).abs().max() <= rounding
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


@pytest.mark.parametrize("case", TRAINED)
def test_training_step(case: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden(shared, case)
    detector = official_detector(shared, golden, tmp_path).train()
    samples = kept_results(monkeypatch, "sample_rois")
    masks = kept_results(monkeypatch, "mask_targets")
    recorder = record(detector)
    targets = golden.targets(5)
    losses = detector(golden.images(), golden.sizes(), targets, seeds=[3, 8])
    check_losses(golden, losses)
    sum(losses.values()).backward()
    check_gradients(golden, official_gradients(detector), 2e-2)
    for stage, found in enumerate(samples):
        check_targets(golden, detector, stage, found, targets)
        golden.check(f"s{stage}_cls", recorder.outputs[f"box{stage}"].logits, 3e-4)
        golden.check(f"s{stage}_reg", recorder.outputs[f"box{stage}"].deltas, 3e-4)
        golden.check(f"s{stage}_mask_targets", torch.cat(masks[2 * stage : 2 * stage + 2]), 0)


def kept_results(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Keep what a function of the second stage returns, call by call."""
    function, results = getattr(roi_head, name), []

    def keep(*args: Any) -> Any:
        results.append(function(*args))
        return results[-1]

    monkeypatch.setattr(roi_head, name, keep)
    return results


def check_losses(golden: Golden, losses: dict[str, Tensor]) -> None:
    expected = dict(zip(golden.arrays["loss_names"].tolist(), golden.arrays["loss_values"].tolist()))
    assert sum(losses.values()).item() == pytest.approx(expected["loss"], rel=1e-5)
    wanted = {}
    for name, value in expected.items():
        stage, _, what = name.rpartition(".")
        if what.startswith("loss_"):
            prefix = f"stage{int(stage[1:]) + 1}_" if stage else "" if "rpn" in what else "roi_"
            wanted[prefix + what.removeprefix("loss_").replace("bbox", "box")] = value
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(wanted, rel=1e-5)


def check_targets(
    golden: Golden, detector: TwoStageDetector, stage: int, samples: list[RoiSample], targets: list[Targets]
) -> None:
    rois = as_rois([sample.boxes for sample in samples])
    golden.check(f"s{stage}_rois", rois, 0, 1e-3)
    labels = torch.cat([sample.labels for sample in samples])
    assert torch.equal(labels, golden[f"s{stage}_labels"])
    positive = [sample.labels[: len(sample.matched)] for sample in samples]
    assert torch.equal(torch.cat(positive), golden[f"s{stage}_mask_labels"])
    expected = golden[f"s{stage}_box_targets"][labels < 5]
    wanted = torch.cat([target.boxes[sample.matched] for target, sample in zip(targets, samples)])
    if detector.options.roi.box_loss == "l1":
        wanted = encode_deltas(rois[labels < 5, 1:], wanted, detector.options.roi.stages[stage].stds)
    assert (wanted - expected).abs().max() <= 1e-3


@pytest.mark.full
def test_full_size(shared: Path, tmp_path: Path) -> None:
    """Stored RoIs, since the proposals of drawn weights mean nothing."""
    golden = Golden(shared, "full_cascade_convnext_tiny_s805")
    detector = official_detector(shared, golden, tmp_path).eval()
    images = torch.from_numpy(filler(shared).make_input(golden.row["input_seed"], golden.row["input_shape"]))
    head, rois = detector.roi_head, golden["rois"]
    with torch.inference_mode():
        features = detector.backbone(images)
        maps = detector.neck(features)
        rpn = detector.rpn_head(maps)
        for level in range(5):
            if level < 4:
                golden.check(f"feat{level}", features[level], 2e-5)
            golden.check(f"fpn{level}", maps[level], 2e-5)
            golden.check(f"rpn_cls{level}", rpn.logits[level], 2e-5)
            golden.check(f"rpn_reg{level}", rpn.deltas[level], 2e-5)
        for stage in range(3):
            outputs = head.box_heads[stage](head.box_features(maps, rois))
            golden.check(f"s{stage}_cls", outputs.logits, 2e-5)
            golden.check(f"s{stage}_reg", outputs.deltas, 2e-5)
            masks = head.mask_heads[stage](head.mask_features(maps, rois[:3]))
            golden.check(f"mask{stage}_logits", masks, 2e-5)
