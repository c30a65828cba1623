"""Images without labels, in the form that the transforms of evaluation of each task take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from widekernel.data.detection.batches import AnnotatedImage
from widekernel.data.image_files import ImageFiles
from widekernel.data.segmentation.batches import LabeledScene
from widekernel.dense.detection.structures import Targets


class NamedImages(NamedTuple):
    """Images `(n, channels, height, width)`, and the name of each."""

    images: Tensor
    names: list[str]

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, str]]) -> NamedImages:
        """Stack pairs of an image `(channels, height, width)` and its name."""
        images, names = zip(*items, strict=True)
        return NamedImages(default_collate(list(images)), list(names))


class UnlabeledImages:
    """Images with their names, for classification.

    Args:
        files: the images
    """

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> tuple[Image.Image, str]:
        """Return an image and its name.

        Raises:
            UnreadableImageError: it cannot be decoded.
        """
        return self.files.load(index), self.sample_name(index)

    def sample_name(self, index: int) -> str:
        """Return the name of an image."""
        return self.files.sample_name(index)


class UnlabeledScenes(UnlabeledImages):
    """Images for semantic segmentation, all pixels of which are of the class 0, which nobody reads.

    Args:
        files: the images
    """

    def load(self, index: int) -> LabeledScene:  # type: ignore[override]
        """Return an image; the size of the labels is that of the image.

        Raises:
            UnreadableImageError: it cannot be decoded.
        """
        pixels = _pixels(self.files.load(index))
        return LabeledScene(pixels, torch.zeros(pixels.shape[1:], dtype=torch.uint8), self.sample_name(index))


class UnannotatedImages(UnlabeledImages):
    """Images for object detection, without objects.

    Args:
        files: the images
    """

    def load(self, index: int) -> AnnotatedImage:  # type: ignore[override]
        """Return an image, whose identifier is its index.

        Raises:
            UnreadableImageError: it cannot be decoded.
        """
        none = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        return AnnotatedImage(_pixels(self.files.load(index)), none, index, self.sample_name(index))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
