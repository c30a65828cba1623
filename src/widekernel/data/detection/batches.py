"""Items and batches of object detection."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from widekernel.data.rescaling import pad_to, padded_size
from widekernel.dense.detection.structures import ImageSize, Targets


class AnnotatedImage(NamedTuple):
    """What a source yields.

    Args:
        image: RGB `(3, height, width)`, uint8
        targets: the objects, in pixels of the image
        id: identifier of the image in the annotation file
        name: name of the image for messages and files
    """

    image: Tensor
    targets: Targets
    id: int = 0
    name: str = ""


class DetectionItem(NamedTuple):
    """What a transform yields of one image.

    Args:
        image: normalized `(3, height, width)`, float32, without padding
        size: its size, and that of the original image
        targets: the objects, in pixels of `image`
        id: identifier of the image in the annotation file
        name: name of the image
    """

    image: Tensor
    size: ImageSize
    targets: Targets
    id: int = 0
    name: str = ""


class DetectionBatch(NamedTuple):
    """Images, padded at the right and below with zeros, the mean color, to the size of the largest.

    Args:
        images: normalized `(n, 3, H, W)`, float32; H and W are multiples of the size divisor
        sizes: size of each image without padding, and how it relates to the original image
        targets: the objects of each image, whose masks are padded like the images; in evaluation, in pixels of the batch too
        ids: identifier of each image in the annotation file
        names: name of each image
    """

    images: Tensor
    sizes: list[ImageSize]
    targets: list[Targets]
    ids: list[int]
    names: list[str]

    def padded(self, height: int, width: int) -> "DetectionBatch":
        """Return the batch with more padding, on its device.

        Args:
            height: wanted height of the images, at least that of the batch.
            width: wanted width, likewise.
        """
        targets = [_padded(each, height, width) for each in self.targets]
        return self._replace(images=pad_to(self.images, height, width), targets=targets)


class DetectionCollate:
    """Function from a list of items to a batch.

    Args:
        size_divisor: height and width of batches are multiples of it
    """

    def __init__(self, size_divisor: int = 32) -> None:
        self.size_divisor = size_divisor

    def __call__(self, items: Sequence[DetectionItem]) -> DetectionBatch:
        """Join items to a batch."""
        height, width = (padded_size(max(item.image.shape[side] for item in items), self.size_divisor) for side in (1, 2))
        return DetectionBatch(
            images=torch.stack([pad_to(item.image, height, width) for item in items]),
            sizes=[item.size for item in items],
            targets=[_padded(item.targets, height, width) for item in items],
            ids=[item.id for item in items],
            names=[item.name for item in items],
        )


def _padded(targets: Targets, height: int, width: int) -> Targets:
    masks = targets.masks
    return targets if masks is None else targets._replace(masks=pad_to(masks, height, width))
