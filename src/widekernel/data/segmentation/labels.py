"""Class maps: decoding of label files, and translation of their numbers to class indices."""

import io
import warnings
from typing import IO

import numpy as np
from PIL import Image

from widekernel.data.formats import image_formats
from widekernel.data.images import DECODER_ERRORS, MAX_BYTES, MAX_PIXELS, UnreadableImageError, reason_of, too_large
from widekernel.errors import DataError

_MODES = ("L", "P", "1", "I", "I;16", "I;16B", "I;16L", "I;16N")
_NUMBERS = 65536
_INVALID = -1


class LabelTable:
    """Translation of the numbers in label files to class indices.

    Args:
        num_classes: number of classes
        ignore_index: number that stands for no class, in files and in the result
        reduce_zero: numbers in files count from 1, and 0 means no class
        label_ids: number of each class in files; `None` if it is the class index
        also_ignored: further numbers in files that mean no class

    Attributes:
        ignore_index: number that stands for no class in the result
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        reduce_zero: bool = False,
        label_ids: tuple[int, ...] | None = None,
        also_ignored: tuple[int, ...] = (),
    ) -> None:
        if ignore_index < num_classes + reduce_zero:
            raise DataError(
                f"data.ignore_index is {ignore_index}, which the labels of {num_classes} classes use themselves. "
                "Choose a number that is not."
            )
        self.ignore_index = ignore_index
        table = np.full(_NUMBERS, _INVALID, np.int32)
        table[list(also_ignored)] = ignore_index
        numbers = range(reduce_zero, num_classes + reduce_zero) if label_ids is None else label_ids
        table[list(numbers)] = np.arange(num_classes)
        if label_ids is None:
            table[ignore_index] = ignore_index
        if reduce_zero:
            table[0] = ignore_index
        self._invalid = table == _INVALID
        # 8 bits are enough for most sets, and resizing them is faster.
        self._table = table.astype(np.uint8) if ignore_index < 256 else table
        self._rule = f"{'1' if reduce_zero else '0'} to {num_classes - (not reduce_zero)}, or {ignore_index} for no class"
        if reduce_zero:
            self._rule = f"0 for no class, {self._rule}"

    def translate(self, numbers: np.ndarray) -> np.ndarray:
        """Return the class indices, uint8 or int32, for the numbers of a label file.

        Raises:
            DataError: a number is no class; the message does not name the file.
        """
        wrong = self._invalid[numbers]
        if wrong.any():
            first = int(numbers[wrong][0])
            raise DataError(
                f"{int(wrong.sum()):,} pixels are out of range, such as {first}: allowed are {self._rule}. Correct them, or "
                "the file of classes, data.ignore_index or data.reduce_zero_label"
            )
        return self._table[numbers]


def decode_labels(file: IO[bytes]) -> np.ndarray:
    """Return the numbers in a label file `(height, width)`: gray levels of up to 16 bits, or positions in a palette.

    Raises:
        DataError: the pixels are colors; the message does not name the file.
        UnreadableImageError: the file is damaged, is not an image, or is too large.
    """
    try:
        content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UnreadableImageError(too_large(len(content)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=image_formats())
            require_label_mode(image)
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImageError(f"{image.width}×{image.height} pixels exceed the limit of {MAX_PIXELS:,}")
            numbers = np.asarray(image)
    except (UnreadableImageError, DataError):
        raise
    except DECODER_ERRORS as error:
        raise UnreadableImageError(reason_of(error)) from error
    if numbers.dtype == np.bool_:
        return numbers.astype(np.uint8)
    if numbers.dtype != np.uint8 and (numbers.min() < 0 or numbers.max() >= _NUMBERS):
        raise DataError(f"its pixels go from {numbers.min()} to {numbers.max()}, but must lie within 0 to {_NUMBERS - 1}")
    return numbers


def require_label_mode(image: Image.Image) -> None:
    """Raise a `DataError`, which does not name the file, if the pixels of an opened label file are colors."""
    if image.mode not in _MODES:
        raise DataError(
            f"its pixels are colors (mode {image.mode}), but must be class indices: save one channel, gray or with a palette"
        )
