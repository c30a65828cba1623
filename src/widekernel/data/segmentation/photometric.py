"""Random brightness, contrast, saturation and hue with 8 bits, as in published segmentation.

Every step clips and truncates to 8 bits, so torchvision's `RandomPhotometricDistort`, which computes hue and saturation
in floating point and permutes channels, gives other images.
"""

import random

import numpy as np
import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION = 32.0, (0.5, 1.5), (0.5, 1.5)
HUE = 18
"""The hue moves by -18 to 17 of the 180 steps of a turn."""

HUES = 180


def distort(image: Tensor) -> Tensor:
    """Return an 8-bit RGB image `(3, height, width)` with random changes, each of them with probability 1/2.

    The changes are: brightness; contrast, before or after the others; saturation; hue. Draws come from Python's generator.
    """
    pixels = image.permute(1, 2, 0).numpy()
    if _coin():
        pixels = scaled(pixels, offset=random.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = _coin()
    if contrast_first and _coin():
        pixels = scaled(pixels, random.uniform(*CONTRAST))
    if _coin():
        hsv = to_hsv(pixels)
        hsv[..., 1] = scaled(hsv[..., 1], random.uniform(*SATURATION))
        pixels = from_hsv(hsv)
    if _coin():
        hsv = to_hsv(pixels)
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + random.randrange(-HUE, HUE)) % HUES
        pixels = from_hsv(hsv)
    if not contrast_first and _coin():
        pixels = scaled(pixels, random.uniform(*CONTRAST))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _coin() -> bool:
    return random.random() < 0.5


def scaled(values: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """Return `values × factor + offset`, clipped to 0..255 and truncated, for an array of uint8."""
    levels = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    return np.clip(levels, 0, 255).astype(np.uint8)[values]


_SHIFT = 12
_HALF = 1 << (_SHIFT - 1)
_LEVELS = np.maximum(np.arange(256), 1)
_PER_VALUE = np.where(np.arange(256) > 0, np.rint((255 << _SHIFT) / _LEVELS), 0).astype(np.int32)
_PER_RANGE = np.where(np.arange(256) > 0, np.rint((HUES << _SHIFT) / (6.0 * _LEVELS)), 0).astype(np.int32)


def to_hsv(rgb: np.ndarray) -> np.ndarray:
    """Return hue (0..179), saturation and value (0..255) of 8-bit RGB `(..., 3)`, rounded like OpenCV's 8-bit conversion."""
    red, green, blue = (rgb[..., channel].astype(np.int32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    saturation = (spread * _PER_VALUE[value] + _HALF) >> _SHIFT
    sixth = np.where(value == red, green - blue, np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread))
    hue = (sixth * _PER_RANGE[spread] + _HALF) >> _SHIFT
    hue += np.where(hue < 0, HUES, 0)
    return np.stack([hue, saturation, value], axis=-1).astype(np.uint8)


def from_hsv(hsv: np.ndarray) -> np.ndarray:
    """Return 8-bit RGB `(..., 3)`, rounded, of what `to_hsv` returns."""
    hue = hsv[..., 0].astype(np.float32) * np.float32(6 / HUES)
    saturation = hsv[..., 1].astype(np.float32) * np.float32(1 / 255)
    value = hsv[..., 2].astype(np.float32)
    # Of each channel: value × (1 - saturation × distance), where the distance from the channel's hue is cut to 0..1.
    channels = []
    for offset in (5, 3, 1):
        place = np.mod(hue + np.float32(offset), np.float32(6))
        distance = np.clip(np.minimum(place, np.float32(4) - place), 0, 1)
        channels.append(value * (1 - saturation * distance))
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
