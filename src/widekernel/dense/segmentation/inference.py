"""Inference of segmentation networks: on whole images, in sliding windows, and on several views of an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from widekernel.dense.segmentation.resizing import resize
from widekernel.dense.segmentation.segmenter import Segmenter
from widekernel.errors import ArgumentError
from widekernel.settings import require, require_literals, require_whole

_FLIPPED_AXES = {"horizontal": 3, "vertical": 2}


@dataclass(frozen=True)
class InferenceOptions:
    """How a network sees an image.

    Attributes:
        mode: "whole" for the image at once, "slide" for overlapping windows, whose logits are averaged.
        crop: height and width of the windows, in pixels.
        stride: distance of the windows, down and across; at most `crop`.
    """

    mode: Literal["whole", "slide"] = "whole"
    crop: tuple[int, int] = (512, 512)
    stride: tuple[int, int] = (341, 341)

    def __post_init__(self) -> None:
        require_literals(self)
        for name, sides in (("crop", self.crop), ("stride", self.stride)):
            require(len(sides) == 2, name, sides, "two numbers of pixels, height and width")
            for side in sides:
                require_whole(name, side, 1)
        ok = all(step <= side for step, side in zip(self.stride, self.crop))
        require(ok, "stride", self.stride, f"at most the crop, {self.crop}, so that the windows cover the image")


class View(NamedTuple):
    """One view of an image: resized, perhaps flipped, normalized and padded.

    Attributes:
        images: the pixels (N, 3, H, W).
        size: height and width without the padding at the right and at the bottom; None for no padding.
        flip: direction in which the view is flipped; None for none.
    """

    images: Tensor
    size: tuple[int, int] | None = None
    flip: Literal["horizontal", "vertical"] | None = None


@torch.no_grad()
def whole_inference(model: Segmenter, images: Tensor) -> Tensor:
    """Return the logits (N, classes, H, W) of whole images (N, 3, H, W).

    Args:
        model: the network, in evaluation mode.
        images: the images.

    Raises:
        ArgumentError: the network is in training mode.
    """
    return resize(_logits(model, images), images.shape[2:], model.options.align_corners)


@torch.no_grad()
def slide_inference(model: Segmenter, images: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Return the logits (N, classes, H, W) of images (N, 3, H, W), averaged over windows.

    The windows begin at multiples of the stride. The last one of a row or column is moved back to end at the border. Images
    that are smaller than a window are one window.

    Args:
        model: the network, in evaluation mode.
        images: the images.
        crop: height and width of the windows.
        stride: distance of the windows, down and across.

    Raises:
        ArgumentError: the network is in training mode.
    """
    total: Tensor | None = None
    counts = torch.zeros(1, 1, *images.shape[2:], device=images.device)
    for rows, columns in windows(images.shape[2:], crop, stride):
        window = images[:, :, rows, columns]
        logits = resize(_logits(model, window), window.shape[2:], model.options.align_corners)
        if total is None:
            total = logits.new_zeros((*logits.shape[:2], *images.shape[2:]))
        total[:, :, rows, columns] += logits
        counts[:, :, rows, columns] += 1
    assert total is not None
    return total / counts


def windows(size: Sequence[int], crop: Sequence[int], stride: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of the windows that cover an image.

    Args:
        size: height and width of the image.
        crop: height and width of the windows.
        stride: distance of the windows, down and across.
    """
    rows, columns = (_along(*axis) for axis in zip(size, crop, stride))
    return product(rows, columns)


@torch.no_grad()
def probabilities(model: Segmenter, view: View, original_size: tuple[int, int], options: InferenceOptions) -> Tensor:
    """Return the probabilities (N, classes, H0, W0) of the classes at the image's original size.

    Padding is cut off, logits are resized, turned into probabilities and flipped back.

    Args:
        model: the network, in evaluation mode.
        view: the view of the image.
        original_size: height H0 and width W0 of the image before it was resized.
        options: how the network sees the view.

    Raises:
        ArgumentError: the network is in training mode.
    """
    if options.mode == "slide":
        logits = slide_inference(model, view.images, options.crop, options.stride)
    else:
        logits = whole_inference(model, view.images)
    if view.size is not None:
        logits = logits[:, :, : view.size[0], : view.size[1]]
    found = resize(logits, original_size, model.options.align_corners).softmax(dim=1)
    return found if view.flip is None else found.flip(_FLIPPED_AXES[view.flip])


@torch.no_grad()
def multi_view(model: Segmenter, views: Sequence[View], original_size: tuple[int, int], options: InferenceOptions) -> Tensor:
    """Return the probabilities (N, classes, H0, W0), averaged over views of an image, such as sizes and flips of it.

    Args:
        model: the network, in evaluation mode.
        views: the views.
        original_size: height H0 and width W0 of the image before it was resized.
        options: how the network sees each view.

    Raises:
        ArgumentError: there is no view, or the network is in training mode.
    """
    if not views:
        raise ArgumentError("there are no views of the image: give at least one")
    total = probabilities(model, views[0], original_size, options)
    for view in views[1:]:
        total += probabilities(model, view, original_size, options)
    return total / len(views)


def _along(side: int, crop: int, stride: int) -> list[slice]:
    """Return the windows along one axis."""
    count = max(side - crop + stride - 1, 0) // stride + 1
    ends = [min(k * stride + crop, side) for k in range(count)]
    return [slice(max(end - crop, 0), end) for end in ends]


def _logits(model: Segmenter, images: Tensor) -> Tensor:
    found = model(images)
    if not isinstance(found, Tensor):
        raise ArgumentError("the network is in training mode: call model.eval() before inference")
    return found.to(torch.promote_types(found.dtype, torch.float32))
