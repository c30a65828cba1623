"""Random changes to images with labels, and the views of evaluation."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from widekernel.data.seeding import scoped_seed
from widekernel.data.segmentation.batches import LabeledScene, SegmentationViews
from widekernel.data.segmentation.config import SegmentationDataConfig
from widekernel.data.segmentation.photometric import distort, from_hsv, scaled, to_hsv
from widekernel.data.segmentation.transforms import CROP_TRIES, EvaluationTransform, TrainingTransform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def scene_of(height: int, width: int, labels: np.ndarray | None = None) -> LabeledScene:
    """Return a scene whose pixels tell their place: red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([columns % 256, rows % 256, (rows + columns) % 256]).astype(np.uint8)
    numbers = np.zeros((height, width), np.uint8) if labels is None else labels
    return LabeledScene(torch.from_numpy(image), torch.from_numpy(numbers))


def test_crops_match_their_labels() -> None:
    """Without changes of scale and color, image and labels are the same window, flipped together."""
    config = SegmentationDataConfig(
        image_scale=(120, 90), ratio_range=(1.0, 1.0), crop_size=40, photometric=False, cat_max_ratio=1.0
    )
    scene = scene_of(90, 120)
    scene = scene._replace(labels=scene.image[0].clone())
    transform = TrainingTransform(config, (0.0,) * 3, (1.0,) * 3)
    flips, places = 0, set()
    for seed in range(60):
        with scoped_seed(seed):
            image, labels = transform(scene)
        assert image.shape == (3, 40, 40) and labels.shape == (40, 40) and labels.dtype == torch.int64
        assert torch.equal((image[0] * 255).round().long(), labels)
        flips += int(labels[0, 0] > labels[0, 1])
        places.add((int(labels.min()), round(float(image[1, 0, 0]) * 255)))
    assert 15 <= flips <= 45 and len(places) > 50
    assert max(column for column, _ in places) > 60 and max(row for _, row in places) > 35


def test_small_images_are_padded() -> None:
    """At the right and below, with zeros after normalization and the ignored value."""
    config = SegmentationDataConfig(image_scale=(40, 30), ratio_range=(1.0, 1.0), crop_size=64, photometric=False, flip=0)
    image, labels = TrainingTransform(config, MEAN, STD)(scene_of(30, 40))
    assert (labels[:30, :40] == 0).all() and (labels[30:] == 255).all() and (labels[:, 40:] == 255).all()
    assert (image[:, 30:] == 0).all() and (image[:, :, 40:] == 0).all()
    assert image[0, 0, 0] == pytest.approx((0 - MEAN[0]) / STD[0])


def test_crops_of_one_class_are_drawn_again() -> None:
    """Two thirds of the image are of one class; a crop with at most 75 % of it is found unless ten draws fail."""
    labels = np.zeros((90, 900), np.uint8)
    labels[:, 600:] = 1
    config = SegmentationDataConfig(image_scale=(900, 90), ratio_range=(1.0, 1.0), crop_size=90, photometric=False, flip=0)
    once = replace(config, cat_max_ratio=1.0)
    mixed = {}
    for name, each in (("again", config), ("once", once)):
        transform, count = TrainingTransform(each, MEAN, STD), 0
        for seed in range(100):
            with scoped_seed(seed):
                crop = transform(scene_of(90, 900, labels))[1]
            count += int(0.25 < crop.double().mean() < 0.75)
        mixed[name] = count / 100
    # A draw is mixed with probability p = 45 / 811; one of eleven is with 1 - (1 - p)^11.
    share = 45 / 811
    assert mixed["once"] == pytest.approx(share, abs=0.06)
    assert mixed["again"] == pytest.approx(1 - (1 - share) ** (CROP_TRIES + 1), abs=0.13)


def test_crops_without_labels_are_taken_unchecked() -> None:
    config = SegmentationDataConfig(image_scale=(100, 100), crop_size=32)
    _, labels = TrainingTransform(config, MEAN, STD)(scene_of(100, 100, np.full((100, 100), 255, np.uint8)))
    assert (labels == 255).all()


def test_scales_are_drawn_from_the_range() -> None:
    config = SegmentationDataConfig(image_scale=(200, 100), crop_size=400, photometric=False, flip=0)
    transform, widths = TrainingTransform(config, MEAN, STD), []
    for seed in range(200):
        with scoped_seed(seed):
            labels = transform(scene_of(50, 100))[1]
        widths.append(int((labels[0] != 255).sum()))
        assert abs(int((labels[:, 0] != 255).sum()) - widths[-1] / 2) <= 1
    assert 100 <= min(widths) < 110 and 390 < max(widths) <= 400 and np.mean(widths) == pytest.approx(250, abs=15)


def test_distortion_with_all_colors() -> None:
    """Primary colors survive the conversion, which loses at most a few levels of the others."""
    primary = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [255, 255, 0]], np.uint8).T
    assert to_hsv(primary).T.tolist() == [
        [0, 255, 255],
        [60, 255, 255],
        [120, 255, 255],
        [0, 0, 255],
        [0, 0, 0],
        [30, 255, 255],
    ]
    assert np.array_equal(from_hsv(to_hsv(primary)), primary)
    colors = np.random.RandomState(0).randint(0, 256, (3, 5000)).astype(np.uint8)
    assert np.abs(from_hsv(to_hsv(colors)).astype(int) - colors).max() <= 8
    assert scaled(np.array([0, 100, 200], np.uint8), 1.3, -0.5).tolist() == [0, 129, 255]  # 129.5 is truncated


def test_distortions_are_drawn_independently() -> None:
    gray = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    values = []
    for seed in range(400):
        random.seed(seed)
        values.append(int(distort(gray)[0, 0, 0]))
    # Gray has no hue and no saturation: brightness and contrast leave it alone with probability 1/4.
    assert np.mean(np.array(values) == 100) == pytest.approx(0.25, abs=0.08)
    assert min(values) < 45 and max(values) > 160
    assert torch.equal(gray, torch.full((3, 4, 4), 100, dtype=torch.uint8)), "the input is not changed"


def test_views_of_evaluation() -> None:
    config = SegmentationDataConfig(image_scale=(200, 50), test_ratios=(0.5, 1.0, 1.75))
    views = EvaluationTransform(config, MEAN, STD)(scene_of(30, 40)._replace(name="a"))
    assert [tuple(view.shape) for view in views.views] == [(3, 25, 33), (3, 50, 67), (3, 87, 116)]
    assert [size.original for size in views.sizes] == [(30, 40)] * 3 and views.labels.shape == (30, 40)
    batch = SegmentationViews.collate([views, EvaluationTransform(config, MEAN, STD)(scene_of(40, 30)._replace(name="b"))])
    assert [tuple(images.shape) for images in batch.images] == [(2, 3, 33, 33), (2, 3, 67, 67), (2, 3, 116, 116)]
    assert batch.names == ["a", "b"] and [labels.shape for labels in batch.labels] == [(30, 40), (40, 30)]
    assert [(size.height, size.width) for size in batch.sizes[1]] == [(50, 67), (67, 50)]
    assert (batch.images[0][0, :, 25:] == 0).all()
