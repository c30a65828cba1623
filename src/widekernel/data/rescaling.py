"""Sizes and pixels of images that keep their ratio, as in published segmentation and detection."""

from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvF

from widekernel.dense.detection.structures import ImageSize
from widekernel.settings import require

Scale: TypeAlias = tuple[int, int]
"""Largest lengths of the long and of the short side, in pixels."""

Statistics: TypeAlias = tuple[float, float, float]
"""Mean or standard deviation of each channel, for pixels from 0 to 1."""


def require_scale(key: str, value: Scale) -> None:
    """Raise a `ConfigError` unless `value` is two whole numbers, at least 1, the longer side first."""
    ok = len(value) == 2 and all(type(length) is int for length in value) and value[0] >= value[1] >= 1
    require(ok, key, value, "the longest long side and the longest short side in pixels, such as (2048, 512)")


def rescaled_size(height: int, width: int, scale: Scale) -> tuple[int, int]:
    """Return the largest height and width of the same ratio that fit the scale, rounded half up; at least 1 each.

    Args:
        height: rows of the image.
        width: columns of the image.
        scale: lengths that the long and the short side must not exceed, in either order.
    """
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def size_of(image: Tensor, original: tuple[int, int]) -> ImageSize:
    """Return the size of an image `(..., height, width)` that was resized from `original` (height, width).

    The factors are rounded to float32, as in published code.
    """
    height, width = image.shape[-2:]
    scale_x, scale_y = torch.tensor([width / original[1], height / original[0]], dtype=torch.float32).tolist()
    return ImageSize(height, width, scale_x, scale_y, original[0], original[1])


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an 8-bit image `(3, height, width)` by linear interpolation without low-pass filter, to 8 bits.

    OpenCV's `INTER_LINEAR`, which truncates fixed-point numbers, gives one level less for about a quarter of the values.
    """
    if tuple(image.shape[-2:]) == size:
        return image
    return tvF.resize_image(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=False)


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize class maps or masks `(..., height, width)` to the nearest pixel."""
    if tuple(labels.shape[-2:]) == size:
        return labels
    height, width = labels.shape[-2:]
    # Several times faster than indexing, and with the columns first, rows are copied whole.
    return labels.index_select(-1, nearest_positions(width, size[1])).index_select(-2, nearest_positions(height, size[0]))


def nearest_positions(old: int, new: int) -> Tensor:
    """Return the row or column of an axis of length `old` that each of `new` ones takes: floor(position × old / new)."""
    return torch.arange(new) * old // new


def normalize_image(image: Tensor, mean: Statistics, std: Statistics) -> Tensor:
    """Return an 8-bit image `(3, height, width)` as float32, scaled to 0..1 and normalized by channel."""
    values = image.float().div_(255)
    return values.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])


def padded_size(length: int, divisor: int) -> int:
    """Return the smallest multiple of `divisor` that is at least `length`."""
    return -(-length // divisor) * divisor


def pad_to(values: Tensor, height: int, width: int, fill: float = 0) -> Tensor:
    """Pad `(..., rows, columns)` at the right and below to a height and width that are at least as large."""
    below, right = height - values.shape[-2], width - values.shape[-1]
    return F.pad(values, (0, right, 0, below), value=fill) if below or right else values
