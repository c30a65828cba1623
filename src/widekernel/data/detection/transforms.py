"""Transforms of detection: those of training, which draw from the global generators, and those of evaluation."""

import random

import torch
from torch import Tensor

from widekernel.data.detection.batches import AnnotatedImage, DetectionItem
from widekernel.data.detection.config import DetectionDataConfig
from widekernel.data.rescaling import Scale, Statistics, normalize_image, rescaled_size, resize_image, resize_labels, size_of
from widekernel.dense.detection.structures import Targets


class TrainingTransform:
    """Random flip, crop and scale, then normalization.

    Args:
        config: settings
        mean: channel means, for pixels from 0 to 1
        std: channel standard deviations, for pixels from 0 to 1
    """

    def __init__(self, config: DetectionDataConfig, mean: Statistics, std: Statistics) -> None:
        self.config, self.mean, self.std = config, mean, std

    def __call__(self, item: AnnotatedImage) -> DetectionItem:
        """Return the changed image with its objects."""
        config, original = self.config, (int(item.image.shape[1]), int(item.image.shape[2]))
        image, targets = item.image, item.targets
        if random.random() < config.flip:
            image, targets = flipped(image, targets)
        if config.crop and random.random() < 0.5:
            image, targets = resized(image, targets, self._scale(config.crop_short_sides))
            image, targets = cropped(image, targets, *self._window(image))
        image, targets = resized(image, targets, self._scale(config.short_sides))
        size = size_of(image, original)
        normalized = normalize_image(image, self.mean, self.std)
        return DetectionItem(normalized, size, targets, item.id, item.name)

    def _scale(self, short_sides: tuple[int, ...]) -> Scale:
        short = random.choice(short_sides)
        return max(self.config.image_scale[0], short), short

    def _window(self, image: Tensor) -> tuple[int, int, int, int]:
        """Return the top, left, height and width of a crop."""
        low, high = self.config.crop_range
        sides = [random.randint(min(length, low), min(length, high)) for length in image.shape[1:]]
        places = [random.randint(0, length - side) for length, side in zip(image.shape[1:], sides)]
        return places[0], places[1], sides[0], sides[1]


class EvaluationTransform:
    """The image resized with its ratio kept, and normalized.

    Args:
        config: settings
        mean: channel means, for pixels from 0 to 1
        std: channel standard deviations, for pixels from 0 to 1
    """

    def __init__(self, config: DetectionDataConfig, mean: Statistics, std: Statistics) -> None:
        self.scale, self.mean, self.std = config.image_scale, mean, std

    def __call__(self, item: AnnotatedImage) -> DetectionItem:
        """Return the resized image; the metrics take the objects from the annotation file."""
        original = int(item.image.shape[1]), int(item.image.shape[2])
        image = resize_image(item.image, rescaled_size(*original, self.scale))
        none = Targets(item.targets.boxes[:0], item.targets.labels[:0])
        normalized = normalize_image(image, self.mean, self.std)
        return DetectionItem(normalized, size_of(image, original), none, item.id, item.name)


def flipped(image: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
    """Mirror an image `(3, height, width)` and its objects from left to right."""
    boxes = targets.boxes.clone()
    boxes[:, 0], boxes[:, 2] = image.shape[-1] - targets.boxes[:, 2], image.shape[-1] - targets.boxes[:, 0]
    masks = None if targets.masks is None else targets.masks.flip(-1)
    return image.flip(-1), Targets(boxes, targets.labels, masks)


def resized(image: Tensor, targets: Targets, scale: Scale) -> tuple[Tensor, Targets]:
    """Resize an 8-bit image and its objects, with its ratio kept; boxes are clipped, and those without any area are dropped.

    A sliver at the border, such as a crop leaves, may lose its area by rounding.
    """
    height, width = (int(length) for length in image.shape[1:])
    size = rescaled_size(height, width, scale)
    factors = torch.tensor([size[1] / width, size[0] / height], dtype=torch.float32).repeat(2)
    targets = _filled(targets._replace(boxes=clipped(targets.boxes * factors, *size)))
    masks = None if targets.masks is None else resize_labels(targets.masks, size)
    return resize_image(image, size), targets._replace(masks=masks)


def cropped(image: Tensor, targets: Targets, top: int, left: int, height: int, width: int) -> tuple[Tensor, Targets]:
    """Cut a window out of an image; boxes are cut too, and objects without any area left are dropped.

    Boxes are not fitted to the part of a mask that is left.
    """
    boxes = clipped(targets.boxes - targets.boxes.new_tensor([left, top, left, top]), height, width)
    targets = _filled(targets._replace(boxes=boxes))
    rows, columns = slice(top, top + height), slice(left, left + width)
    masks = None if targets.masks is None else targets.masks[:, rows, columns]
    return image[:, rows, columns], targets._replace(masks=masks)


def _filled(targets: Targets) -> Targets:
    """Return the objects whose boxes have an area."""
    kept = (targets.boxes[:, 2:] > targets.boxes[:, :2]).all(dim=1)
    if kept.all():
        return targets
    masks = None if targets.masks is None else targets.masks[kept]
    return Targets(targets.boxes[kept], targets.labels[kept], masks)


def clipped(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return boxes `(n, 4)` with their corners moved into an image of that size."""
    return torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], dim=2).flatten(1)
