"""Contents of a shard, a tar archive with an image and a class number under each key (the layout of webdataset)."""

import json
import os
import posixpath
import tarfile
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from widekernel.data.formats import image_endings, is_clutter, printable, usual_endings
from widekernel.data.listing import SkippedFiles
from widekernel.data.names import normalize_name
from widekernel.data.tar_contents import Contents, read_contents
from widekernel.errors import DataError

CLASSES_FILE = "classes.txt"

MOST_CLASSES = 1_000_000
"""Number of classes above which a class number is taken for an error."""

LABELS = ("cls", "label")
"""Entries of a `.json` file that may hold the class number, the first of which is preferred."""

_MOST_BYTES = {"cls": 64, "json": 1 << 20}
"""Largest files that are read for a class number."""


@dataclass
class ShardContents:
    """The images of a shard, in the order of the archive.

    Args:
        names: path of each image in the archive
        targets: class number of each image
        offsets: position of the first byte of each image
        sizes: bytes of each image
        skipped: files without an image and a class
    """

    names: list[str] = field(default_factory=list)
    targets: "array[int]" = field(default_factory=lambda: array("i"))
    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    skipped: SkippedFiles = field(default_factory=SkippedFiles)


def read_shard(path: Path) -> ShardContents:
    """Read the names, classes and positions of the images of a shard.

    The key of a file is its path up to the first point of its name, and what follows says what it contains: an image
    (`jpg`, `png`, ...), its class number as text (`cls`), or an object with such a number (`json`).

    Raises:
        DataError: the archive is damaged, incomplete or compressed, several files have the same name, or a key has an image
            but no class, a class but no image, several images, or a class that is not a number from 0 on.
    """
    contents = read_contents(path, lambda _: ())
    shard = ShardContents()
    with path.open("rb", buffering=0) as file:
        for key, members in _by_key(path, contents).items():
            _Sample(path, key, members, contents).add_to(shard, file)
    return shard


def is_shard(path: Path) -> bool:
    """Return whether an archive is a shard: its first key has an image and a class, or lies in no folder and has a .json.

    An archive of class folders is not, and neither is one that cannot be read.
    """
    kinds: dict[str, set[str]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile() or _is_left_out(member.name):
                    continue
                key, kind = split_key(member.name)
                if kinds and key not in kinds:
                    break
                kinds.setdefault(key, set()).add(kind)
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, LookupError, EOFError):
        return False
    for key, found in kinds.items():
        labels = {"cls"} if "/" in key else {"cls", "json"}
        return bool(found & labels) and any(f".{kind}" in image_endings() for kind in found)
    return False


def split_key(path: str) -> tuple[str, str]:
    """Return the key of a file in a shard, and what follows its first point, in lower case."""
    folder, name = posixpath.split(posixpath.normpath(path))
    key, _, kind = name.partition(".")
    return posixpath.join(folder, key), kind.lower()


def _is_left_out(path: str) -> bool:
    return any(is_clutter(part) for part in path.split("/") if part != ".")


def _by_key(path: Path, contents: Contents) -> dict[str, dict[str, str]]:
    """Return the paths of the files of each key, by what they contain, in the order in which the keys begin."""
    found: dict[str, dict[str, str]] = {}
    for name in contents.paths:
        if _is_left_out(name):
            continue
        key, kind = split_key(name)
        members = found.setdefault(key, {})
        if name in contents.repeated or kind in members:
            raise DataError(
                f"{path}: the key {printable(key)!r} occurs twice (.{printable(kind)}). Keys must differ within a shard: "
                "rename one of them."
            )
        members[kind] = name
    return found


@dataclass
class _Sample:
    """The files of a key."""

    path: Path
    key: str
    members: dict[str, str]
    contents: Contents

    def add_to(self, shard: ShardContents, file: IO[bytes]) -> None:
        images = [kind for kind in self.members if f".{kind}" in image_endings()]
        if not images and "cls" not in self.members:
            for name in self.members.values():
                shard.skipped.add(name)
            return
        if len(images) != 1:
            what = f"has several images ({self._kinds(images)})" if images else "has a class, but no image"
            raise self._error(f"{what}. Each key needs exactly one image ({usual_endings()}).")
        name = self.members[images[0]]
        number = self.contents.paths[name]
        if number in self.contents.broken:
            raise self._error(f"the image {printable(name)} {self.contents.broken[number]}.")
        shard.targets.append(self._class(file))
        shard.names.append(name)
        shard.offsets.append(self.contents.offsets[number])
        shard.sizes.append(self.contents.sizes[number])

    def _class(self, file: IO[bytes]) -> int:
        """Return the class number, from the .cls file or else the .json file."""
        for kind in ("cls", "json"):
            if kind in self.members:
                text = self._text(file, kind)
                value = text.strip() if kind == "cls" else self._entry(text)
                return self._number(value, kind)
        raise self._error(f"has no class: beside {self._kinds(self.members)} there is neither a .cls nor a .json file.")

    def _text(self, file: IO[bytes], kind: str) -> str:
        number = self.contents.paths[self.members[kind]]
        size = self.contents.sizes[number]
        if number in self.contents.broken:
            raise self._error(f"the .{kind} file {self.contents.broken[number]}.")
        if size > _MOST_BYTES[kind]:
            raise self._error(f"the .{kind} file has {size:,} bytes, which is too many for a class number.")
        try:
            return os.pread(file.fileno(), size, self.contents.offsets[number]).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self._error(f"the .{kind} file is not text in UTF-8.") from error
        except OSError as error:
            raise self._error(f"the .{kind} file cannot be read: {error.strerror or error}.") from error

    def _entry(self, text: str) -> Any:
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._error(f"the .json file is damaged ({error}).") from error
        for label in LABELS:
            if isinstance(entries, dict) and label in entries:
                return entries[label]
        raise self._error(f"has no class: the .json file has no entry {' or '.join(map(repr, LABELS))}.")

    def _number(self, value: Any, kind: str) -> int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19
        if not (whole or digits) or not 0 <= int(value) < MOST_CLASSES:
            shown = printable(str(value)[:40])
            raise self._error(
                f"the class in the .{kind} file is {shown!r}, but must be a whole number from 0 to {MOST_CLASSES - 1:,}."
            )
        return int(value)

    def _kinds(self, kinds: Iterable[str]) -> str:
        return ", ".join(f".{printable(kind)}" for kind in kinds)

    def _error(self, text: str) -> DataError:
        return DataError(f"{self.path}: the key {printable(self.key)!r}: {text}")


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """Return the normalized class names in the lines of `classes.txt` in a folder, or `None` if there is no such file.

    Raises:
        DataError: the file cannot be read, is empty, or has an empty line or the same name twice.
    """
    file = folder / CLASSES_FILE
    if not file.exists():
        return None
    try:
        text = file.read_text("utf-8-sig").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text in UTF-8: {error}.") from error
    if not text:
        raise DataError(f"{file} is empty. Line n + 1 must hold the name of class n; without the file, classes are numbers.")
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        name = normalize_name(line.strip())
        if not name or name in lines:
            what = f"repeats {printable(name)!r} of line {lines[name]}" if name else "is empty"
            raise DataError(f"{file}: line {number} {what}. Line n + 1 must hold the name of class n.")
        lines[name] = number
    return tuple(lines)
