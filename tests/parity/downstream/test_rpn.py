"""The region proposal network against the official one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parity.downstream.arrays import Golden
from tests.parity.downstream.gradients import check_gradients
from tests.parity.downstream.two_stage import official_detector
from widekernel.dense.detection.anchors import AnchorOptions
from widekernel.dense.detection.rpn import Proposals
from widekernel.dense.detection.rpn_targets import RpnTrainingOptions, rpn_targets
from widekernel.dense.detection.sampling import SampleOptions

EVALUATED = ["cascade_convnext_mini_s505", "cascade_replknet_mini_s302", "cascade_slak_mini_s400", "mask_convnext_mini_s600"]
TRAINED = [
    "cascade_convnext_mini_train_s564",
    "cascade_replknet_mini_train_s364",
    "cascade_slak_mini_train_s463",
    "mask_convnext_mini_train_s660",
]
MAPS = [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)]
ALL = SampleOptions(100000, 0.5)  # nothing is random in the reference numbers


def training(case: str) -> RpnTrainingOptions:
    return RpnTrainingOptions(sample=ALL, allowed_border=0 if case.startswith("cascade") else None)


@pytest.mark.parametrize("case", EVALUATED)
def test_outputs_and_proposals(case: str, shared: Path, tmp_path: Path) -> None:
    golden = Golden(shared, f"det_{case}")
    detector = official_detector(shared, golden, tmp_path).eval()
    with torch.no_grad():
        maps = detector.neck(detector.backbone(golden.images()))
        outputs = detector.rpn_head(maps)
    for level, (map_, logits, deltas) in enumerate(zip(maps, *outputs)):
        golden.check(f"fpn{level}", map_, 2e-5)
        golden.check(f"rpn_cls{level}", logits, 2e-5)
        golden.check(f"rpn_reg{level}", deltas, 2e-5)
    check_proposals(golden, "proposals", detector.rpn_head.propose(outputs, golden.sizes()))


def check_proposals(golden: Golden, name: str, proposals: list[Proposals]) -> None:
    assert len(proposals) == 2
    for number, (boxes, scores) in enumerate(proposals):
        wanted = golden[f"{name}_img{number}"]
        assert (boxes - wanted[:, :4]).abs().max() <= 1e-3
        assert (scores - wanted[:, 4]).abs().max() <= 1e-5


@pytest.mark.parametrize("case", TRAINED)
def test_losses_and_proposals_in_training(case: str, shared: Path, tmp_path: Path) -> None:
    golden = Golden(shared, f"det_{case}")
    detector = official_detector(shared, golden, tmp_path)
    outputs = detector.rpn_head(detector.neck(detector.backbone(golden.images())))
    losses = detector.rpn_head.losses(outputs, golden.sizes(), golden.targets(5), [0, 0])
    for ours, theirs in (("rpn_cls", "loss_rpn_cls"), ("rpn_box", "loss_rpn_bbox")):
        assert losses[ours].item() == pytest.approx(golden[f"per_level:{theirs}"].sum().item(), rel=1e-5)
    check_proposals(golden, "train_proposals", detector.rpn_head.propose(outputs, golden.sizes()))
    sum(losses.values()).backward()
    gradients = {f"rpn_head.{name}": parameter.grad for name, parameter in detector.rpn_head.named_parameters()}
    check_gradients(golden, gradients, 2e-2, "rpn_head.")


@pytest.mark.parametrize("case", TRAINED)
def test_targets(case: str, shared: Path) -> None:
    golden = Golden(shared, f"det_{case}")
    wanted = rpn_targets(MAPS, golden.sizes(), golden.targets(5), [0, 0], AnchorOptions(), training(case))
    assert [wanted.positive.sum().item(), wanted.negative.sum().item()] == golden["rpn_num_pos_neg"].tolist()
    start = 0
    for level, (rows, columns) in enumerate(MAPS):
        part = slice(start, start + rows * columns * 3)
        sampled = wanted.positive[:, part] | wanted.negative[:, part]
        assert torch.equal(sampled.float(), golden[f"rpn_label_weights{level}"])
        # Officially, class 0 is the object.
        assert torch.equal(wanted.positive[:, part], golden[f"rpn_labels{level}"] == 0)
        golden.check(f"rpn_box_targets{level}", wanted.deltas[:, part], 1e-6)
        start = part.stop
    assert start == wanted.positive.shape[1]
