"""Lock between processes, which the system releases when its holder ends for any reason."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock on the file `path`, which is created if necessary, within the block. Do nothing on Windows.

    Only the holder of the lock may remove the file.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file cannot be opened, or its file system has no locks.
    """
    if fcntl is None:
        yield
        return
    descriptor = _locked(path)
    try:
        yield
    finally:
        if descriptor in _held:  # false in a child process
            _held.discard(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _locked(path: Path) -> int:
    """Open and lock the file at `path`; repeat if the former holder of the lock removed the file in the meantime."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                _held.add(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _release_in_child() -> None:
    # Data loading workers must not keep the lock of a process that was killed.
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
