"""Contents of tar archives: files by path, with links followed; if several files have the same name, the last counts."""

import posixpath
import struct
import tarfile
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from widekernel.data.formats import ending_of, is_clutter, printable
from widekernel.errors import DataError

SPARSE = "is stored with holes; create the archive without --sparse"
LOST = "is a link to a file that is not in the archive"
_MOST_LINKS = 40
_OUTSIDE = "/"  # the target of absolute links; paths in the archive never equal it

_TAR_ERRORS = (
    tarfile.TarError, ValueError, OverflowError, MemoryError, LookupError, EOFError, struct.error, zlib.error,
)  # fmt: skip
"""Errors that the standard library raises for damaged archives."""


@dataclass
class Contents:
    """Files of an archive, by number.

    Args:
        paths: path of every file, without `./` and the like, and its number
        offsets: position of the first byte of each file
        sizes: bytes of each file
        broken: number of each file that cannot be read, and why
        folders: folders that have their own entry
        repeated: paths that several files have
    """

    paths: dict[str, int] = field(default_factory=dict)
    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    broken: dict[int, str] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)

    def add(self, path: str, offset: int, size: int) -> int:
        """Add a file, which replaces an earlier one with the same path, and return its number."""
        number = len(self.offsets)
        self.offsets.append(offset)
        self.sizes.append(size)
        if path in self.paths:
            self.repeated.add(path)
        self.paths[path] = number
        return number


def read_contents(path: Path, which_inside: Callable[[Contents], Iterable[str]]) -> Contents:
    """Read the headers of an archive, and of the archives inside it that stand for folders.

    Args:
        path: the archive
        which_inside: function of the contents that returns the paths of the inner archives to read as folders

    Raises:
        DataError: it is not a tar archive, is damaged, incomplete or compressed, or a link in it leads to a folder.
    """
    scan = _Scan(path)
    try:
        with path.open("rb") as file:
            scan.read(file, "", 0)
            scan.open_inside(file, which_inside(scan.contents))
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except _TAR_ERRORS as error:
        raise DataError(
            f"{path} is not a readable, uncompressed tar archive ({error}; {scan.position}). Unpack it or re-create it."
        ) from error
    scan.follow_links()
    return scan.contents


class _Scan:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.contents = Contents()
        self.links: dict[str, str] = {}
        self.inside: dict[str, tarfile.TarInfo] = {}
        self.opened: list[str] = []
        self.last = ""

    @property
    def position(self) -> str:
        """The last file that was found, for a message."""
        return f"the last file is {printable(self.last)}" if self.last else "it has no files"

    def read(self, file: IO[bytes], prefix: str, start: int) -> None:
        """Add the members of the archive `file`, which starts at byte `start` of the outer one."""
        with tarfile.open(fileobj=file, mode="r:") as archive:
            before = -1
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # otherwise a million of them would stay in memory
                if member.size < 0 or archive.offset <= before:  # the archive leads back, and would be read forever
                    raise tarfile.ReadError(f"damaged: {printable(member.name)} is {member.size:,} bytes long")
                before = archive.offset
                self._add(member, prefix, start)
            self._check_end(file, archive.offset, prefix)

    def open_inside(self, file: IO[bytes], paths: Iterable[str]) -> None:
        """Replace the inner archives `paths` of the archive `file` by their members."""
        for path in list(paths):
            number = self.contents.paths.pop(path)
            member = self.inside[path]
            if number in self.contents.broken:
                raise DataError(f"{printable(path)} in {self.path} {self.contents.broken[number]}.")
            folder = path[: -len(".tar")]
            self.contents.folders.add(folder)
            self.opened.append(path)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                inner = archive.extractfile(member)
                assert inner is not None, "a regular file has contents"
                try:
                    self.read(inner, folder, member.offset_data)
                except _TAR_ERRORS as error:
                    if isinstance(error, DataError):
                        raise
                    raise tarfile.ReadError(f"{printable(path)} in it: {error}") from error

    def _add(self, member: tarfile.TarInfo, prefix: str, start: int) -> None:
        path = self.last = _join(prefix, member.name)
        if member.isdir():
            self.contents.folders.add(path)
            return
        self.links.pop(path, None)
        if member.islnk() or member.issym():
            folder = prefix if member.islnk() else posixpath.dirname(path)
            outside = member.issym() and member.linkname.startswith("/")
            self.links[path] = _OUTSIDE if outside else _join(folder, member.linkname)
            self.contents.paths.pop(path, None)
        elif member.isfile():
            if ending_of(path) == ".tar" and not prefix:
                self.inside[path] = member
            number = self.contents.add(path, start + member.offset_data, member.size)
            if member.issparse():
                self.contents.broken[number] = SPARSE

    def _check_end(self, file: IO[bytes], end: int, prefix: str) -> None:
        # tarfile takes the end of the file, a truncated header and a damaged header for the end of the archive.
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            name = f"{printable(prefix)}.tar in {self.path}" if prefix else str(self.path)
            raise DataError(
                f"{name} is incomplete or damaged: after {end:,} bytes ({self.position}) neither a file nor the end of the "
                "archive follows, so images may be missing. Copy it again or re-create it."
            )

    def follow_links(self) -> None:
        folders: set[str] = set()
        lost: list[str] = []
        for link in sorted(self.links):
            if any(is_clutter(part) for part in link.split("/")):
                continue
            target = self.links[link]
            for _ in range(_MOST_LINKS):
                target = self.links.get(target, target)
            number = self.contents.paths.get(target)
            if number is not None:
                self.contents.paths[link] = number
                continue
            folders = folders or self._folders()
            if target in folders:
                raise DataError(
                    f"{self.path} holds the link {printable(link)}, which leads to a folder. Create the archive with the "
                    "contents in place of links: tar --dereference."
                )
            lost.append(link)
        for link in lost:
            self.contents.broken[self.contents.add(link, 0, -1)] = LOST

    def _folders(self) -> set[str]:
        """Return all folders of the archive, with or without an entry, and the inner archives that were read as folders."""
        found = {"", *self.opened}
        for path in (*self.contents.folders, *(posixpath.dirname(path) for path in self.contents.paths)):
            while path not in found:
                found.add(path)
                path = posixpath.dirname(path)
        return found


def _join(folder: str, name: str) -> str:
    """Join and normalize a path in the archive: no empty parts, `.` or `..`. As in tar, `..` never leaves the archive."""
    parts: list[str] = []
    for part in f"{folder}/{name}".split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)
