"""Images in class folders inside a tar archive, read without unpacking."""

import posixpath
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from typing_extensions import override

from widekernel.data.class_checks import SPLITS
from widekernel.data.formats import brief, ending_of, image_endings, is_clutter, printable, usual_endings
from widekernel.data.images import UnreadableImageError, decode_bytes
from widekernel.data.listing import Listing, sorted_classes
from widekernel.data.names import sort_key
from widekernel.data.open_archives import OpenArchives
from widekernel.data.sources import FileSource
from widekernel.data.tar_contents import LOST, Contents, read_contents
from widekernel.errors import DataError


class TarSource(FileSource):
    """Images in a tar archive, with the same classes, order and names as in the unpacked folder.

    The archive may hold the class folders themselves, or one or more nested folders around them.

    Raises:
        DataError: the archive is damaged, incomplete or compressed, has no images in class folders, or does not
            show which folders are the classes.
    """

    def __init__(self, path: Path) -> None:
        contents = read_contents(path, lambda contents: _class_archives(path, contents))
        listing, numbers = list_archive(path, contents)
        super().__init__(path, listing)
        self._offsets = type(contents.offsets)("q", (contents.offsets[number] for number in numbers))
        self._sizes = type(contents.sizes)("q", (contents.sizes[number] for number in numbers))
        self._broken = {index: contents.broken[number] for index, number in enumerate(numbers) if number in contents.broken}
        self._archives = OpenArchives()

    @override
    def load(self, index: int) -> tuple[Image.Image, int]:
        if index in self._broken:
            raise UnreadableImageError(self._broken[index])
        content = self._archives.read(self.path, self._offsets[index], self._sizes[index])
        return decode_bytes(content, self.exif_transpose), self.targets[index]

    @override
    def size(self, index: int) -> int:
        return self._sizes[index]


def list_archive(path: Path, contents: Contents) -> tuple[Listing, list[int]]:
    """List the images below the class folders of an archive, and their numbers in `contents`.

    Raises:
        DataError: as for `TarSource`.
    """
    endings = image_endings()
    root = _find_root(path, contents)
    start = f"{root}/" if root else ""
    images: list[str] = []
    listing = Listing(())
    folders = {_first(folder[len(start) :]) for folder in contents.folders if folder.startswith(start)} - {""}
    for full, number in contents.paths.items():
        inside = full[len(start) :]
        if not full.startswith(start) or any(is_clutter(part) for part in inside.split("/")):
            continue
        if "/" in inside:
            folders.add(_first(inside))
        if ending_of(inside) not in endings:
            listing.skipped.add(inside)
            if contents.broken.get(number) == LOST:
                listing.skipped.add_lost(inside)
        elif "/" in inside:
            images.append(inside)
        else:
            listing.skipped.add_outside(inside)
    ordered, listing.class_names = sorted_classes(str(path), (name for name in folders if not is_clutter(name)))
    index_of = {name: index for index, name in enumerate(ordered)}
    listing.image_folders = [set() for _ in ordered]
    images.sort(key=lambda name: (sort_key(name), name))
    listing.names.extend("", images)
    for name in images:
        top, _, below = name.rpartition("/")[0].partition("/")
        listing.targets.append(index_of[top])
        listing.image_folders[index_of[top]].add(below)
    listing.check(str(path))
    return listing, [contents.paths[start + name] for name in images]


def _first(path: str) -> str:
    return path.partition("/")[0]


def _find_root(path: Path, contents: Contents) -> str:
    """Return the folder of the archive whose subfolders are the classes; "" is the archive itself.

    This is the folder that is named like the archive or like a split, or else the first one that holds several folders.
    """
    return _root_of(path, _image_folders(path, contents))


def _class_archives(path: Path, contents: Contents) -> list[str]:
    """Return the inner archives that stand for class folders: those beside class folders, unless such a folder exists."""
    inside = [full for full in contents.paths if ending_of(posixpath.basename(full)) == ".tar"]
    inside = [full for full in inside if not any(is_clutter(part) for part in full.split("/"))]
    if not inside:
        return []
    try:
        root = _root_of(path, _image_folders(path, contents, inside))
    except DataError:
        root = _find_root(path, contents)
    start = f"{root}/" if root else ""
    folders = {start + _first(full[len(start) :]) for full in (*contents.folders, *contents.paths) if full.startswith(start)}
    return [full for full in inside if posixpath.dirname(full) == root and full[: -len(".tar")] not in folders]


def _root_of(path: Path, places: set[tuple[str, ...]]) -> str:
    chain: list[str] = []
    while len(inner := {place[len(chain)] for place in places if len(place) > len(chain)}) == 1:
        chain += inner
    for depth in range(len(chain), 0, -1):
        if _names_a_split(chain[depth - 1], path) and any(len(place) > depth for place in places):
            return "/".join(chain[:depth])
    holds_images = [depth for depth in range(1, len(chain) + 1) if tuple(chain[:depth]) in places]
    if not holds_images:
        _check_split_is_alone(path, inner, {place[len(chain)] for place in places if len(place) > len(chain) + 1})
        return "/".join(chain)
    only = chain[: holds_images[0]]
    if only[-1].lower() in SPLITS:
        raise DataError(_no_class_folders(path))
    if len(only) > 1:
        raise DataError(
            f"{path} holds images only in {printable('/'.join(only))}, which does not show which of these folders is the "
            f"class. Name the folder around the class folders {path.stem!r}, or put them at the top of the archive."
        )
    return ""


def _image_folders(path: Path, contents: Contents, archives: Sequence[str] = ()) -> set[tuple[str, ...]]:
    """Return the paths of the folders that contain images, split into parts; inner `archives` count as such folders."""
    endings = image_endings()
    folders = {full.rpartition("/")[0] for full in contents.paths if ending_of(full.rpartition("/")[2]) in endings}
    folders |= {archive[: -len(".tar")] for archive in archives}
    places = {tuple(folder.split("/")) if folder else () for folder in folders}
    # A hidden folder around everything is ignored: an archive of ~/.cache/data contains images.
    depth = 0
    while places and all(len(place) > depth for place in places) and len({place[depth] for place in places}) == 1:
        depth += 1
    places = {place for place in places if not any(is_clutter(part) for part in place[depth:])}
    if not places:
        raise DataError(f"{path} holds no images; the layout is <split>/<class>/<image> with {usual_endings()}.")
    if places == {()}:
        raise DataError(_no_class_folders(path))
    return places


def _names_a_split(name: str, path: Path) -> bool:
    return name.lower() in SPLITS or name == path.stem


def _check_split_is_alone(path: Path, folders: set[str], deep: set[str]) -> None:
    """Raise a `DataError` if `folders` include both a split and others; `deep` are those that contain folders."""
    splits = sorted(name for name in deep if _names_a_split(name, path))
    others = sorted(folders - set(splits))
    if splits and others:
        raise DataError(
            f"{path} holds {brief(splits)} beside {brief(others)}, so the classes may be in either. "
            f"Create an archive of the class folders alone."
        )


def _no_class_folders(path: Path) -> str:
    return f"{path} holds images only outside class folders; the layout is <split>/<class>/<image>."
