"""What detectors take and return: sizes of images, targets and detections.

Boxes are (x1, y1, x2, y2) in continuous pixel coordinates: a pixel in column c covers c to c + 1, and a box is
x2 - x1 wide. Classes are numbered from 0; the background is no class.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ImageSize(NamedTuple):
    """Size of an image in a batch, and how it relates to the original image.

    Attributes:
        height: rows of the resized image, without the padding below it
        width: columns of the resized image, without the padding to the right
        scale_x: resized width / original width
        scale_y: resized height / original height
        original_height: rows of the original image; 0 stands for `height / scale_y`, rounded
        original_width: columns of the original image; 0 stands for `width / scale_x`, rounded
    """

    height: int
    width: int
    scale_x: float = 1.0
    scale_y: float = 1.0
    original_height: int = 0
    original_width: int = 0

    @property
    def original(self) -> tuple[int, int]:
        """Rows and columns of the original image."""
        height = self.original_height or max(round(self.height / self.scale_y), 1)
        return height, self.original_width or max(round(self.width / self.scale_x), 1)


class Targets(NamedTuple):
    """The objects in an image of a batch.

    Attributes:
        boxes: (n, 4) float32, x1 y1 x2 y2, in pixels of the batch
        labels: (n,) int64, from 0 to the number of classes - 1
        masks: (n, H, W) uint8, 0 or 1, of the size of the batch with its padding; `None` for detectors of boxes only
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None


class Detections(NamedTuple):
    """The objects that a detector finds in an image, by falling score.

    Attributes:
        boxes: (n, 4) float32, x1 y1 x2 y2, in pixels of the original image
        scores: (n,) float32, from 0 to 1
        labels: (n,) int64, from 0 to the number of classes - 1
        masks: (n, height, width) bool, of the size of the original image; `None` from detectors of boxes only
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
