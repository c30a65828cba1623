"""Images with objects, from the folders of COCO and from annotation files in its form."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from widekernel.data.class_tables import ClassTable, colors_of
from widekernel.data.detection.annotations import CocoFile, read_coco
from widekernel.data.detection.batches import AnnotatedImage
from widekernel.data.detection.coco_tools import mask_tools
from widekernel.data.detection.config import DetectionDataConfig
from widekernel.data.formats import brief
from widekernel.data.images import UnreadableImageError, decode_image
from widekernel.data.paths import existing_folder, expand_path
from widekernel.errors import ConfigError, DataError


class DetectionSource:
    """Images of an annotation file.

    Args:
        annotations: content of the file
        folder: folder to which the file names of the images are relative
        places: places of the images, in the file, that are used
        exif_transpose: whether images are turned as their EXIF orientation says

    Attributes:
        class_names: names in the order of the class indices, which is that of the file's categories
        notes: lines for the user
    """

    def __init__(
        self, annotations: CocoFile, folder: Path, places: np.ndarray | None = None, exif_transpose: bool = False
    ) -> None:
        self.annotations, self.folder, self.exif_transpose = annotations, folder, exif_transpose
        self.places = np.arange(len(annotations.images)) if places is None else places
        self.classes = ClassTable(annotations.names, colors_of(annotations.names))
        self.class_names = annotations.names
        self.notes = annotations.notes

    def __len__(self) -> int:
        return len(self.places)

    def load(self, index: int) -> AnnotatedImage:
        """Return an image with its objects.

        Raises:
            DataError: the image has another size than the annotation file says.
            UnreadableImageError: the image cannot be decoded.
        """
        entry = self.annotations.image(int(self.places[index]))
        path = self.folder / entry.file_name
        try:
            with path.open("rb") as file:
                image = decode_image(file, self.exif_transpose)
        except OSError as error:
            raise UnreadableImageError(error.strerror or str(error)) from error
        if image.size != (entry.width, entry.height):
            raise DataError(
                f"{path}: it has {image.width}×{image.height} pixels, but {self.annotations.path.name} says "
                f"{entry.width}×{entry.height} (image {entry.id})."
            )
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return AnnotatedImage(pixels, self.annotations.targets(int(self.places[index])), entry.id, entry.file_name)

    def sample_name(self, index: int) -> str:
        """Return the file name of the image, as in the annotation file."""
        return self.annotations.file_names[int(self.places[index])]

    def shapes(self) -> Tensor:
        """Return 1 for each landscape image and 0 for the others: groups for `EpochBatches`."""
        height, width = torch.from_numpy(self.annotations.sizes[self.places]).unbind(1)
        return (width > height).long()

    def check_files(self) -> None:
        """Raise a `DataError` if image files are missing; the message names the first."""
        folders: dict[str, set[str]] = {}
        missing = []
        for index in range(len(self)):
            below, name = os.path.split(self.sample_name(index))
            if below not in folders:
                folders[below] = _names_in(self.folder / below)
            if name not in folders[below]:
                missing.append(self.sample_name(index))
        if missing:
            raise DataError(
                f"{len(missing):,} of {len(self):,} images of {self.annotations.path} are not in {self.folder}: "
                f"{brief(missing)}. Check data.format and data.images, or add the files."
            )


def _names_in(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except OSError:
        return set()


def open_detection(config: DetectionDataConfig, part: Literal["train", "val"]) -> DetectionSource:
    """Open the training or the held-out images that a configuration describes.

    For training, images without any annotation (data.skip_empty) and those with a short side (data.min_size) are left out.

    Raises:
        ConfigError: data.root is missing, or there is no held-out split.
        DataError: files are missing or malformed, or no image is left; the message names them.
    """
    annotations, folder = _located(config, part)
    if config.masks:
        mask_tools()  # fails now rather than in a loading process
    content = read_coco(annotations, config.masks)
    places = None
    notes: tuple[str, ...] = ()
    if part == "train":
        used = content.sizes.min(axis=1) >= config.min_size
        if config.skip_empty:
            used &= content.annotated
        places = np.flatnonzero(used)
        if not len(places):
            raise DataError(
                f"None of the {len(used):,} images of {annotations} can be used for training: each has no annotation, or a "
                f"side shorter than data.min_size ({config.min_size})."
            )
        if len(places) < len(used):
            notes = (
                f"{len(used) - len(places):,} of {len(used):,} images of {annotations} are left out of training: without "
                f"annotation, or with a side shorter than {config.min_size} pixels.",
            )
    source = DetectionSource(content, folder, places, config.exif_transpose)
    source.notes += notes
    source.check_files()
    return source


def open_detection_splits(config: DetectionDataConfig) -> tuple[DetectionSource, DetectionSource | None]:
    """Open both splits, and check that they have the same classes in the same order.

    Without held-out images (data.val_split null), the second is `None`.

    Raises:
        ConfigError: as for `open_detection`.
        DataError: as for `open_detection`, or the classes differ.
    """
    train = open_detection(config, "train")
    if config.val_split is None:
        return train, None
    val = open_detection(config, "val")
    ours, theirs = ((each.annotations.category_ids, each.class_names) for each in (train, val))
    if ours != theirs:
        differing = next(
            (f"{a} and {b}" for a, b in zip(zip(*ours), zip(*theirs)) if a != b),
            f"{len(train.class_names)} and {len(val.class_names)} classes",
        )
        raise DataError(
            f"{train.annotations.path} and {val.annotations.path} have different categories ({differing}). The class "
            "indices follow the order of the categories in the file: make the lists equal."
        )
    return train, val


def _located(config: DetectionDataConfig, part: Literal["train", "val"]) -> tuple[Path, Path]:
    """Return the annotation file of a split and the folder of its images."""
    root = existing_folder("data.root", config.root, "the data set")
    split = config.split(part)
    if split is None:
        raise ConfigError("data.val_split is null, so there are no held-out images: name them (--data.val_split auto).")
    if config.format == "coco":
        return _file(root / "annotations" / f"instances_{split}.json", part), root / split
    path = _file(root / expand_path(f"data.{part}_split", split, root), part)
    return path, path.parent if config.images is None else root / expand_path("data.images", config.images, root)


def _file(path: Path, part: str) -> Path:
    if not path.is_file():
        raise DataError(f"{path} does not exist. Check data.format, data.root and data.{part}_split.")
    return path
