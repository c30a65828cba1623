"""Listings of large folders, kept between starts; one that is out of date or damaged is not used."""

import hashlib
import json
import os
import time
from array import array
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from widekernel.data.formats import image_endings
from widekernel.data.listing import Listing, SkippedFiles
from widekernel.data.names import Names
from widekernel.files import write_atomically

LEAST = 10_000
"""Smallest number of images whose listing is kept; fewer are listed in less time than it takes to look for a file."""

_FORMAT = 2
_SETTLED = 2_000_000_000
"""Age in nanoseconds from which the modification time of a folder is trusted: some file systems count whole seconds."""

FolderStamps = dict[str, tuple[int, int]]
"""Modification time in nanoseconds and inode of every folder or archive that was read, by its path (below the split)."""


def stamp_of(folder: str | Path) -> tuple[int, int]:
    """Return the modification time and inode of a folder; creating, removing or renaming an entry changes the time."""
    status = Path(folder).stat()
    return status.st_mtime_ns, status.st_ino


def cache_file(root: Path) -> Path | None:
    """Return the file that may hold the listing of `root`, or `None` if WIDEKERNEL_LISTINGS is "off".

    The variable may also name the folder for these files. By default, it is widekernel/listings in the user's cache folder
    (XDG_CACHE_HOME, or else ~/.cache).
    """
    place = os.environ.get("WIDEKERNEL_LISTINGS", "")
    if place.lower() in ("off", "0"):
        return None
    if not place:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - never raises
        place = os.path.join(caches, "widekernel", "listings")  # noqa: PTH118
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]
    return Path(place) / f"{name}.listing"


def store(root: Path, listing: Listing, stamps: FolderStamps) -> None:
    """Keep a listing, unless it is small, a folder has just been changed, or the file cannot be written."""
    file = cache_file(root)
    if file is None or len(listing.names) < LEAST:
        return
    if time.time_ns() - max(modified for modified, _ in stamps.values()) < _SETTLED:
        return  # a further change might leave the same modification time
    parts: list[np.ndarray] = [
        np.frombuffer(listing.names.text, np.uint8),
        np.frombuffer(listing.names.ends, np.int64),
        np.frombuffer(listing.targets, np.int32),
        *(np.frombuffer(numbers, np.int64) for numbers in listing.numbers.values()),
    ]
    header = {
        **_key(root),
        "stamps": stamps,
        "class_names": listing.class_names,
        "skipped": vars(listing.skipped),
        "image_folders": [sorted(folders) for folders in listing.image_folders],
        "numbers": list(listing.numbers),
        "lengths": [part.nbytes for part in parts],
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(len(encoded) + 48) % 8)  # so that the arrays are aligned
    digest = _digest(encoded, *parts)

    def write(out: Any) -> None:
        out.write(digest + len(encoded).to_bytes(16, "little") + encoded)
        # From the widest numbers to the narrowest, for their alignment.
        for part in (parts[1], *parts[3:], parts[2], parts[0]):
            out.write(part.data.cast("B"))

    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, write)


def find(root: Path) -> Listing | None:
    """Return the kept listing of `root`, or `None` if there is none that is intact and up to date."""
    file = cache_file(root)
    if file is None:
        return None
    try:
        content = np.memmap(file, np.uint8, "r")
        size = int.from_bytes(bytes(content[32:48]), "little")
        encoded = bytes(content[48 : 48 + size])
        header = json.loads(encoded)
        if any(header[name] != value for name, value in _key(root).items()):
            return None
        text_bytes, ends_bytes, target_bytes, *numbers_bytes = header["lengths"]
        place = 48 + size
        parts: list[np.ndarray] = []
        for length in (ends_bytes, *numbers_bytes, target_bytes, text_bytes):
            parts.append(content[place : place + length])
            place += length
        ends, *numbers, targets, text = parts
        if place != len(content) or _digest(encoded, text, ends, targets, *numbers) != bytes(content[:32]):
            return None
        if any(stamp_of(root / folder) != tuple(stamp) for folder, stamp in header["stamps"].items()):
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return None
    skipped = header["skipped"]
    return Listing(
        class_names=tuple(header["class_names"]),
        names=Names.from_memory(text, ends.view(np.int64)),
        targets=array("i", targets.tobytes()),
        skipped=SkippedFiles(**{**skipped, "endings": Counter(skipped["endings"])}),
        image_folders=[set(folders) for folders in header["image_folders"]],
        numbers={name: array("q", part.tobytes()) for name, part in zip(header["numbers"], numbers, strict=True)},
    )


def _key(root: Path) -> dict[str, Any]:
    """Return what a listing depends on besides the folders."""
    return {"format": _FORMAT, "root": os.path.realpath(root), "endings": sorted(image_endings())}


def _digest(encoded: bytes, *parts: np.ndarray) -> bytes:
    digest = hashlib.sha256(encoded)
    for part in parts:
        digest.update(part.data.cast("B"))
    return digest.digest()
