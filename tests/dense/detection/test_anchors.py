"""Anchors and points."""

from __future__ import annotations

import pytest
import torch

from widekernel.dense.detection.anchors import AnchorOptions, covered_cells, grid_anchors, grid_points, inside
from widekernel.errors import ArgumentError


def test_anchors_are_centered_on_the_corners_of_cells_and_share_their_area() -> None:
    options = AnchorOptions(strides=(16,), scale=2.0, ratios=(0.25, 1.0, 4.0))
    (anchors,) = grid_anchors([(2, 3)], options)
    anchors = anchors.view(2, 3, 3, 4)
    centers = (anchors[..., :2] + anchors[..., 2:]) / 2
    assert torch.equal(centers[1, 2], torch.tensor([[32.0, 16.0]]).expand(3, 2))
    width, height = (anchors[..., 2:] - anchors[..., :2]).unbind(-1)
    torch.testing.assert_close(width * height, torch.full((2, 3, 3), 32.0**2))
    torch.testing.assert_close(height / width, torch.tensor(options.ratios).expand(2, 3, 3))


def test_points_are_the_centers_of_cells_by_rows() -> None:
    (points,) = grid_points([(2, 3)], [8])
    assert points.tolist() == [[4.0, 4.0], [12.0, 4.0], [20.0, 4.0], [4.0, 12.0], [12.0, 12.0], [20.0, 12.0]]


@pytest.mark.parametrize(("area", "cells"), [((32, 64), (2, 4)), ((33, 49), (3, 4)), ((1, 1), (1, 1)), ((999, 999), (4, 5))])
def test_cells_that_an_area_covers(area: tuple[int, int], cells: tuple[int, int]) -> None:
    assert covered_cells((4, 5), area, 16) == cells


def test_the_border_is_strict_on_the_right_and_below() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10.5, 10], [-0.5, 0, 10, 10], [0, 0, 10, 11]])
    assert inside(boxes, (11, 10.5), 0).tolist() == [True, False, False, False]
    assert inside(boxes, (11, 10.5), 1).tolist() == [True, True, True, True]


@pytest.mark.parametrize(
    "wrong", [{"strides": ()}, {"strides": (4, 0)}, {"scale": -1.0}, {"ratios": ()}, {"ratios": (0.0,)}]
)
def test_settings_are_positive(wrong: dict) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(wrong))} of anchors are .* must be positive"):
        AnchorOptions(**wrong)


def test_every_map_has_a_stride() -> None:
    with pytest.raises(ArgumentError, match="There are 2 maps, but anchors for 5 strides"):
        grid_anchors([(2, 2), (1, 1)], AnchorOptions())
