"""The region proposal network against the official one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parity.downstream.arrays import Golden
from widekernel.dense.detection.anchors import AnchorOptions
from widekernel.dense.detection.rpn import ProposalOptions, RpnHead, RpnOptions
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
def test_outputs_on_stored_maps(case: str, shared: Path) -> None:
    """The reference folder stores the coarse maps whole."""
    golden = Golden(shared, f"det_{case}")
    head = RpnHead(32, RpnOptions(proposals=ProposalOptions(300, 80))).eval()
    head.load_state_dict(golden.weights("rpn_head."))
    with torch.no_grad():
        outputs = head([golden["fpn3"], golden["fpn4"]])
    for level, logits, deltas in zip((3, 4), outputs.logits, outputs.deltas):
        golden.check(f"rpn_cls{level}", logits, 2e-5)
        golden.check(f"rpn_reg{level}", deltas, 2e-5)


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
