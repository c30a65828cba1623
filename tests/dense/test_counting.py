"""Counts of networks for dense prediction."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from widekernel.analysis.complexity import complexity
from widekernel.dense.backbone import build_pyramid
from widekernel.dense.counting import FixedBoxes, countable
from widekernel.dense.detection.fcos import Fcos, FcosOptions
from widekernel.dense.detection.two_stage import CascadeRCNN, cascade_options
from widekernel.dense.segmentation import Segmenter, SegmenterOptions

SIZE = (3, 64, 96)


def macs(network: nn.Module) -> int:
    return complexity(network, SIZE).training.macs


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_segmenter() -> None:
    """The auxiliary head does not run."""
    pyramid = build_pyramid("slak_nano")
    with_head, without = (
        Segmenter(pyramid, SegmenterOptions(5, channels=16, auxiliary_channels=width)) for width in (8, None)
    )
    assert macs(with_head) == macs(without) > macs(pyramid) > 0
    counted = complexity(with_head, SIZE)
    assert counted.training.params == parameters(with_head) > parameters(without)
    assert counted.folded.params < counted.training.params
    assert countable(with_head) is with_head


def test_fcos() -> None:
    fcos = Fcos(build_pyramid("slak_nano"), FcosOptions(5, 64))
    counted = complexity(fcos, SIZE)
    assert counted.training.params == parameters(fcos)
    assert counted.training.macs > macs(fcos.backbone)
    assert fcos.training


def test_boxes_of_two_stage_detectors() -> None:
    """Operations grow by the same amount with each box and each mask."""
    with torch.device("meta"):
        cascade = CascadeRCNN(build_pyramid("slak_nano"), cascade_options(5))
    base, boxes, masks = (macs(FixedBoxes(cascade, *counts)) for counts in ((10, 5), (20, 5), (10, 10)))
    assert boxes > base
    assert masks > base
    assert macs(cascade) == base + (boxes - base) // 10 * 990 + (masks - base) // 5 * 95


def test_two_stage_detectors_without_masks() -> None:
    with torch.device("meta"):
        cascade = CascadeRCNN(build_pyramid("slak_nano"), cascade_options(5, masks=False))
    assert macs(cascade) == macs(FixedBoxes(cascade, 1000, 0))


@pytest.mark.parametrize("name", ["slak_nano", "resnet18"])
def test_any_other_network(name: str) -> None:
    pyramid = build_pyramid(name)
    assert countable(pyramid) is pyramid
