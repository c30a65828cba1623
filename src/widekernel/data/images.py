"""Decoding of image files to 8-bit RGB, refusing what a silent conversion would turn into noise."""

import io
import struct
import warnings
import zlib
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 50_000_000
"""Largest accepted image, in pixels, checked from the header before anything is decoded."""


DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, RuntimeError, TypeError, AttributeError, AssertionError,
    ArithmeticError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow and its plugins raise for damaged files."""


class UnreadableImageError(Exception):
    """One image that cannot be decoded faithfully; the message is the reason."""


def decode_image(file: IO[bytes]) -> Image.Image:
    """Decode ``file`` to an 8-bit RGB image.

    16-bit grey images are scaled to 8 bits (a plain conversion would clip them to white), transparent images are
    composited on black, animated images give their first frame. EXIF orientation is not applied, as in the
    published ImageNet pipelines.

    Raises:
        UnreadableImageError: the file is damaged, is no image, has floating-point or 32-bit pixels (their range is
            unknown), or more than ``MAX_PIXELS`` pixels.
    """
    try:
        # Pillow warns about large images and odd palettes; the pixel limit below is the rule that holds here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(file.read()))
            _check_size(image)
            return to_rgb(image)
    except UnreadableImageError:
        raise
    except DECODER_ERRORS as error:
        raise UnreadableImageError(reason_of(error)) from error


def reason_of(error: BaseException) -> str:
    """Why an image could not be decoded, on one line."""
    if isinstance(error, UnidentifiedImageError):  # its own text names an object in memory, which differs every time
        return "not an image of a known format"
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(f"{width}×{height} pixels are more than the limit of {MAX_PIXELS:,}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image by the rules of ``decode_image``.

    Raises:
        UnreadableImageError: the range of its pixels is unknown.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.uint16)
        return Image.fromarray((values.astype(np.float32) / 257.0).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        raise UnreadableImageError(f"pixels of type {image.mode} have no known range; save the image with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")
