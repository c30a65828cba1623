"""Fingerprints of the images and the program of a run, by which changes are noticed."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

import widekernel
from widekernel.data import ImageSource
from widekernel.data.names import normalize_name
from widekernel.data.sources import FileSource, targets_of
from widekernel.files import sha256_of
from widekernel.ops.cpu import library

SIZES = 4096
"""Number of files per split, evenly spread, whose size is read; more would take minutes on network file systems."""


def fingerprint(train: ImageSource, val: ImageSource | None) -> dict[str, Any]:
    """Return counts and digests by their description; they are the same wherever and however the data are stored.

    The digests cover names, classes and order of the images. Of their content, they cover the sizes of up to `SIZES`
    files per split, and the pixels if these are in memory already.
    """
    if val is None:
        return {
            "images": len(train),
            "digest of the class names": digest_of_lines(train.class_names),
            "digest of the training images": _digest(train),
            **_sizes("training", train),
        }
    description = {
        "images": len(train),
        "held-out images": len(val),
        "digest of the class names": digest_of_lines(train.class_names),
        "digest of the training images": _digest(train),
        "digest of the held-out images": _digest(val),
    }
    return {**description, **_sizes("training", train), **_sizes("held-out", val)}


def held_out_difference(then: dict[str, Any], val: ImageSource) -> str:
    """Return how the held-out images differ from those that a run described as `then`, or "" if they do not."""
    now = {
        "held-out images": len(val),
        "digest of the class names": digest_of_lines(val.class_names),
        "digest of the held-out images": _digest(val),
        **_sizes("held-out", val),
    }
    changed = [f"{key} was {then[key]!r} and is {value!r}" for key, value in now.items() if then.get(key, value) != value]
    return ", ".join(changed)


def _sizes(part: str, source: ImageSource) -> dict[str, str]:
    if not isinstance(source, FileSource):
        return {}
    chosen = range(0, len(source), -(-len(source) // SIZES) or 1)
    return {f"digest of the sizes of {part} files": digest_of_lines(str(source.size(index)) for index in chosen)}


_COMPUTING = ("ops", "layers", "models", "dense", "transforms", "sparsity", "data", "engine", "tasks")
"""Folders of the package that decide what a run computes."""


def code_fingerprint() -> dict[str, str]:
    """Return the versions of widekernel, PyTorch and timm, and digests of our sources and of the native library."""
    package = Path(widekernel.__file__).parent
    digest = hashlib.sha256()
    for folder in _COMPUTING:
        for file in sorted((package / folder).rglob("*.py")):
            digest.update(file.relative_to(package).as_posix().encode())
            digest.update(file.read_bytes())
    versions = {"widekernel": widekernel.__version__, "torch": str(torch.__version__), "timm": timm.__version__}
    native = library.load().path
    return {
        **versions,
        "digest of the sources": digest.hexdigest()[:16],
        "digest of the native library": sha256_of(native)[:16] if native else "none",
    }


def code_difference(then: dict[str, str] | None, now: dict[str, str]) -> str:
    """Return how the program described by `then` differs from that of `now`, or "" if it does not."""
    if then is None:
        return "by a version that did not record its code"
    changed = [f"{key} {then.get(key)} (now {value})" for key, value in now.items() if then.get(key) != value]
    return f"by other code: {', '.join(changed)}" if changed else ""


def _digest(source: ImageSource) -> str:
    return (_digest_of_names(source) if isinstance(source, FileSource) else None) or digest_of_lines(_lines(source))


def _digest_of_names(source: FileSource) -> str | None:
    """Return the digest of `_lines(source)`, computed class by class, or `None` if a name contains a zero byte."""
    targets = np.asarray(source.targets, np.int64)
    bounds = [0, *(np.flatnonzero(np.diff(targets)) + 1).tolist(), len(targets)]
    digest = hashlib.sha256()
    for number, (first, last) in enumerate(pairwise(bounds)):
        block = source.names.normalized_block(first, last)
        if block.count(b"\0") != last - first:
            return None
        lines = block.replace(b"\0", f"\t{targets[first]}\n".encode())
        digest.update((b"\n" if number else b"") + lines[:-1])
    return digest.hexdigest()[:16]


def _lines(source: ImageSource) -> Iterator[str]:
    targets = targets_of(source)
    for index in range(len(source)):
        yield f"{normalize_name(source.sample_name(index))}\t{'?' if targets is None else targets[index]}"
    images = getattr(source, "images", None)
    if isinstance(images, np.ndarray):
        yield hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


def digest_of_lines(lines: Iterable[str]) -> str:
    """Return a short digest of lines, which may contain undecodable bytes of file names."""
    digest = hashlib.sha256()
    for number, line in enumerate(lines):
        digest.update((f"\n{line}" if number else line).encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
