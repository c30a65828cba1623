"""Items and batches of semantic segmentation."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from widekernel.data.rescaling import pad_to
from widekernel.dense.detection.structures import ImageSize


class LabeledScene(NamedTuple):
    """What a source yields.

    Args:
        image: RGB `(3, height, width)`, uint8
        labels: class of each pixel `(height, width)`, uint8 or int32; pixels of the ignored value have none
        name: name of the image for messages and files
    """

    image: Tensor
    labels: Tensor
    name: str = ""


class SegmentationBatch(NamedTuple):
    """Training images of one size.

    Args:
        images: normalized `(n, 3, height, width)`, float32
        labels: classes `(n, height, width)`, int64
    """

    images: Tensor
    labels: Tensor

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, Tensor]]) -> "SegmentationBatch":
        """Stack pairs of an image `(3, height, width)` and labels `(height, width)`, all of one size."""
        images, labels = zip(*items, strict=True)
        # In a loading process, this stacks in shared memory, from which the training process reads without another copy.
        return SegmentationBatch(default_collate(list(images)), default_collate(list(labels)))


class SceneViews(NamedTuple):
    """What the transform of evaluation yields of one image.

    Args:
        views: the normalized image `(3, height, width)` at each scale, float32
        labels: classes `(original height, original width)`, int64
        sizes: size of each view
        name: name of the image
    """

    views: list[Tensor]
    labels: Tensor
    sizes: list[ImageSize]
    name: str = ""


class SegmentationViews(NamedTuple):
    """Held-out images at one or several scales.

    Images of different sizes are padded at the right and below with zeros, the mean color, to the largest of the batch.
    The published results are those of batches of one image, which are not padded.

    Args:
        images: for each scale, the normalized images `(n, 3, height, width)`, float32
        labels: for each image, the classes at its original size `(original height, original width)`, int64
        sizes: for each scale, the sizes of the images
        names: name of each image
    """

    images: list[Tensor]
    labels: list[Tensor]
    sizes: list[list[ImageSize]]
    names: list[str]

    @staticmethod
    def collate(items: Sequence[SceneViews]) -> "SegmentationViews":
        """Join images that have views at the same scales."""
        images = []
        for views in zip(*(item.views for item in items), strict=True):
            height, width = (max(view.shape[side] for view in views) for side in (1, 2))
            images.append(torch.stack([pad_to(view, height, width) for view in views]))
        sizes = [list(of_scale) for of_scale in zip(*(item.sizes for item in items), strict=True)]
        return SegmentationViews(images, [item.labels for item in items], sizes, [item.name for item in items])
