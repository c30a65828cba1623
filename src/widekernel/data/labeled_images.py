"""Items and batches of image classification."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from widekernel.data.preprocess import ImageTransform


class LabeledImages(NamedTuple):
    """Images `(n, channels, height, width)` and class indices `(n,)`."""

    images: Tensor
    targets: Tensor

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, int]]) -> "LabeledImages":
        """Stack pairs of an image `(channels, height, width)` and its class index."""
        images, targets = zip(*items, strict=True)
        # In a loading process, this stacks in shared memory, from which the training process reads without another copy.
        return LabeledImages(default_collate(list(images)), torch.tensor(targets))


class OnImage:
    """Transform of an item that applies `transform` to its first part, the image, and leaves the rest alone."""

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform

    def __call__(self, item: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the item with its image transformed."""
        image, *rest = item
        return (self.transform(image), *rest)
