"""Random changes to images with objects, and batches of several sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from widekernel.data.detection import transforms
from widekernel.data.detection.batches import AnnotatedImage, DetectionCollate
from widekernel.data.detection.config import DetectionDataConfig
from widekernel.data.detection.transforms import EvaluationTransform, TrainingTransform
from widekernel.data.seeding import scoped_seed
from widekernel.dense.detection.structures import Targets

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SMALL = {"image_scale": (160, 96), "short_sides": (64, 96), "crop_short_sides": (80,), "crop_range": (48, 72)}


def marked(height: int = 60, width: int = 80) -> AnnotatedImage:
    """Return an image whose only objects are bright rectangles, so that pixels, masks and boxes can be compared."""
    boxes = torch.tensor([[10.0, 5.0, 30.0, 25.0], [40.0, 30.0, 75.0, 55.0]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    image = 200 * masks.sum(0, dtype=torch.uint8).expand(3, -1, -1).contiguous()
    return AnnotatedImage(image, Targets(boxes, torch.tensor([1, 2]), masks), 7, "a.png")


def extent(mask: torch.Tensor) -> list[int]:
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def test_flip_crop_and_resize_keep_objects_in_place() -> None:
    item = marked()
    image, targets = transforms.flipped(item.image, item.targets)
    assert targets.boxes.tolist() == [[50, 5, 70, 25], [5, 30, 40, 55]]
    assert targets.masks is not None
    assert [extent(mask) for mask in targets.masks] == targets.boxes.int().tolist()
    assert torch.equal(image[0] > 0, targets.masks.any(0))
    image, targets = transforms.cropped(item.image, item.targets, 20, 25, 30, 40)
    assert targets.boxes.tolist() == [[0, 0, 5, 5], [15, 10, 40, 30]], "boxes are cut to the window"
    image, targets = transforms.cropped(item.image, item.targets, 25, 25, 30, 40)
    assert targets.boxes.tolist() == [[15, 5, 40, 30]] and targets.labels.tolist() == [2], (
        "what is left of nothing is dropped"
    )
    assert targets.masks is not None
    assert torch.equal(image[0] > 0, targets.masks[0].bool())
    image, targets = transforms.cropped(item.image, item.targets, 0, 0, 5, 9)
    assert image.shape == (3, 5, 9) and targets.boxes.shape == (0, 4) and targets.labels.shape == (0,), "it may be empty"
    assert targets.masks is not None and targets.masks.shape == (0, 5, 9)
    image, targets = transforms.resized(item.image, item.targets, (200, 120))
    assert image.shape == (3, 120, 160) and targets.boxes.tolist() == [[20, 10, 60, 50], [80, 60, 150, 110]]
    assert targets.masks is not None
    assert [extent(mask) for mask in targets.masks] == targets.boxes.int().tolist()


def test_objects_that_lose_their_area_by_rounding_are_dropped() -> None:
    """A crop may leave a sliver of an object at its border, whose sides are the same number once it is resized."""
    image, masks = torch.zeros(3, 30, 1000, dtype=torch.uint8), torch.zeros(2, 30, 1000, dtype=torch.uint8)
    masks[1, 10:20, 10:20] = 1
    left = float(np.nextafter(np.float32(1000), np.float32(0)))
    targets = Targets(torch.tensor([[left, 10.0, 1000.0, 20.0], [10.0, 10.0, 20.0, 20.0]]), torch.tensor([1, 2]), masks)
    assert (targets.boxes[:, 2:] > targets.boxes[:, :2]).all()
    for long_side in (700, 701, 702, 1000):
        small, kept = transforms.resized(image, targets, (long_side, 60))
        assert (kept.boxes[:, 2:] > kept.boxes[:, :2]).all() and kept.masks is not None
        assert kept.labels.tolist() == ([2] if long_side == 702 else [1, 2])
        assert kept.masks.shape == (len(kept.labels), *small.shape[1:]) and kept.masks[-1].any()


def test_objects_stay_with_their_pixels_in_training() -> None:
    config = DetectionDataConfig(**SMALL)
    transform = TrainingTransform(config, (0.0,) * 3, (1.0,) * 3)
    shapes = set()
    for seed in range(150):
        with scoped_seed(seed):
            item = transform(marked())
        targets = item.targets
        assert targets.masks is not None
        assert targets.masks.shape == (len(targets.labels), *item.image.shape[1:])
        assert (item.size.height, item.size.width) == item.image.shape[1:] and item.size.original == (60, 80)
        assert min(item.image.shape[1:]) <= 96 and max(item.image.shape[1:]) <= 160
        if len(targets.labels):
            inside = targets.masks.any(0)
            # Resampling blurs the border of the bright rectangles, and rounds that of the masks to whole pixels.
            assert ((item.image[0] > 0.4) != inside).double().mean() < 0.06
            assert (targets.boxes[:, 2:] > targets.boxes[:, :2]).all()
            # A pixel is lost or won at each of two resizings, of which the second doubles the first one's.
            for mask, box in zip(targets.masks, targets.boxes):
                assert not mask.any() or np.abs(np.array(extent(mask)) - box.numpy()).max() < 3
        shapes.add(tuple(item.image.shape[1:]))
    assert len(shapes) > 20


def test_sizes_of_training_without_crops() -> None:
    config = DetectionDataConfig(short_sides=(30, 45), image_scale=(160, 96), crop=False)
    shapes = set()
    for seed in range(40):
        with scoped_seed(seed):
            item = TrainingTransform(config, MEAN, STD)(marked())
        shapes.add(tuple(item.image.shape[1:]))
        assert item.size.scale_x == np.float32(item.size.width / 80)
    assert shapes == {(30, 40), (45, 60)}


def test_crops_are_taken_from_half_of_the_images() -> None:
    """Without crop, the ratio of an image is that of the original one."""
    transform, kept = TrainingTransform(DetectionDataConfig(**SMALL), MEAN, STD), 0
    for seed in range(200):
        with scoped_seed(seed):
            height, width = transform(marked()).image.shape[1:]
        kept += abs(width / height - 80 / 60) < 0.01
    assert 80 <= kept <= 125


def test_batches_are_padded_to_multiples() -> None:
    config = DetectionDataConfig(image_scale=(100, 70))
    items = [EvaluationTransform(config, MEAN, STD)(marked()), EvaluationTransform(config, MEAN, STD)(marked(80, 60))]
    batch = DetectionCollate(32)(items)
    assert batch.images.shape == (2, 3, 96, 96) and batch.ids == [7, 7] and batch.names == ["a.png"] * 2
    assert [(size.height, size.width) for size in batch.sizes] == [(70, 93), (93, 70)]
    assert (batch.images[0, :, 70:] == 0).all() and (batch.images[0, :, :, 93:] == 0).all()
    assert [len(targets.labels) for targets in batch.targets] == [0, 0]
    training = TrainingTransform(replace(config, crop=False, flip=0.0, short_sides=(70,)), MEAN, STD)
    masks = DetectionCollate(32)([training(marked())]).targets[0].masks
    assert masks is not None
    assert masks.shape == (2, 96, 96) and masks.dtype == torch.uint8 and not masks[:, 70:].any()
