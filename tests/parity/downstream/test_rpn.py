"""The region proposal network against the official one, on stored maps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parity.downstream.arrays import Golden
from widekernel.dense.detection.anchors import AnchorOptions
from widekernel.dense.detection.matching import MatchOptions
from widekernel.dense.detection.rpn import ProposalOptions, RpnHead, RpnOptions, RpnOutputs, propose
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


@pytest.mark.parametrize("case", EVALUATED)
def test_outputs_and_proposals(case: str, shared: Path) -> None:
    """Maps that the reference folder only samples are left out of the comparison of outputs."""
    golden = Golden(shared, f"det_{case}")
    head = RpnHead(32, RpnOptions(proposals=ProposalOptions(300, 80))).eval()
    head.load_state_dict(golden.weights("rpn_head."))
    whole = [level for level in range(5) if f"fpn{level}" in golden.arrays]
    assert len(whole) >= 2
    with torch.no_grad():
        outputs = head([golden[f"fpn{level}"] for level in whole])
    for level, logits, deltas in zip(whole, outputs.logits, outputs.deltas):
        golden.check(f"rpn_cls{level}", logits, 2e-5)
        golden.check(f"rpn_reg{level}", deltas, 2e-5)
