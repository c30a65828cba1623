"""FCOS against the official one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parity.downstream.arrays import Golden
from widekernel.dense.detection.anchors import grid_points
from widekernel.dense.detection.fcos_targets import centerness, fcos_targets, point_ranges
from widekernel.dense.detection.structures import Targets

BOUNDS, STRIDES = (64.0, 128.0, 256.0, 512.0), (8, 16, 32, 64, 128)


def test_targets_of_stored_boxes(shared: Path) -> None:
    golden = Golden(shared, "det_ops_s700")
    points = grid_points([(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)], STRIDES)
    ranges = point_ranges(BOUNDS, list(map(len, points)))
    wanted = fcos_targets(torch.cat(points), ranges, [Targets(golden["in:fcos_gt"], golden["in:fcos_gt_labels"])])
    parts = [part[0].split(list(map(len, points))) for part in wanted]
    for level, (labels, distances) in enumerate(zip(*parts)):
        # Officially, the background is the class after the last one.
        assert torch.equal(torch.where(labels < 0, 5, labels), golden[f"fcos:labels{level}"].long())
        positive = distances[labels >= 0]
        golden.check(f"fcos:pos_targets{level}", positive, 1e-7)
        golden.check(f"fcos:pos_centerness{level}", centerness(positive), 1e-6)
