"""Search for the folder, archive or shards of a split, and messages that say what is wrong if there is none."""

import os
import tarfile
from pathlib import Path

from widekernel.data.class_checks import SPLITS, check_class_names
from widekernel.data.config import DataConfig
from widekernel.data.folder_source import FolderSource
from widekernel.data.formats import brief, ending_of, image_endings, is_clutter
from widekernel.data.paths import expand_path
from widekernel.data.shard_contents import is_shard
from widekernel.data.shard_names import find_shards, is_pattern
from widekernel.data.shard_source import ShardSource
from widekernel.data.sources import FileSource
from widekernel.data.tar_source import TarSource
from widekernel.errors import DataError

_PACKED = {
    b"PK\x03\x04": ("a zip archive", "unzip"), b"\x1f\x8b": ("compressed by gzip", "gunzip"),
    b"BZh": ("compressed by bzip2", "bunzip2"), b"\xfd7zXZ\0": ("compressed by xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unzstd"), b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "7z x"),
    b"Rar!": ("a rar archive", "unrar x"),
}  # fmt: skip
_PACKED_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")


def open_files(config: DataConfig, part: str, key: str) -> FileSource:
    """Open the folder, archive or shards `part` below `config.root`; `key` is the setting that names them.

    Raises:
        ConfigError: a variable in their name is not set.
        DataError: there are no such folder, archive or shards, or they do not contain classes of images.
    """
    root, part = _root_and_part(config, part, key)
    if is_pattern(part) and not (root / part).exists() and not (root / f"{part}.tar").exists():
        shards = find_shards(root, part, key)
        for shard in shards:
            _check_archive(shard)
        return ShardSource(root / part, shards)
    path = _find(root, part, key)
    if path.is_file() and is_shard(path):
        return ShardSource(path, [path])
    source = FolderSource(path) if path.is_dir() else TarSource(path)
    source.notes += check_class_names(str(path), source.listing, deeper_hint(source, part, key))
    return source


def deeper_hint(source: FileSource, part: str, key: str) -> str:
    """Return a sentence that says where the classes come from, or what to set if they are one folder deeper."""
    if isinstance(source, ShardSource):
        return "The classes of shards are the numbers in their .cls or .json files."
    names = source.class_names
    parts = [name for name in names if name.lower() in SPLITS] or list(names)
    inside = source.listing.common_subfolders()
    which = f"If the classes are the folders inside {brief(parts, 2)}{f' ({brief(inside, 3)})' if inside else ''}"
    if not source.path.is_dir():
        return f"{which}, create an archive from that folder alone."
    return f"{which}, set --{key} {os.path.normpath(f'{part}/{parts[0]}')}."


def _root_and_part(config: DataConfig, part: str, key: str) -> tuple[Path, str]:
    """Return the folder `config.root`, which exists, and `part` with its variables expanded."""
    root = Path(expand_path("data.root", config.root) if config.root else ".")
    if part.strip() and not (root / f"{part}.tar").exists():
        part = expand_path(key, part, root)
    if config.root is None and not Path(part).is_absolute():
        raise DataError(
            "data.root is not set. Give the folder that holds the images (--data.root DIR), "
            "or name a data set, for example --data.name digits."
        )
    if not root.exists():
        raise DataError(f"data.root is {str(root)!r}, which does not exist. Give the folder that holds the images.")
    if not root.is_dir():
        raise DataError(_root_is_a_file(root, key))
    return root, part


def _find(root: Path, part: str, key: str) -> Path:
    for path in (root / part, root / f"{part}.tar"):
        if path.is_dir():
            return path
        if path.is_file():
            _check_archive(path)
            return path
    for ending in _PACKED_ENDINGS:
        path = root / f"{part}{ending}"
        if path.is_file():
            _check_archive(path)
    raise DataError(_nothing_there(root, part, key))


def _check_archive(path: Path) -> None:
    """Raise a `DataError` that says what a file is, unless it is an uncompressed tar archive."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    for magic, (kind, tool) in _PACKED.items():
        if start.startswith(magic):
            raise DataError(
                f"{path} is {kind}, from which single images cannot be read. Unpack it first, for example with "
                f"`{tool}`: folders and uncompressed .tar archives can be used."
            )
    if ending_of(path.name) == ".tar":
        return
    if ending_of(path.name) in image_endings():
        raise DataError(f"{path} is a single image; give the folder that holds the class folders.")
    named = " It is an archive, but its name must end in .tar: rename it." if tarfile.is_tarfile(path) else ""
    raise DataError(f"{path} is neither a folder nor an uncompressed .tar archive; unpack it first.{named}")


def _root_is_a_file(root: Path, key: str) -> str:
    text = f"data.root is {str(root)!r}, which is not a folder."
    if ending_of(root.name) in image_endings():
        return f"{text} It is a single image: give the folder that holds the splits, with class folders in them."
    return f"{text} Give its folder as data.root, and the archive in it as --{key} {root.name}."


def _nothing_there(root: Path, part: str, key: str) -> str:
    try:
        entries = sorted((entry for entry in root.iterdir() if not is_clutter(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        return f"data.root is {str(root)!r}, which cannot be read: {error.strerror}."
    text = f"{root / part} does not exist (nor {part}.tar beside it)."
    found = [entry.name for entry in entries if entry.is_dir() or entry.suffix.lower() in (".tar", ".gz", ".tgz", ".zip")]
    if not found and any(ending_of(entry.name) in image_endings() for entry in entries):
        return (
            f"{text} data.root seems to be the folder of one class: it holds images. Give the folder that holds the splits."
        )
    if root.name.lower() in {part.lower(), *SPLITS} and found and not SPLITS & {name.lower() for name in found}:
        return f"{text} data.root seems to be a split itself: set --data.root {root.resolve().parent}."
    hint = f"It holds: {brief(found, 8)}." if found else "It holds no folders and no .tar archives."
    return f"{text} {hint} Set --{key} to the one that holds the images."
