"""Checks of what a detector is trained on."""

from __future__ import annotations

import pytest
import torch

from widekernel.dense.detection.structures import ImageSize, Targets
from widekernel.dense.detection.target_checks import check_sizes, check_targets, mark_unsound
from widekernel.errors import DataError, ShapeError

IMAGES = torch.zeros(2, 3, 32, 48)
SIZES = [ImageSize(30, 48), ImageSize(32, 40)]


def targets(boxes: list, labels: list, masks: torch.Tensor | None = None) -> list[Targets]:
    """Return targets for two images, the first of which has no objects."""
    none = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 32, 48, dtype=torch.uint8))
    return [none, Targets(torch.tensor(boxes, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64), masks)]


def test_good_targets() -> None:
    assert check_targets(IMAGES, SIZES, targets([[1, 2, 3, 4]], [4]), 5)
    masks = torch.zeros(1, 32, 48, dtype=torch.uint8)
    assert check_targets(IMAGES, SIZES, targets([[1, 2, 3, 4]], [0], masks), 5, masks=True)


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        (
            [[1, 2, 3, 4], [5, 5, 5, 9]],
            [0, 0],
            r"A box of image 1 of the batch is \[5.0, 5.0, 5.0, 9.0\].*x1 < x2 and y1 < y2",
        ),
        ([[5, 9, 6, 3]], [0], r"A box of image 1 .* is \[5.0, 9.0, 6.0, 3.0\]"),
        ([[1, 2, float("nan"), 4]], [0], r"A box of image 1 .* is \[1.0, 2.0, nan, 4.0\].*finite"),
        ([[1, 2, float("inf"), 4]], [0], "finite"),
        (
            [[1, 2, 3, 4], [1, 2, 3, 4]],
            [4, 5],
            "A label of image 1 of the batch is 5, but the detector has the classes 0 to 4",
        ),
        ([[1, 2, 3, 4]], [-1], "A label of image 1 of the batch is -1"),
    ],
)
def test_wrong_values(boxes: list, labels: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_targets(IMAGES, SIZES, targets(boxes, labels), 5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Targets(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)), r"boxes of image 1 are .* shape \(2, 5\)"),
        (Targets(torch.zeros(0), torch.zeros(0, dtype=torch.int64)), r"\(0, 4\) if there are none"),
        (Targets(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)), "must be float32"),
        (Targets(torch.ones(2, 4), torch.zeros(3, dtype=torch.int64)), "one for each of the 2 boxes"),
        (Targets(torch.ones(2, 4), torch.zeros(2)), "must be int64"),
    ],
)
def test_wrong_shapes_and_types(wrong: Targets, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        check_targets(IMAGES, SIZES, [targets([[1, 2, 3, 4]], [0])[0], wrong], 5)


def test_masks() -> None:
    with pytest.raises(DataError, match="Image 1 of the batch has no masks"):
        check_targets(IMAGES, SIZES, targets([[1, 2, 3, 4]], [0]), 5, masks=True)
    wrong = torch.zeros(1, 30, 48, dtype=torch.uint8)
    with pytest.raises(ShapeError, match=r"masks of image 1 have the shape \(1, 30, 48\), but must have \(1, 32, 48\)"):
        check_targets(IMAGES, SIZES, targets([[1, 2, 3, 4]], [0], wrong), 5, masks=True)


def test_numbers_of_images() -> None:
    with pytest.raises(ShapeError, match="There are 2 images, but 1 sizes"):
        check_sizes(IMAGES, SIZES[:1])
    with pytest.raises(ShapeError, match="There are 2 images, but targets for 1"):
        check_targets(IMAGES, SIZES, targets([[1, 2, 3, 4]], [0])[:1], 5)
    with pytest.raises(ShapeError, match=r"must be a batch \(N, C, H, W\)"):
        check_sizes(IMAGES[0], SIZES)


@pytest.mark.parametrize("size", [(0, 48), (33, 48), (32, 49)])
def test_sizes_fit_the_batch(size: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match=f"Image 1 of the batch is said to be {size[0]} x {size[1]} .* batch of 32 x 48"):
        check_sizes(IMAGES, [SIZES[0], ImageSize(*size)])


def test_losses_of_unsound_targets_are_not_numbers() -> None:
    losses = {"cls": torch.tensor(1.0), "box": torch.tensor(2.0)}
    assert mark_unsound(losses, torch.tensor(True)) == losses
    assert all(loss.isnan() for loss in mark_unsound(losses, torch.tensor(False)).values())
