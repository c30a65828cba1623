"""What identifies the images of a run, so that a resumed run notices that they are others."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from widekernel.data import ImageSource
from widekernel.data.names import normalised
from widekernel.data.sources import FileSource

SIZES = 4096
"""So many files of a split, evenly spread, are asked for their size: more would take minutes on file systems far away."""


def fingerprint(train: ImageSource, val: ImageSource) -> dict[str, Any]:
    """Counts and digests by what they describe; equal for the same data wherever and however they are kept.

    The digests cover names, classes and order of the images; of their content the sizes of up to ``SIZES`` files a split,
    and the pixels where they are in memory already.
    """
    description = {
        "images": len(train),
        "held-out images": len(val),
        "digest of the class names": _digest_of_lines(train.class_names),
        "digest of the training images": _digest(train),
        "digest of the held-out images": _digest(val),
    }
    for part, source in (("training", train), ("held-out", val)):
        if isinstance(source, FileSource):
            chosen = range(0, len(source), -(-len(source) // SIZES) or 1)
            sizes = (str(source.size(index)) for index in chosen)
            description[f"digest of the sizes of {part} files"] = _digest_of_lines(sizes)
    return description


def _digest(source: ImageSource) -> str:
    return _digest_of_lines(_lines(source))


def _lines(source: ImageSource) -> Iterator[str]:
    targets = _targets(source)
    for index in range(len(source)):
        yield f"{normalised(source.sample_name(index))}\t{'?' if targets is None else targets[index]}"
    images = getattr(source, "images", None)
    if isinstance(images, np.ndarray):
        yield hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


def _targets(source: ImageSource) -> Sequence[int] | None:
    """Class indices in the order of the images, where they are known without decoding."""
    for holder in (source, getattr(source, "dataset", None)):
        targets = getattr(holder, "targets", None)
        if targets is None:
            targets = [sample[1] for sample in getattr(holder, "samples", ())]
        if len(targets) == len(source):
            return targets if isinstance(targets, array) else [int(target) for target in targets]
    return None


def _digest_of_lines(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for number, line in enumerate(lines):
        digest.update((f"\n{line}" if number else line).encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
