"""Images in class folders."""

import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from typing_extensions import override

from widekernel.data import listing_cache
from widekernel.data.formats import brief, ending_of, image_endings, is_clutter
from widekernel.data.images import UnreadableImageError, decode_image
from widekernel.data.links import Links
from widekernel.data.listing import Listing, SkippedFiles, sorted_classes
from widekernel.data.listing_cache import FolderStamps
from widekernel.data.names import in_normalized_order, normalize_name
from widekernel.data.sources import FileSource
from widekernel.errors import DataError


class FolderSource(FileSource):
    """Images in `root/<class>/**`, classes in alphabetical order (torchvision's layout).

    Raises:
        DataError: the folder is missing or has no classes, a class has no images, or a link leads to a folder that contains
            it or to another class.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root, list_folder(root))

    @override
    def load(self, index: int) -> tuple[Image.Image, int]:
        try:
            with (self.path / self.names[index]).open("rb") as file:
                return decode_image(file, self.exif_transpose), self.targets[index]
        except OSError as error:
            raise UnreadableImageError(error.strerror or str(error)) from error

    @override
    def size(self, index: int) -> int:
        try:
            return (self.path / self.names[index]).stat().st_size
        except OSError:
            return -1


def list_folder(root: Path) -> Listing:
    """List the images below the class folders of `root`; hidden files and clutter are ignored.

    Raises:
        DataError: as for `FolderSource`.
    """
    listing = listing_cache.find(root)
    if listing is None:
        stamps: FolderStamps = {}
        listing = _list_folder(root, stamps)
        listing_cache.store(root, listing, stamps)
    return listing


def _list_folder(root: Path, stamps: FolderStamps) -> Listing:
    """List the folder itself, and note in `stamps` the state in which each folder was read."""
    skipped = SkippedFiles()
    found = []
    stamps[""] = _stamp(root)
    for entry in _entries(root):
        if is_folder(entry):
            found.append(entry.name)
        elif ending_of(entry.name) in image_endings():
            skipped.add_outside(entry.name)
        else:
            skipped.add(entry.name)
    if not found:
        raise DataError(_without_classes(root, skipped))
    folders, class_names = sorted_classes(str(root), found)
    listing = Listing(class_names, skipped=skipped)
    links = Links(root, folders)
    for index, folder in enumerate(folders):
        below = set()
        for place, files in _walk(root, folder, links, skipped, stamps):
            listing.names.extend(place + "/", in_normalized_order(files))
            listing.targets.extend([index] * len(files))
            below.add(place[len(folder) + 1 :])
        listing.image_folders.append(below)
    listing.check(str(root))
    return listing


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; a circular link is neither."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _walk(
    root: Path, top: str, links: Links, skipped: SkippedFiles, stamps: FolderStamps
) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder in `top` that contains images, with their names, in the order of the folders' paths."""
    found = []
    waiting = [(top, links.enter(top))]
    endings = image_endings()
    while waiting:
        folder, above = waiting.pop()
        images = []
        stamps[folder] = _stamp(root / folder)
        for entry in _entries(root / folder):
            name = entry.name
            # The common case comes first: it covers nearly all of possibly millions of files.
            if name[name.rfind(".") :].lower() in endings and entry.is_file(follow_symlinks=False):
                images.append(name)
                continue
            path = f"{folder}/{entry.name}"
            if is_folder(entry):
                place = links.follow(path, above) if entry.is_symlink() else f"{above[-1]}{os.sep}{entry.name}"
                waiting.append((path, (*above, place)))
            elif ending_of(name) in endings and _is_file(entry):
                images.append(entry.name)
            else:
                skipped.add(path)
        if images:
            found.append((folder, images))
    found.sort(key=lambda item: (normalize_name(item[0]), item[0]))
    yield from found


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a file or a broken link (an unreadable image), rather than a pipe or a device."""
    try:
        return entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists())
    except OSError:
        return True  # a circular link


def _stamp(folder: Path) -> tuple[int, int]:
    try:
        return listing_cache.stamp_of(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be read as an image folder: {error.strerror}.") from error


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.name[0] != "." and not is_clutter(entry.name)]
    except OSError as error:
        raise DataError(f"{folder} cannot be read as an image folder: {error.strerror}.") from error


def _without_classes(root: Path, skipped: SkippedFiles) -> str:
    if skipped.outside:
        return (
            f"{root} has no class folders, but {skipped.outside:,} image(s). If it is the folder of one class, give the "
            f"folder that contains it; otherwise put each class's images into a folder named after the class."
        )
    archives = sorted(entry.name for entry in _entries(root) if ending_of(entry.name) in (".tar", ".gz", ".tgz", ".zip"))
    choices = f"give an uncompressed archive (or several shards: {root.name}/*.tar), or unpack it"
    packed = f" It contains {brief(archives)}: {choices}." if archives else ""
    return (
        f"{root} has no class folders, but the layout is {root.name}/<class>/<image>. "
        f"Put each class's images into a folder named after the class.{packed}"
    )
