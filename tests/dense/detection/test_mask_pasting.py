"""Masks of boxes on the pixels of an image."""

from __future__ import annotations

import pytest
import torch

from widekernel.dense.detection.mask_pasting import paste_masks, sample_mask
from widekernel.errors import ArgumentError, ShapeError


def test_full_mask_covers_the_pixels_with_centers_in_the_box() -> None:
    boxes = torch.tensor([[2.0, 1.0, 5.0, 4.0], [2.4, 1.6, 4.6, 3.4]])
    pasted = paste_masks(torch.ones(2, 28, 28), boxes, 6, 8)
    expected = torch.zeros(2, 6, 8, dtype=torch.bool)
    expected[0, 1:4, 2:5] = True
    expected[1, 2:3, 2:5] = True
    assert torch.equal(pasted, expected)


@pytest.mark.parametrize("threshold", [0.01, 0.5])
def test_only_the_part_around_the_box_matters(threshold: float) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(30, 2, generator=generator) * 100 - 20
    boxes = torch.cat([corners, corners + torch.rand(30, 2, generator=generator) * 120], 1)
    masks = torch.rand(30, 14, 14, generator=generator)
    whole = torch.stack([sample_mask(*parts, range(70), range(90)) for parts in zip(masks, boxes)])
    assert torch.equal(paste_masks(masks, boxes, 70, 90, threshold), whole >= threshold)


def test_boxes_without_area_or_outside_the_image() -> None:
    boxes = torch.tensor([[3.0, 3, 3, 6], [3, 6, 7, 3], [50, 50, 60, 60], [-20, 0, -10, 8]])
    assert not paste_masks(torch.ones(4, 28, 28), boxes, 8, 8).any()


def test_no_masks() -> None:
    assert paste_masks(torch.empty(0, 28, 28), torch.empty(0, 4), 5, 6).shape == (0, 5, 6)


def test_errors() -> None:
    with pytest.raises(ArgumentError, match="threshold of masks is 0"):
        paste_masks(torch.ones(1, 28, 28), torch.ones(1, 4), 5, 5, 0)
    with pytest.raises(ShapeError, match="boxes"):
        paste_masks(torch.ones(2, 28, 28), torch.ones(1, 4), 5, 5)
