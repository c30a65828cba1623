"""Checks of what a detector is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from widekernel.dense.detection.structures import ImageSize, Targets
from widekernel.errors import DataError, ShapeError


def check_sizes(images: Tensor, sizes: Sequence[ImageSize]) -> None:
    """Check that sizes fit the images of a batch.

    Args:
        images: (N, C, H, W)
        sizes: sizes of the images without their padding

    Raises:
        ShapeError: if the images are not four-dimensional, their number is not that of the sizes, or one does not fit.
    """
    if images.ndim != 4:
        raise ShapeError(f"The images have the shape {tuple(images.shape)}, but must be a batch (N, C, H, W).")
    if len(images) != len(sizes):
        raise ShapeError(f"There are {len(images)} images, but {len(sizes)} sizes. Give a size for each image.")
    height, width = images.shape[-2:]
    for number, size in enumerate(sizes):
        if not 1 <= size.height <= height or not 1 <= size.width <= width:
            raise ShapeError(
                f"Image {number} of the batch is said to be {size.height} x {size.width} pixels without padding, which does "
                f"not fit the batch of {height} x {width}. Give the size of the resized image."
            )


def check_targets(
    images: Tensor, sizes: Sequence[ImageSize], targets: Sequence[Targets], classes: int, masks: bool = False
) -> Tensor:
    """Check the objects of a batch.

    Shapes and types are always checked. Values are checked here on the CPU only: elsewhere, the host would have to wait for
    the device. Multiply into the losses what this function returns, by `mark_unsound`.

    Args:
        images: (N, C, H, W)
        sizes: sizes of the images without their padding
        targets: objects of each image
        classes: number of classes
        masks: whether masks are needed

    Returns:
        0-dimensional bool on the device of the targets: whether all boxes are finite and not empty and all labels in range

    Raises:
        ShapeError: if numbers, shapes or types do not agree.
        DataError: if masks are missing, or targets on the CPU have wrong values.
    """
    check_sizes(images, sizes)
    if len(targets) != len(images):
        raise ShapeError(f"There are {len(images)} images, but targets for {len(targets)}. Give targets for each image.")
    for number, target in enumerate(targets):
        _check_shapes(number, target)
        if masks:
            _check_masks(number, target, images)
    boxes = torch.cat([target.boxes for target in targets])
    labels = torch.cat([target.labels for target in targets])
    good = _filled(boxes) & (labels >= 0) & (labels < classes)
    if good.device.type == "cpu" and not good.all():
        _refuse(targets, classes)
    return good.all()


def mark_unsound(losses: Mapping[str, Tensor], sound: Tensor) -> dict[str, Tensor]:
    """Return losses that are NaN if the targets, as `check_targets` found, have wrong values."""
    return {name: torch.where(sound, loss, torch.nan) for name, loss in losses.items()}


def _filled(boxes: Tensor) -> Tensor:
    return boxes.isfinite().all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def _check_shapes(number: int, target: Targets) -> None:
    boxes, labels = target.boxes, target.labels
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ShapeError(
            f"The boxes of image {number} are {boxes.dtype} of the shape {tuple(boxes.shape)}, but must be float32 of the "
            "shape (objects, 4); (0, 4) if there are none."
        )
    if labels.shape != boxes.shape[:1] or labels.dtype != torch.int64:
        raise ShapeError(
            f"The labels of image {number} are {labels.dtype} of the shape {tuple(labels.shape)}, but must be int64, one "
            f"for each of the {len(boxes)} boxes."
        )


def _check_masks(number: int, target: Targets, images: Tensor) -> None:
    if target.masks is None:
        raise DataError(
            f"Image {number} of the batch has no masks, which this detector is trained on. Use a data set with masks, or a "
            "detector of boxes only."
        )
    wanted = (len(target.boxes), *images.shape[-2:])
    if target.masks.shape != wanted:
        raise ShapeError(
            f"The masks of image {number} have the shape {tuple(target.masks.shape)}, but must have {wanted}: one for each "
            "box, of the size of the batch with its padding."
        )


def _refuse(targets: Sequence[Targets], classes: int) -> None:
    """Raise an error that names the first wrong box or label."""
    for number, (boxes, labels, _) in enumerate(targets):
        for box, filled, label in zip(boxes.tolist(), _filled(boxes).tolist(), labels.tolist()):
            place = f"of image {number} of the batch"
            if not filled:
                raise DataError(
                    f"A box {place} is {box}. Boxes are x1, y1, x2, y2 in pixels, finite, with x1 < x2 and y1 < y2. Correct "
                    "it, or leave the object out."
                )
            if not 0 <= label < classes:
                raise DataError(
                    f"A label {place} is {label}, but the detector has the classes 0 to {classes - 1}. Correct it, or build "
                    "the detector with more classes."
                )
