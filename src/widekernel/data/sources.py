"""Labeled images by index: the interface, and the data sets that do not consist of files."""

import io
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from typing_extensions import override

from widekernel.data.images import DECODER_ERRORS, UnreadableImageError, decode_image, reason_of, to_rgb
from widekernel.data.listing import Listing


class ImageSource(ABC):
    """A finite, indexable set of labeled images.

    Attributes:
        class_names: names in the order of the class indices
        notes: lines for the user, such as how many files were left out
        exif_transpose: whether images are turned as their EXIF orientation says
    """

    class_names: tuple[str, ...]
    exif_transpose: bool = False
    notes: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, int]:
        """Return the RGB image and its class index.

        Raises:
            UnreadableImageError: the image cannot be decoded.
        """

    @abstractmethod
    def sample_name(self, index: int) -> str:
        """Return the name of the image for messages: a path, or the index in a data set without files."""


def targets_of(source: ImageSource) -> Sequence[int] | None:
    """Return the class indices in the order of the images, or `None` if they are unknown without decoding."""
    for holder in (source, getattr(source, "dataset", None)):
        targets = getattr(holder, "targets", None)
        if targets is None:
            targets = [sample[1] for sample in getattr(holder, "samples", ())]
        if len(targets) == len(source):
            return targets if isinstance(targets, array) else [int(target) for target in targets]
    return None


class FileSource(ImageSource):
    """Images in the files of a folder, an archive or several archives.

    Attributes:
        path: the folder or archive, or the archives in one name
        listing: its contents
    """

    def __init__(self, path: Path, listing: Listing) -> None:
        self.path, self.listing = path, listing
        self.names, self.targets, self.class_names = listing.names, listing.targets, listing.class_names
        self.notes = listing.skipped.notes(str(path))

    def __len__(self) -> int:
        return len(self.names)

    @override
    def sample_name(self, index: int) -> str:
        return self.names[index]

    def files(self) -> tuple[Path, ...]:
        """Return the folder or the archives that hold the images."""
        return (self.path,)

    @abstractmethod
    def size(self, index: int) -> int:
        """Return the size of the image's file in bytes, or -1 if it is a broken link."""


class ArraySource(ImageSource):
    """Images held in memory as 8-bit gray or RGB arrays.

    Args:
        images: array `(n, height, width)` or `(n, height, width, 3)` of uint8
        targets: `n` class indices
        class_names: names of the classes
        label: prefix of the sample names
    """

    def __init__(self, images: np.ndarray, targets: Sequence[int], class_names: tuple[str, ...], label: str) -> None:
        self.images, self.targets, self.class_names, self.label = images, targets, class_names, label

    def __len__(self) -> int:
        return len(self.images)

    @override
    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.targets[index])

    @override
    def sample_name(self, index: int) -> str:
        return f"{self.label}[{index}]"


class MappedSource(ImageSource):
    """Map-style data set or reader whose items are (image, class index).

    The image is a PIL image, encoded bytes or an open file.
    """

    def __init__(self, dataset: Any, class_names: tuple[str, ...], label: str) -> None:
        self.dataset, self.class_names, self.label = dataset, class_names, label

    def __len__(self) -> int:
        return len(self.dataset)

    @override
    def load(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, target = self.dataset[index]
            if isinstance(image, Image.Image):
                return to_rgb(image, self.exif_transpose), int(target)
            with io.BytesIO(image) if isinstance(image, bytes) else image as file:
                return decode_image(file, self.exif_transpose), int(target)
        except DECODER_ERRORS as error:
            raise UnreadableImageError(reason_of(error)) from error

    @override
    def sample_name(self, index: int) -> str:
        return f"{self.label}[{index}]"
