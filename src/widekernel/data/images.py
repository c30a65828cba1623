"""Decoding of image files to 8-bit RGB, refusing what a silent conversion would turn into noise."""

import io
import warnings
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 50_000_000
"""Largest accepted image, in pixels, checked from the header before anything is decoded."""


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
            return _to_rgb(image)
    except UnreadableImageError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, IndexError) as error:
        # Pillow's decoders signal damaged files with any of these
        # Pillow's own text for an unknown format names an object in memory, which differs every time
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image of a known format" if unknown else str(error) or type(error).__name__
        raise UnreadableImageError(reason) from error


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(f"{width}×{height} pixels are more than the limit of {MAX_PIXELS:,}")


def _to_rgb(image: Image.Image) -> Image.Image:
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
