"""Images in the shards of a webdataset, read in any order without unpacking."""

import hashlib
import os
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from typing_extensions import override

from widekernel.data import listing_cache
from widekernel.data.formats import brief, printable
from widekernel.data.images import decode_bytes
from widekernel.data.listing import Listing, SkippedFiles
from widekernel.data.open_archives import OpenArchives
from widekernel.data.shard_contents import CLASSES_FILE, read_class_names, read_shard, split_key
from widekernel.data.sources import FileSource
from widekernel.errors import DataError


class ShardSource(FileSource):
    """Images in tar archives that hold an image and its class number under each key.

    The images are in the order of the shards, and of the files in each. Classes are named by the lines of `classes.txt`
    beside the first shard; without it, their names are their numbers.

    Args:
        path: the shards in one name, for messages
        shards: the archives; a name must occur only once

    Raises:
        DataError: a shard is damaged or does not have this layout, there are no images, or a class has no name.
    """

    def __init__(self, path: Path, shards: Sequence[Path]) -> None:
        listing = list_shards(path, shards)
        self.shards = tuple(shards)
        self._ends = listing.numbers["ends"]
        listing.class_names = self._class_names(listing)
        super().__init__(path, listing)
        self._archives = OpenArchives()
        present = np.bincount(np.asarray(listing.targets), minlength=len(self.class_names))
        absent = [self.class_names[number] for number in np.flatnonzero(present == 0)]
        if absent:
            self.notes += (f"{path}: {len(absent):,} of {len(self.class_names):,} classes have no images: {brief(absent)}.",)

    @override
    def load(self, index: int) -> tuple[Image.Image, int]:
        numbers = self.listing.numbers
        content = self._archives.read(self._shard_of(index), numbers["offsets"][index], numbers["sizes"][index])
        return decode_bytes(content, self.exif_transpose), self.targets[index]

    @override
    def size(self, index: int) -> int:
        return self.listing.numbers["sizes"][index]

    @override
    def files(self) -> tuple[Path, ...]:
        return self.shards

    def _shard_of(self, index: int) -> Path:
        return self.shards[bisect_right(self._ends, index)]

    def _class_names(self, listing: Listing) -> tuple[str, ...]:
        largest = int(np.argmax(np.asarray(listing.targets)))
        number = listing.targets[largest]
        names = read_class_names(self.shards[0].parent)
        if names is None:
            return tuple(str(each) for each in range(number + 1))
        if number >= len(names):
            name = listing.names[largest].partition("/")[2]
            raise DataError(
                f"{self._shard_of(largest)}: the key {printable(split_key(name)[0])!r} is of class {number}, but "
                f"{self.shards[0].parent / CLASSES_FILE} names {len(names)} classes, 0 to {len(names) - 1}. Correct one of "
                "them."
            )
        return names


def list_shards(path: Path, shards: Sequence[Path]) -> Listing:
    """List the images of all shards; a listing that was kept is used if no shard has changed since.

    Its `numbers` are the positions and sizes of the images (`offsets`, `sizes`), and for each shard the number of images up
    to its end (`ends`). It has no class names.

    Raises:
        DataError: as for `ShardSource`.
    """
    _check_names(path, shards)
    places = "\0".join(os.path.realpath(shard) for shard in shards)
    kept_as = shards[0].parent / hashlib.sha256(os.fsencode(places)).hexdigest()
    listing = listing_cache.find(kept_as)
    if listing is not None:
        return listing
    listing = Listing((), numbers={name: array("q") for name in ("offsets", "sizes", "ends")})
    stamps: listing_cache.FolderStamps = {}
    for shard in shards:
        try:
            stamps[os.path.realpath(shard)] = listing_cache.stamp_of(shard)
            contents = read_shard(shard)
        except OSError as error:
            raise DataError(f"{shard} cannot be read: {error.strerror or error}.") from error
        listing.names.extend(f"{shard.name}/", contents.names)
        listing.targets.extend(contents.targets)
        listing.numbers["offsets"].extend(contents.offsets)
        listing.numbers["sizes"].extend(contents.sizes)
        listing.numbers["ends"].append(len(listing.names))
        _merge(listing.skipped, contents.skipped, shard.name)
    if not len(listing.names):
        raise DataError(
            f"{path} holds no images with a class. The layout is <key>.jpg with <key>.cls or <key>.json, where the key is "
            "the name up to its first point."
        )
    listing_cache.store(kept_as, listing, stamps)
    return listing


def _check_names(path: Path, shards: Sequence[Path]) -> None:
    twice = [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]
    if twice:
        raise DataError(f"{path} names several shards {printable(twice[0])}, in different folders. Rename one of them.")


def _merge(skipped: SkippedFiles, others: SkippedFiles, shard: str) -> None:
    skipped.endings.update(others.endings)
    if others.example and not skipped.example:
        skipped.example = f"{shard}/{others.example}"
