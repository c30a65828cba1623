"""Transforms of semantic segmentation: those of training, which draw from the global generators, and those of evaluation."""

import random

import torch
from torch import Tensor

from widekernel.data.rescaling import (
    Scale,
    Statistics,
    normalize_image,
    pad_to,
    rescaled_size,
    resize_image,
    resize_labels,
    size_of,
)
from widekernel.data.segmentation.batches import LabeledScene, SceneViews
from widekernel.data.segmentation.config import SegmentationDataConfig
from widekernel.data.segmentation.photometric import distort

CROP_TRIES = 10
"""Number of crops that are judged; the one after them is taken as it is."""


class TrainingTransform:
    """Random scale, crop, flip and colors, then normalization and padding to the size of the crop.

    Args:
        config: settings
        mean: channel means, for pixels from 0 to 1
        std: channel standard deviations, for pixels from 0 to 1
    """

    def __init__(self, config: SegmentationDataConfig, mean: Statistics, std: Statistics) -> None:
        self.config, self.mean, self.std = config, mean, std

    def __call__(self, scene: LabeledScene) -> tuple[Tensor, Tensor]:
        """Return an image `(3, crop, crop)`, float32, and its labels `(crop, crop)`, int64."""
        config = self.config
        height, width = scene.labels.shape
        size = rescaled_size(height, width, scaled_by(config.image_scale, random.uniform(*config.ratio_range)))
        # Only the crop is needed, but its place depends on all labels.
        labels = resize_labels(scene.labels, size)
        rows, columns = self._crop(labels)
        image, labels = resize_image(scene.image, size)[:, rows, columns], labels[rows, columns]
        if random.random() < config.flip:
            image, labels = image.flip(-1), labels.flip(-1)
        if config.photometric:
            image = distort(image)
        side = config.crop_size
        padded = pad_to(normalize_image(image, self.mean, self.std), side, side)
        return padded, pad_to(labels.long(), side, side, config.ignore_index)

    def _crop(self, labels: Tensor) -> tuple[slice, slice]:
        """Return the rows and columns of a crop that no class dominates, or those of the last one that was drawn."""
        for _ in range(CROP_TRIES):
            rows, columns = self._place(labels)
            if self.config.cat_max_ratio == 1 or self._is_mixed(labels[rows, columns]):
                return rows, columns
        return self._place(labels)

    def _place(self, labels: Tensor) -> tuple[slice, slice]:
        top, left = (random.randint(0, max(length - self.config.crop_size, 0)) for length in labels.shape)
        return slice(top, top + self.config.crop_size), slice(left, left + self.config.crop_size)

    def _is_mixed(self, labels: Tensor) -> bool:
        """Return whether there are two classes or more, and the most frequent covers less than the allowed share."""
        labeled = labels[labels != self.config.ignore_index]
        counts = torch.bincount(labeled.flatten())
        return int((counts > 0).sum()) > 1 and int(counts.max()) < self.config.cat_max_ratio * int(counts.sum())


class EvaluationTransform:
    """The image at one or several scales with its ratio kept, normalized; the labels keep their size.

    Args:
        config: settings
        mean: channel means, for pixels from 0 to 1
        std: channel standard deviations, for pixels from 0 to 1
    """

    def __init__(self, config: SegmentationDataConfig, mean: Statistics, std: Statistics) -> None:
        self.mean, self.std = mean, std
        scale = config.test_scale or config.image_scale
        self.scales = [scaled_by(scale, ratio) for ratio in config.test_ratios]

    def __call__(self, scene: LabeledScene) -> SceneViews:
        """Return the views of a labeled image."""
        original = int(scene.labels.shape[0]), int(scene.labels.shape[1])
        resized = [resize_image(scene.image, rescaled_size(*original, scale)) for scale in self.scales]
        views = [normalize_image(view, self.mean, self.std) for view in resized]
        return SceneViews(views, scene.labels.long(), [size_of(view, original) for view in views], scene.name)


def scaled_by(scale: Scale, ratio: float) -> Scale:
    """Return both lengths times a ratio, rounded down."""
    return int(scale[0] * ratio), int(scale[1] * ratio)
