"""Search for the images of a data set for segmentation, and for the label file of each."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from widekernel.data.formats import brief, ending_of, image_endings, is_clutter
from widekernel.data.names import Names, normalize_name
from widekernel.errors import DataError

LOSSLESS = (".png", ".bmp", ".tif", ".tiff", ".gif", ".pgm")
"""Endings of label files that may be paired with images of any format."""

LABEL_TRAIN_IDS, LABEL_IDS = "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"


@dataclass
class Pairs:
    """Images and their label files.

    Args:
        images: paths of the images, relative to `image_folder`
        labels: paths of the label files, relative to `label_folder`
        notes: lines for the user
        label_ids: whether the label files hold the labelIds of Cityscapes instead of class indices
    """

    image_folder: Path
    label_folder: Path
    images: Names = field(default_factory=Names)
    labels: Names = field(default_factory=Names)
    notes: tuple[str, ...] = ()
    label_ids: bool = False


def list_ade20k(root: Path, split: str) -> Pairs:
    """List `root/images/SPLIT/*` with `root/annotations/SPLIT/*.png`.

    Raises:
        DataError: a folder is missing or empty, or an image has no label file.
    """
    pairs = Pairs(root / "images" / split, root / "annotations" / split)
    return _paired(pairs, _stem_of(image_endings()), _stem_of(LOSSLESS))


def list_plain(root: Path, split: str) -> Pairs:
    """List `root/SPLIT/images/**` with the files of the same names, apart from endings, in `root/SPLIT/masks`.

    Raises:
        DataError: as for `list_ade20k`, or label files are JPEG images.
    """
    pairs = Pairs(root / split / "images", root / split / "masks")
    lossy = [name for name in _files(pairs.label_folder) if ending_of(name) in (".jpg", ".jpeg")]
    if lossy:
        raise DataError(
            f"{pairs.label_folder / lossy[0]} is a JPEG image ({len(lossy):,} in all), whose pixels are not exact class "
            "indices. Save the masks as PNG."
        )
    return _paired(pairs, _stem_of(image_endings()), _stem_of(LOSSLESS))


def list_cityscapes(root: Path, split: str) -> Pairs:
    """List `root/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` with the labels in `root/gtFine/SPLIT/CITY`.

    The labels are *_gtFine_labelTrainIds.png, or *_gtFine_labelIds.png if there are none of the former.

    Raises:
        DataError: as for `list_ade20k`.
    """
    pairs = Pairs(root / "leftImg8bit" / split, root / "gtFine" / split)
    pairs.label_ids = not any(name.endswith(LABEL_TRAIN_IDS) for name in _files(pairs.label_folder))
    ending = LABEL_IDS if pairs.label_ids else LABEL_TRAIN_IDS
    return _paired(pairs, _without("_leftImg8bit.png"), _without(ending))


def _stem_of(endings: tuple[str, ...] | frozenset[str]) -> Callable[[str], str | None]:
    """Return a function from a path to the path without its ending, or to `None` if that is not one of `endings`."""
    return lambda path: os.path.splitext(path)[0] if ending_of(path.rpartition("/")[2]) in endings else None  # noqa: PTH122


def _without(ending: str) -> Callable[[str], str | None]:
    return lambda path: path[: -len(ending)] if path.endswith(ending) else None


def _paired(pairs: Pairs, key_of_image: Callable[[str], str | None], key_of_label: Callable[[str], str | None]) -> Pairs:
    images = _by_key(pairs.image_folder, key_of_image)
    labels = _by_key(pairs.label_folder, key_of_label)
    for found, folder, what in ((images, pairs.image_folder, "images"), (labels, pairs.label_folder, "label files")):
        if not found:
            raise DataError(f"{folder} contains no {what}. Check data.format, data.root and the name of the split.")
    missing = [images[key] for key in images if key not in labels]
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(images):,} images in {pairs.image_folder} have no label file of the same name in "
            f"{pairs.label_folder}: {brief(missing)}. Add the label files, or remove the images."
        )
    alone = [labels[key] for key in labels if key not in images]
    if alone:
        pairs.notes += (f"{len(alone):,} label files in {pairs.label_folder} have no image: {brief(alone)}.",)
    keys = sorted(images, key=normalize_name)
    pairs.images.extend("", (images[key] for key in keys))
    pairs.labels.extend("", (labels[key] for key in keys))
    return pairs


def _by_key(folder: Path, key_of: Callable[[str], str | None]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in _files(folder):
        key = key_of(path)
        if key is None:
            continue
        if key in found:
            raise DataError(
                f"{folder} contains both {found[key]} and {path}, so the pair of an image and its label file is not clear. "
                "Remove one."
            )
        found[key] = path
    return found


def _files(folder: Path) -> list[str]:
    """Return the paths, with slashes, of all files below a folder and relative to it, in alphabetical order."""
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist. Check data.format, data.root and the name of the split.")
    paths = []
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not is_clutter(name))
        for name in folders:
            _refuse_circle(Path(place) / name)
        below = Path(place).relative_to(folder).as_posix()
        start = "" if below == "." else f"{below}/"
        paths += [start + name for name in sorted(files) if not is_clutter(name)]
    return paths


def _refuse_circle(path: Path) -> None:
    """Raise if a folder is a link to one that contains it, below which the search would not end."""
    if path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve()):
        raise DataError(f"{path} is a link to {path.resolve()}, which contains the link itself. Remove it.")


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read as a folder: {error.strerror}.") from error
