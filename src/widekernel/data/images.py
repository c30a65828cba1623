"""Decoding of image files to 8-bit RGB; images that a plain conversion would silently ruin are refused."""

import io
import struct
import warnings
import zlib
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from widekernel.data.formats import image_formats

MAX_PIXELS = 50_000_000
"""Largest number of pixels accepted; the header is checked before anything is decoded."""

MAX_BYTES = 2**29
"""Largest image file accepted, in bytes; more than `MAX_PIXELS` pixels with four 16-bit channels need."""

DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, RuntimeError, TypeError, AttributeError, AssertionError,
    ArithmeticError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""Errors that Pillow and its plugins raise for damaged files."""


class UnreadableImageError(Exception):
    """Error for an image that cannot be decoded faithfully; the message is the reason."""


def decode_image(file: IO[bytes], exif_transpose: bool = False) -> Image.Image:
    """Decode `file` to an 8-bit RGB image.

    Gray images of 12 and 16 bits are scaled to 8 bits (a plain conversion would clip them to white), transparent images
    are composited on black, and the first frame of animated images is used. EXIF orientation is applied only if
    `exif_transpose` is true, since the published ImageNet pipelines do not.

    Raises:
        UnreadableImageError: the file is damaged, is not an image, has floating-point, signed or 32-bit pixels (their
            range is unknown), or has more than `MAX_PIXELS` pixels or `MAX_BYTES` bytes.
    """
    try:
        content = file.read(MAX_BYTES + 1)
    except DECODER_ERRORS as error:
        raise UnreadableImageError(reason_of(error)) from error
    if len(content) > MAX_BYTES:
        raise UnreadableImageError(too_large(len(content)))
    return decode_bytes(content, exif_transpose)


def decode_bytes(content: bytes, exif_transpose: bool = False) -> Image.Image:
    """Decode the contents of a file, with the rules and errors of `decode_image`."""
    try:
        # Pillow warns about large images and odd palettes; here, only the pixel limit below matters.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Pillow detects the format by the first bytes, not the name. Formats that need other programs are not tried.
            image = Image.open(io.BytesIO(content), formats=image_formats())
            _check_size(image)
            return to_rgb(image, exif_transpose)
    except UnreadableImageError:
        raise
    except DECODER_ERRORS as error:
        raise UnreadableImageError(reason_of(error)) from error


def too_large(size: int) -> str:
    """Return the reason why a file of at least `size` bytes is not read."""
    return f"the file has {size:,} bytes or more, and the limit is {MAX_BYTES:,}"


def reason_of(error: BaseException) -> str:
    """Return the reason why an image could not be decoded, on one line."""
    if isinstance(error, UnidentifiedImageError):  # its text contains the address of an object, which is always different
        return "not an image of a known format"
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(f"{width}×{height} pixels are more than the limit of {MAX_PIXELS:,}")


def to_rgb(image: Image.Image, exif_transpose: bool = False) -> Image.Image:
    """Convert an opened image to 8-bit RGB by the rules of `decode_image`.

    Raises:
        UnreadableImageError: the range of its pixels is unknown.
    """
    converted = _to_rgb(image)
    # Asked for only now: while it loads an image, Pillow turns that of a TIFF file, and then removes the tag.
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1)) if exif_transpose else None
    return converted if turn is None else converted.transpose(turn)


_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What puts an image upright, by its EXIF orientation."""


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in _SCALED_TO_16_BITS):
        return _from_16_bits(image)
    if mode in ("F", "I"):
        raise UnreadableImageError(f"pixels of type {mode} have no known range; save the image with 8 or 16 bits")
    if _sample_format(image) == _SIGNED:
        raise UnreadableImageError("its pixels are signed numbers, whose range is unknown; save them as unsigned")
    if mode == "La":
        image = image.convert("LA")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


_SCALED_TO_16_BITS = {"PPM", "PNG"}
"""Formats whose pixels Pillow may return as 32-bit numbers, though always from 0 to 65,535."""

# Tags of TIFF files and their values.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2


def _from_16_bits(image: Image.Image) -> Image.Image:
    if image.format == "FITS":
        raise UnreadableImageError("16-bit pixels of FITS files are signed, and their range is unknown")
    values = np.asarray(image).astype(np.float32)
    largest = 65535
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        largest = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            values = largest - values
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = 0
    # 65535 / 257 is exactly 255, so 16-bit copies of 8-bit images are restored exactly.
    scaled = values / 257.0 if largest == 65535 else values * (255.0 / largest)
    return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")


def _sample_format(image: Image.Image) -> int | None:
    if image.format != "TIFF":
        return None
    values = image.tag_v2.get(_SAMPLE_FORMAT, (1,))  # type: ignore[attr-defined]
    return int(values[0])
