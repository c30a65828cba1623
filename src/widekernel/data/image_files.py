"""Images without labels: one file, all images below a folder, or those in a tar archive."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from widekernel.data.formats import ending_of, image_endings, is_clutter, usual_endings
from widekernel.data.images import UnreadableImageError, decode_bytes, decode_image
from widekernel.data.open_archives import OpenArchives
from widekernel.data.samples import Source
from widekernel.data.tar_contents import read_contents
from widekernel.errors import DataError


class ImageFiles:
    """The images of a path, in alphabetical order of their names.

    Args:
        path: an image, a folder with images at any depth, or an uncompressed .tar archive of them
        exif_transpose: whether images are turned as their EXIF orientation says

    Attributes:
        names: path of each image relative to the folder or in the archive, or the name of the file

    Raises:
        DataError: the path does not exist, cannot be read, or holds no images.
    """

    def __init__(self, path: Path, exif_transpose: bool = False) -> None:
        self.path, self.exif_transpose = path, exif_transpose
        self._archives = OpenArchives()
        self._places: dict[str, tuple[int, int]] = {}
        self._broken: dict[str, str] = {}
        if not path.exists():
            raise DataError(f"{path} does not exist. Give an image, a folder of images, or a .tar archive of them.")
        if path.is_dir():
            self.names = tuple(sorted(_below(path)))
        elif path.suffix.lower() == ".tar":
            self._read_archive()
            self.names = tuple(sorted(self._places))
        else:
            self.names = (path.name,)
        if not self.names:
            raise DataError(f"{path} holds no images. Images are files such as {usual_endings()}.")

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Image.Image:
        """Return an RGB image.

        Raises:
            UnreadableImageError: it cannot be decoded.
        """
        name = self.names[index]
        if name in self._broken:
            raise UnreadableImageError(self._broken[name])
        if name in self._places:
            return decode_bytes(self._archives.read(self.path, *self._places[name]), self.exif_transpose)
        try:
            with (self.path / name if self.path.is_dir() else self.path).open("rb") as file:
                return decode_image(file, self.exif_transpose)
        except OSError as error:
            raise UnreadableImageError(error.strerror or str(error)) from error

    def sample_name(self, index: int) -> str:
        """Return the name of an image for messages."""
        return self.names[index]

    def _read_archive(self) -> None:
        contents = read_contents(self.path, lambda _: ())
        for name, number in contents.paths.items():
            if _is_image(name):
                self._places[name] = contents.offsets[number], contents.sizes[number]
                if number in contents.broken:
                    self._broken[name] = contents.broken[number]


def draw(
    source: Source,
    count: int,
    seed: int,
    unreadable: Callable[[int, UnreadableImageError], None] = lambda index, error: None,
) -> Iterator[tuple[int, Any]]:
    """Yield `count` readable items in a random order, each with its index; fewer if there are not as many.

    Args:
        source: images with or without labels.
        count: number of items.
        seed: seed of the order, which depends on nothing else.
        unreadable: told each item that is left out because it cannot be decoded.
    """
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    for index in order:
        if not count:
            return
        try:
            item = source.load(index)
        except UnreadableImageError as error:
            unreadable(index, error)
            continue
        count -= 1
        yield index, item


def _is_image(name: str) -> bool:
    return ending_of(name) in image_endings() and not any(is_clutter(part) for part in name.split("/"))


def _below(root: Path) -> list[str]:
    """Return the paths of the images below `root`, relative to it; links to folders are not followed."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not is_clutter(name)]
        inside = Path(folder).relative_to(root)
        found += [(inside / name).as_posix() for name in files if _is_image(name)]
    return found
