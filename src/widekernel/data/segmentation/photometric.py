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
    pixels = image.numpy()
    if _coin():
        pixels = scaled(pixels, offset=random.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = _coin()
    if contrast_first and _coin():
        pixels = scaled(pixels, random.uniform(*CONTRAST))
    if _coin():
        hsv = to_hsv(pixels)
        hsv[1] = scaled(hsv[1], random.uniform(*SATURATION))
        pixels = from_hsv(hsv)
    if _coin():
        hsv = to_hsv(pixels)
        hsv[0] = (hsv[0].astype(np.int16) + random.randrange(-HUE, HUE)) % HUES
        pixels = from_hsv(hsv)
    if not contrast_first and _coin():
        pixels = scaled(pixels, random.uniform(*CONTRAST))
    return torch.from_numpy(pixels)


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
    """Return hue (0..179), saturation and value (0..255) of 8-bit RGB `(3, ...)`, rounded like OpenCV's 8-bit conversion."""
    red, green, blue = rgb.astype(np.int32)
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    saturation = (spread * _PER_VALUE[value] + _HALF) >> _SHIFT
    not_red = np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    sixth = np.where(value == red, green - blue, not_red)
    hue = (sixth * _PER_RANGE[spread] + _HALF) >> _SHIFT
    hue[hue < 0] += HUES
    return np.stack([hue, saturation, value]).astype(np.uint8)


# In each sixth of the turn of hues, which of (largest, smallest, falling, rising) red, green and blue are.
_CHANNELS = [[0, 2, 1, 1, 3, 0], [3, 0, 0, 2, 1, 1], [1, 1, 3, 0, 0, 2]]


def from_hsv(hsv: np.ndarray) -> np.ndarray:
    """Return 8-bit RGB `(3, ...)`, truncated like OpenCV's 8-bit conversion, of what `to_hsv` returns."""
    turn = np.arange(HUES, dtype=np.float32) * np.float32(6 / HUES)
    sixths = np.floor(turn)
    sixth, part = sixths.astype(np.int8)[hsv[0]], (turn - sixths)[hsv[0]]
    saturation, value = hsv[1:].astype(np.float32) * np.float32(1 / 255)
    spread = saturation * part
    levels = [value, value * (1 - saturation), value * (1 - spread), value * (1 - saturation + spread)]
    eight_bit = [(level * np.float32(255)).astype(np.uint8) for level in levels]
    return np.stack([np.choose(sixth, [eight_bit[place] for place in places]) for places in _CHANNELS])
