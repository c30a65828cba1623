"""Comparison of a detector with its folded form."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.dense.detection.shapes import small_detector
from torch import nn

import widekernel
from widekernel.tasks.folding import FoldError, fold_and_check


@pytest.mark.parametrize("part", ["backbone.norms.0", "neck", "roi_head.bbox_head.1", "roi_head.mask_head.2"])
def test_every_part_of_a_detector_is_compared(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = small_detector("cascade").eval()
    for head in detector.roi_head.box_heads:
        nn.init.normal_(head.fc_cls.weight)  # initial scores are too small to be seen beside the maps
    folded, check = fold_and_check(detector, 64, images=1)
    assert check.max_error < 1e-4 and not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())

    def wrong(network: nn.Module) -> nn.Module:
        changed = copy.deepcopy(network)
        with torch.no_grad():
            for parameter in changed.get_submodule(part).parameters():
                parameter.mul_(1.5)
        return changed

    monkeypatch.setattr(widekernel, "fold", wrong)
    with pytest.raises(FoldError, match="Outputs of the folded network differ"):
        fold_and_check(detector, 64, images=1)
