"""Atomic writing of files: after a crash, a file holds either its old or its new contents."""

import hashlib
import os
import platform
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from widekernel.errors import WidekernelError

# Names of temporary files; those of version 0.5 and earlier do not tell the host.
_OLD_TEMPORARY = re.compile(r"\.tmp\.\d+\.\d{9,}$")
_TEMPORARY = re.compile(r"\.tmp\.(?P<host>[\w-]+)\.(?P<pid>\d+)\.[0-9a-f]{8}$")
_ABANDONED = 3600  # seconds after which an unchanged temporary file belongs to nobody
_CHUNK = 1 << 22  # bytes
_being_written: set[Path] = set()


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], object], before_rename: Callable[[Path], object] | None = None
) -> None:
    """Let `write` fill a temporary file beside `path`, force it to disk and rename it into place.

    `before_rename` gets the path of the complete temporary file. A failed write leaves `path` as it was and removes
    the temporary file.
    """

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            write(file)

    replace_atomically(path, fill, before_rename)


def replace_atomically(
    path: Path, write: Callable[[Path], object], before_rename: Callable[[Path], object] | None = None
) -> None:
    """Write like `write_atomically`, with a `write` that takes the path of the temporary file.

    The new file has the system's default permissions, whatever `write` sets. If `path` is a link, the file that it points
    to is replaced, not the link.
    """
    path = path.resolve()
    temporary = path.with_name(f"{path.name}.tmp.{_host()}.{os.getpid()}.{secrets.token_hex(4)}")
    _being_written.add(temporary)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors creates files that only their owner may read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if before_rename is not None:
            before_rename(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # if nothing could be written, there is nothing to remove
            temporary.unlink()
        raise
    finally:
        _being_written.discard(temporary)
    sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in `folder` whose writers have died.

    A writer on this host is dead if its process is. Of another host, that is not known: its file is removed once it has not
    been written to for an hour, compared with the latest change in the folder, so that the clocks of hosts do not matter.
    """
    now = folder.stat().st_mtime
    for path in folder.resolve().glob("*.tmp.*"):
        ours = _TEMPORARY.search(path.name) or _OLD_TEMPORARY.search(path.name)
        if ours and path not in _being_written:
            with suppress(FileNotFoundError):  # its writer has finished
                if _is_dead(path.name) or now - path.stat().st_mtime > _ABANDONED:
                    path.unlink()


def _host() -> str:
    # The first part of a name tells hosts of a domain apart, and the end of it the members of a job.
    return re.sub(r"[^\w-]", "-", platform.node().split(".")[0])[-40:] or "host"


def _is_dead(name: str) -> bool:
    """Return whether the process on this host that wrote the temporary file `name`, not being written here, has ended."""
    match = _TEMPORARY.search(name)
    if match is None or match["host"] != _host() or os.name != "posix":
        return False
    pid = int(match["pid"])
    if pid == os.getpid():
        return True  # of an earlier process with the same number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to the file `path` as `write_atomically` does.

    Raises:
        WidekernelError: the file cannot be written.
    """
    with explained(path):
        write_atomically(path, lambda file: file.write(content))


def sync_folder(folder: Path) -> None:
    """Force a rename in `folder` to disk, on systems where folders can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 digest of a file in hexadecimal."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(memoryview(buffer)[:length])
    return digest.hexdigest()


def reason_of(error: BaseException) -> str:
    """Return why a file could not be written: the system's reason if there is one, even if torch hides it."""
    cause = error if isinstance(error, OSError) else error.__context__ or error
    return getattr(cause, "strerror", None) or str(cause)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Convert an `OSError` raised in the block to a `WidekernelError` that names `path` and the reason."""
    try:
        yield
    except OSError as error:
        raise WidekernelError(
            f"{path} cannot be written: {reason_of(error)}. Free some space or choose another place."
        ) from error
