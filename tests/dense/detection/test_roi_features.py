"""Features of regions of interest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from widekernel.dense.detection.roi_features import RoiFeatures, as_rois, roi_levels
from widekernel.errors import ArgumentError, ShapeError

STRIDES = (4, 8, 16, 32)


def maps(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 256 // stride, 320 // stride, generator=generator).to(dtype) for stride in STRIDES]


def rois(count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(count, 2, generator=generator) * 200 - 20
    sides = torch.rand(count, 2, generator=generator).mul(5).exp() * 6
    image = torch.arange(count).remainder(2).unsqueeze(1)
    return torch.cat([image, corners, corners + sides], 1)


def test_levels_change_at_multiples_of_112() -> None:
    sides = torch.tensor([0.0, 1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 5000.0])
    boxes = torch.stack([torch.zeros(9), torch.zeros(9), sides * 2, sides / 2], 1)
    assert roi_levels(boxes, 4).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert roi_levels(boxes, 2).tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_each_roi_is_sampled_on_its_level_alone() -> None:
    features = [map_.requires_grad_() for map_ in maps()]
    levels = roi_levels(rois()[:, 1:], 4)
    assert levels.unique().tolist() == [0, 1, 2, 3]
    found = RoiFeatures(7, STRIDES)(features, rois())
    expected = [
        roi_align(features[level], roi[None], 7, 1 / STRIDES[level], 0, True) for level, roi in zip(levels.tolist(), rois())
    ]
    assert torch.equal(found, torch.cat(expected))
    weights = torch.randn(found.shape)
    ours = torch.autograd.grad((found * weights).sum(), features)
    theirs = torch.autograd.grad((torch.cat(expected) * weights).sum(), features)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)


def test_no_rois() -> None:
    features = [map_.requires_grad_() for map_ in maps()]
    found = RoiFeatures(7, STRIDES)(features, torch.empty(0, 5))
    assert found.shape == (0, 3, 7, 7)
    found.sum().backward()
    assert all(map_.grad is not None and not map_.grad.any() for map_ in features)


def test_half_precision_is_sampled_in_float32() -> None:
    features = maps(torch.bfloat16)
    found = RoiFeatures(7, STRIDES)(features, rois())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, RoiFeatures(7, STRIDES)([map_.float() for map_ in features], rois()).bfloat16())


def test_rois_of_a_batch() -> None:
    found = as_rois([torch.zeros(0, 4), torch.ones(2, 4), torch.full((1, 4), 7.0)])
    assert found.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [2, 7, 7, 7, 7]]
    with pytest.raises(ArgumentError, match="at least one image"):
        as_rois([])


def test_missing_level() -> None:
    with pytest.raises(ShapeError, match="a map for each of the strides"):
        RoiFeatures(7, STRIDES)(maps()[:3], rois())
