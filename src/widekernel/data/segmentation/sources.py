"""Images with a class for every pixel, from the folders of ADE20K and Cityscapes and from plain ones."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from widekernel.data.class_tables import ClassTable, published_classes, read_class_table
from widekernel.data.formats import brief
from widekernel.data.images import DECODER_ERRORS, UnreadableImageError, decode_image
from widekernel.data.paths import existing_folder, expand_path
from widekernel.data.segmentation.batches import LabeledScene
from widekernel.data.segmentation.config import SegmentationDataConfig
from widekernel.data.segmentation.labels import LabelTable, decode_labels, require_label_mode
from widekernel.data.segmentation.listing import Pairs, list_ade20k, list_cityscapes, list_plain
from widekernel.errors import ConfigError, DataError

_LISTED = {"ade20k": list_ade20k, "cityscapes": list_cityscapes, "folder": list_plain}
_CLASS_FILES = ("classes.json", "classes.txt")
_UNLABELED_IN_CITYSCAPES = 255
_LAST_LABEL_ID = 33
_LOOKED_AT = 16


class SegmentationSource:
    """Pairs of an image and a label file.

    Args:
        pairs: the files
        classes: names and colors
        table: translation of the numbers in label files
        exif_transpose: whether images are turned as their EXIF orientation says

    Attributes:
        class_names: names in the order of the class indices
        notes: lines for the user
    """

    def __init__(self, pairs: Pairs, classes: ClassTable, table: LabelTable, exif_transpose: bool = False) -> None:
        self.pairs, self.classes, self.table, self.exif_transpose = pairs, classes, table, exif_transpose
        self.class_names = classes.names
        self.notes = pairs.notes

    def __len__(self) -> int:
        return len(self.pairs.images)

    def load(self, index: int) -> LabeledScene:
        """Return an image with its labels.

        Raises:
            DataError: the label file has another size than the image, colors, or numbers that are no class.
            UnreadableImageError: one of the files cannot be decoded.
        """
        try:
            with (self.pairs.image_folder / self.pairs.images[index]).open("rb") as file:
                image = decode_image(file, self.exif_transpose)
        except OSError as error:
            raise UnreadableImageError(error.strerror or str(error)) from error
        labels = self._labels(index)
        height, width = labels.shape
        if image.size != (width, height):
            path = self.pairs.label_folder / self.pairs.labels[index]
            raise DataError(f"{path}: {_other_size((width, height), image.size)}.")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return LabeledScene(pixels, torch.from_numpy(labels), self.sample_name(index))

    def _labels(self, index: int) -> np.ndarray:
        """Return the class indices `(height, width)` in a label file; errors are as in `load`."""
        path = self.pairs.label_folder / self.pairs.labels[index]
        try:
            with path.open("rb") as file:
                return self.table.translate(decode_labels(file))
        except OSError as error:
            raise UnreadableImageError(error.strerror or str(error)) from error
        except UnreadableImageError:
            raise
        except DataError as error:
            raise DataError(f"{path}: {error}.") from error

    def sample_name(self, index: int) -> str:
        """Return the path of the image, relative to the folder of images."""
        return self.pairs.images[index]

    def check_headers(self) -> None:
        """Compare the size of every label file with that of its image, without decoding them.

        Files that cannot be opened are left for `load` to report.

        Raises:
            DataError: label files have another size or colors; the message names the first.
        """
        wrong = []
        for index in range(len(self)):
            path = self.pairs.label_folder / self.pairs.labels[index]
            try:
                with Image.open(self.pairs.image_folder / self.pairs.images[index]) as image, Image.open(path) as labels:
                    require_label_mode(labels)
                    turned = self.exif_transpose and image.getexif().get(0x0112, 1) >= 5
                    size = image.size[::-1] if turned else image.size
                    if labels.size != size:
                        wrong.append(f"{path.name}: {_other_size(labels.size, size)}")
            except DataError as error:
                wrong.append(f"{path.name}: {error}")
            except DECODER_ERRORS:
                continue
        if wrong:
            raise DataError(
                f"{len(wrong):,} of {len(self):,} label files in {self.pairs.label_folder} do not fit: "
                f"{'; '.join(wrong[:5])}."
            )

    def note_on_content(self) -> str:
        """Return a line for the user if some of the label files, spread over all, hold no second class; "" otherwise.

        So it is with masks of 0 and 255, whose objects have no class. Files that cannot be used are left for `load` to
        report.
        """
        found: set[int] = set()
        shown = range(0, len(self), -(-len(self) // _LOOKED_AT))
        for index in shown:
            try:
                found.update(np.unique(self._labels(index)).tolist())
            except (DataError, UnreadableImageError):
                continue
        classes = sorted(found - {self.table.ignore_index})
        if len(classes) > 1 or len(self.class_names) == 1:
            return ""
        held = f"only the class {self.class_names[classes[0]]!r}" if classes else "no class"
        return (
            f"The label files in {self.pairs.label_folder} hold {held} ({len(shown):,} of {len(self):,} were looked at). "
            f"The number {self.table.ignore_index} means that a pixel has no class (data.ignore_index)."
        )


def _other_size(labels: tuple[int, int], image: tuple[int, int]) -> str:
    turned = " (if the image is stored turned, set data.exif_transpose)" if labels == image[::-1] else ""
    return f"it has {labels[0]}×{labels[1]} pixels, but its image {image[0]}×{image[1]}{turned}"


def open_segmentation(config: SegmentationDataConfig, part: Literal["train", "val"]) -> SegmentationSource:
    """Open the training or the held-out images that a configuration describes.

    Raises:
        ConfigError: data.root is missing, or there is no held-out split.
        DataError: files are missing or do not fit together; the message names them.
    """
    root = existing_folder("data.root", config.root, "the data set")
    split = config.split(part)
    if split is None:
        raise ConfigError("data.val_split is null, so there are no held-out images: name them (--data.val_split auto).")
    pairs = _LISTED[config.format](root, split)
    classes = classes_of(config, root)
    source = SegmentationSource(pairs, classes, _table(config, classes, pairs), config.exif_transpose)
    if config.format == "folder":  # of published data sets, the files are known to fit
        source.check_headers()
        source.notes += tuple(filter(None, [source.note_on_content()]))
    return source


def classes_of(config: SegmentationDataConfig, root: Path) -> ClassTable:
    """Return the classes that data.classes, the format or a file in `root` names.

    Raises:
        DataError: there is no file of classes, or it cannot be read.
    """
    if config.classes is not None:
        path = Path(expand_path("data.classes", config.classes, root))
        return read_class_table(path if path.is_absolute() or path.exists() else root / path)
    if config.format != "folder":
        return published_classes(config.format)
    for name in _CLASS_FILES:
        if (root / name).exists():
            return read_class_table(root / name)
    raise DataError(
        f"{root} has no file of classes ({' or '.join(_CLASS_FILES)}). Write one with the name of a class in each line, in "
        "the order of the class indices, or give another file as data.classes."
    )


def _table(config: SegmentationDataConfig, classes: ClassTable, pairs: Pairs) -> LabelTable:
    reduce_zero = config.reduces_zero_label
    if config.format != "cityscapes":
        return LabelTable(len(classes), config.ignore_index, reduce_zero)
    if not pairs.label_ids:
        return LabelTable(len(classes), config.ignore_index, reduce_zero, also_ignored=(_UNLABELED_IN_CITYSCAPES,))
    if classes.label_ids is None:
        raise DataError(
            f"{pairs.label_folder} holds labelIds ({brief(pairs.labels[:1])}), which are translated only to the published "
            "classes of Cityscapes. Leave data.classes out, or write files *_labelTrainIds.png."
        )
    ignored = (*range(_LAST_LABEL_ID + 1), _UNLABELED_IN_CITYSCAPES)
    return LabelTable(len(classes), config.ignore_index, label_ids=classes.label_ids, also_ignored=ignored)
