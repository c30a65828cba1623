"""Fetching of a published checkpoint: from the cache, or from the first of its sources that delivers it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from widekernel.errors import FetchError
from widekernel.file_types import describe_file_type
from widekernel.files import explained, sha256_of, sync_folder
from widekernel.weights.catalog import Checkpoint, Source, find_checkpoint
from widekernel.weights.google_drive import from_google_drive
from widekernel.weights.http import download
from widekernel.weights.listener import Listener
from widekernel.weights.store import VARIABLE, Entry, cache_folder, offline


def cached_file(checkpoint: Checkpoint | str, folder: str | Path | None = None) -> Path | None:
    """Return the fetched file of a checkpoint, unchecked; None if it was not fetched. The arguments are those of `fetch`."""
    return _entry(checkpoint, folder).find()


def fetch(checkpoint: Checkpoint | str, folder: str | Path | None = None, listener: Listener | None = None) -> Path:
    """Return the path of a published checkpoint's file, which is downloaded if it is not in the cache.

    The sources are tried in their order. A download that was interrupted is continued, even by another process; only one
    process fetches a file at a time, and others wait for it. The file appears under its name when it is complete. Its
    SHA-256 digest is kept at first use and compared at every later one.

    Args:
        checkpoint: the checkpoint or its name.
        folder: folder for the file; by default `weights` in the folder that the environment variable WIDEKERNEL_CACHE
            names, or else in `widekernel` in the user's cache folder.
        listener: receives the progress.

    Raises:
        CheckpointError: there is no checkpoint of that name.
        FetchError: the file cannot be fetched, or has changed since its first use. The message says where to get it by hand,
            and where to put it.
    """
    entry, listener = _entry(checkpoint, folder), listener or Listener()
    found = entry.find()
    if found is not None and entry.record.exists():
        return entry.verified(found)
    if found is None and offline():
        raise FetchError(
            f"{entry.checkpoint.name} is not in {entry.folder}, and {offline()} forbids downloads. {_by_hand(entry)}"
        )
    with explained(entry.folder):
        entry.folder.mkdir(parents=True, exist_ok=True)
    with _locked(entry, listener):
        found = entry.find()
        return _fetch_now(entry, listener) if found is None else entry.verified(found)


def _entry(checkpoint: Checkpoint | str, folder: str | Path | None) -> Entry:
    if isinstance(checkpoint, str):
        checkpoint = find_checkpoint(checkpoint)
    return Entry(checkpoint, cache_folder() if folder is None else Path(folder).expanduser())


@contextmanager
def _locked(entry: Entry, listener: Listener) -> Iterator[None]:
    """Hold the lock of a checkpoint within the block; while another process holds it, wait."""
    lock = FileLock(entry.lock)
    with explained(entry.lock):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            listener.wait(str(entry.lock))
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_now(entry: Entry, listener: Listener) -> Path:
    """Download a checkpoint from the first source that delivers it."""
    failures = []
    for source in entry.checkpoint.sources:
        if source.kind == "by_hand":
            continue
        listener.start(source.place)
        try:
            return _from_source(source, entry, listener)
        except FetchError as error:
            failures.append(f"  {source.link}: {error}")
            listener.failed(source.place, str(error))
    reasons = "\n".join(failures) or "  there is no link for a direct download"
    raise FetchError(f"{entry.checkpoint.name} cannot be fetched:\n{reasons}\n{_by_hand(entry)}")


def _from_source(source: Source, entry: Entry, listener: Listener) -> Path:
    partial = entry.partial(source.kind)
    if source.kind == "google_drive":
        from_google_drive(source.id, partial, listener)
    else:
        download(source.link, partial, listener)
    try:
        digest = _checked(partial, source, entry)
    except FetchError:
        partial.unlink(missing_ok=True)  # complete, but wrong: nothing to continue
        raise
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    path = entry.path(source.suffix)
    partial.replace(path)
    entry.remember(path, digest, source.link)
    sync_folder(path.parent)
    return path


def _checked(path: Path, source: Source, entry: Entry) -> str:
    """Return the digest of a downloaded file after checking that it is a whole checkpoint file, and the expected one."""
    with path.open("rb") as file:
        head = file.read(4)
    what = describe_file_type(path) if source.suffix == ".pth" else ""
    if what or not head:
        raise FetchError(f"{what or 'an empty file'} came instead of the checkpoint")
    if head == b"PK\x03\x04" and not zipfile.is_zipfile(path):
        raise FetchError("the file is cut off")
    digest = sha256_of(path)
    known = entry.known_digest(source.link)
    if not digest.startswith(source.sha256):
        raise FetchError(f"its SHA-256 digest is {digest}, but the publisher says {source.sha256}…")
    if known and known != digest:
        raise FetchError(
            f"its SHA-256 digest is {digest}, but was {known} when it was fetched before: the file there has been replaced. "
            f"Remove {entry.record} to accept it"
        )
    return digest


def _by_hand(entry: Entry) -> str:
    """Return how to get the file without this function."""
    sources = entry.checkpoint.sources
    if not sources:
        return f"The authors have published no link for it: see {entry.checkpoint.origin}"
    return (
        f"Fetch it by hand from {' or '.join(source.link for source in sources)} and save it as "
        f"{entry.path(sources[0].suffix)} ({VARIABLE} moves this folder)"
    )
