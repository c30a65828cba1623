"""What a tar archive holds: files by their path, links followed, the last of several files of one name."""

import posixpath
import struct
import tarfile
import zlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from widekernel.data.errors import DataError
from widekernel.data.formats import ending_of, image_endings, is_clutter, printable

SPARSE = "is stored with holes; create the archive without --sparse"
_MOST_LINKS = 40

_TAR_ERRORS = (
    tarfile.TarError, ValueError, OverflowError, MemoryError, LookupError, EOFError, struct.error, zlib.error,
)  # fmt: skip
"""What the standard library raises for damaged archives."""


@dataclass
class Contents:
    """The files of an archive, by number.

    Args:
        paths: path of every file, without ``./`` and the like, and its number
        offsets: where its bytes start
        sizes: how many there are
        broken: numbers of files that cannot be read, and why
        folders: folders that are mentioned
    """

    paths: dict[str, int] = field(default_factory=dict)
    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    broken: dict[int, str] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)

    def add(self, path: str, offset: int, size: int) -> int:
        """Add a file, in place of an earlier one of that path."""
        number = len(self.offsets)
        self.offsets.append(offset)
        self.sizes.append(size)
        self.paths[path] = number
        return number


def read_contents(path: Path) -> Contents:
    """Read the table of an archive, and of archives in it, which stand for folders.

    Raises:
        DataError: it is no tar archive, damaged, incomplete or compressed, or a link in it cannot be followed.
    """
    scan = _Scan(path)
    try:
        with path.open("rb") as file:
            scan.read(file, "", 0)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except _TAR_ERRORS as error:
        raise DataError(
            f"{path} is not a readable, uncompressed tar archive ({error}). Unpack it or re-create it."
        ) from error
    scan.follow_links()
    return scan.contents


class _Scan:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.contents = Contents()
        self.links: dict[str, str] = {}

    def read(self, file: IO[bytes], prefix: str, start: int) -> None:
        """Add the members of the archive ``file``, which starts at byte ``start`` of the outer one."""
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # a million of them would stay in memory
                self._add(archive, member, prefix, start)
            self._check_end(file, archive.offset)

    def _add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, prefix: str, start: int) -> None:
        path = _join(prefix, member.name)
        if member.isdir():
            self.contents.folders.add(path)
            return
        self.links.pop(path, None)
        if member.islnk() or member.issym():
            folder = prefix if member.islnk() else posixpath.dirname(path)
            outside = member.issym() and member.linkname.startswith("/")
            self.links[path] = "" if outside else _join(folder, member.linkname)
            self.contents.paths.pop(path, None)
        elif member.isfile():
            if ending_of(path) == ".tar" and not prefix and not is_clutter(posixpath.basename(path)):
                inner = archive.extractfile(member)
                assert inner is not None, "a regular file has contents"
                try:
                    self.read(inner, path[: -len(".tar")], start + member.offset_data)
                except tarfile.TarError as error:
                    raise tarfile.ReadError(f"{printable(path)} in it: {error}") from error
                return
            number = self.contents.add(path, start + member.offset_data, member.size)
            if member.issparse():
                self.contents.broken[number] = SPARSE

    def _check_end(self, file: IO[bytes], end: int) -> None:
        # tarfile takes the end of the file, a header cut short and a damaged header for the end of the archive
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise DataError(
                f"{self.path} is incomplete or damaged: after {end:,} bytes neither a file nor the end of the archive "
                "follows, so images are missing. Copy it again or re-create it."
            )

    def follow_links(self) -> None:
        for link in sorted(self.links):
            if any(is_clutter(part) for part in link.split("/")):
                continue
            target = self.links[link]
            for _ in range(_MOST_LINKS):
                target = self.links.get(target, target)
            number = self.contents.paths.get(target)
            if number is not None:
                self.contents.paths[link] = number
            elif ending_of(link) in image_endings():
                number = self.contents.add(link, 0, -1)
                self.contents.broken[number] = "is a link to a file that is not in the archive"
            else:
                raise DataError(
                    f"{self.path} holds the link {printable(link)}, which leads to a folder or out of the archive. Create "
                    "the archive with the contents in place of links: tar --dereference."
                )


def _join(folder: str, name: str) -> str:
    """A path in the archive without empty parts, ``.`` and ``..``; those above the top end there, as in tar."""
    parts: list[str] = []
    for part in f"{folder}/{name}".split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)
