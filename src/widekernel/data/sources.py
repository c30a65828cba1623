"""Labelled images by index: image folders, image tars, scikit-learn's digits and timm's named data sets."""

import io
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from typing_extensions import override

from widekernel.data.errors import DataError
from widekernel.data.images import DECODER_ERRORS, UnreadableImageError, decode_image, reason_of, to_rgb
from widekernel.data.links import check_links


class ImageSource(ABC):
    """A finite, indexable set of labelled images.

    Attributes:
        class_names: names in the order of the class indices
    """

    class_names: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, int]:
        """The RGB image and its class index.

        Raises:
            UnreadableImageError: the image cannot be decoded.
        """

    @abstractmethod
    def sample_name(self, index: int) -> str:
        """What to call the image in messages: a path, or the index in a set without files."""


class FolderSource(ImageSource):
    """Images in ``root/<class>/**``, classes in alphabetical order (torchvision's layout).

    Raises:
        DataError: the folder is missing, or has no classes, or a class without images, or a link in it leads back to
            itself or to another class.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            names = [name for name in find_classes(root)[0] if not name.startswith(".")]
        except FileNotFoundError:
            names = []
        except (NotADirectoryError, PermissionError) as error:
            raise DataError(f"{root} cannot be read as an image folder: {error.strerror}.") from error
        if not names:
            raise DataError(
                f"{root} has no class folders, but the layout is {root.name}/<class>/<image>. "
                "Put each class's images into a folder named after the class."
            )
        check_links(root, names)
        class_to_idx = {name: index for index, name in enumerate(names)}
        self.samples = make_dataset(str(root), class_to_idx, extensions=IMG_EXTENSIONS, allow_empty=True)
        _check_classes(root, names, {target for _, target in self.samples})
        self.class_names = tuple(names)

    def __len__(self) -> int:
        return len(self.samples)

    @override
    def load(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        try:
            with Path(path).open("rb") as file:
                return decode_image(file), target
        except OSError as error:
            raise UnreadableImageError(error.strerror or str(error)) from error

    @override
    def sample_name(self, index: int) -> str:
        return str(Path(self.samples[index][0]).relative_to(self.root))


class TarSource(ImageSource):
    """Images in a tar archive as ``**/<class>/<image>``, classes in alphabetical order; read without unpacking.

    Raises:
        DataError: the archive is damaged, incomplete, compressed, or holds no images in class folders.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.reader = ReaderImageInTar(str(path), cache_tarinfo=False)
        except tarfile.TarError as error:
            raise DataError(
                f"{path} is not a readable, uncompressed tar archive ({error}). Unpack it or re-create it."
            ) from error
        except ValueError as error:  # what timm raises for an archive in which it finds no images
            raise DataError(f"{path} holds no images; the layout is <split>/<class>/<image> with {_KINDS}.") from error
        _check_end_of_archive(path, self.reader)
        names = sorted(self.reader.class_name_to_idx)
        if "" in names or "." in names:
            raise DataError(f"{path} holds images outside class folders; the layout is <split>/<class>/<image>.")
        # timm orders classes by natural key (2 before 10), folders are ordered alphabetically: one order for both
        order = {old: names.index(name) for name, old in self.reader.class_name_to_idx.items()}
        self.targets = [order[int(target)] for target in self.reader.targets]
        self.class_names = tuple(names)
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.targets)

    @override
    def load(self, index: int) -> tuple[Image.Image, int]:
        if self._pid != os.getpid():
            # a file opened before a fork shares its position with the parent: this process opens its own
            self.reader = ReaderImageInTar(str(self.path), cache_tarinfo=False)
            self._pid = os.getpid()
        try:
            file, _ = self.reader[index]
            return decode_image(file), self.targets[index]
        except (tarfile.TarError, OSError, AttributeError) as error:
            raise UnreadableImageError(str(error)) from error

    @override
    def sample_name(self, index: int) -> str:
        return self.reader.filename(index)


class ArraySource(ImageSource):
    """Images held in memory as 8-bit grey or RGB arrays.

    Args:
        images: array ``(n, height, width)`` or ``(n, height, width, 3)`` of uint8
        targets: ``n`` class indices
        class_names: names of the classes
        label: what sample names start with
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
    """A map-style data set or reader that gives ``(PIL image, encoded bytes or open file, class index)``."""

    def __init__(self, dataset: Any, class_names: tuple[str, ...], label: str) -> None:
        self.dataset, self.class_names, self.label = dataset, class_names, label

    def __len__(self) -> int:
        return len(self.dataset)

    @override
    def load(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, target = self.dataset[index]
            if isinstance(image, Image.Image):
                return to_rgb(image), int(target)
            with io.BytesIO(image) if isinstance(image, bytes) else image as file:
                return decode_image(file), int(target)
        except DECODER_ERRORS as error:
            raise UnreadableImageError(reason_of(error)) from error

    @override
    def sample_name(self, index: int) -> str:
        return f"{self.label}[{index}]"


_KINDS = ", ".join(IMG_EXTENSIONS)


def _check_classes(root: Path, names: list[str], present: set[int]) -> None:
    empty = [name for index, name in enumerate(names) if index not in present]
    if len(empty) == len(names):
        raise DataError(f"{root} holds no images: none of its {len(names)} class folders has a file of {_KINDS}.")
    if empty:
        raise DataError(
            f"{root} has {len(empty)} class folder(s) without images: {', '.join(empty[:5])}. "
            "Add images or remove the folder."
        )


def _check_end_of_archive(path: Path, reader: ReaderImageInTar) -> None:
    # tarfile takes the end of the file, a header cut short and a damaged header for the end of the archive
    last = max((child or member for member, _, child in reader.samples), key=lambda member: member.offset_data)
    with path.open("rb") as file:
        file.seek(last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        with tarfile.open(fileobj=file, mode="r:") as rest:
            for _ in rest:
                pass
            end = rest.offset
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise DataError(
                f"{path} is incomplete or damaged: after {end:,} bytes neither a file nor the end of the archive follows, "
                "so images are missing. Copy it again or re-create it."
            )
