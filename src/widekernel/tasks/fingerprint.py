"""What identifies the images of a run, so that a resumed run notices that they are others."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from widekernel.data import ImageSource
from widekernel.data.names import normalised


def fingerprint(train: ImageSource, val: ImageSource) -> dict[str, Any]:
    """Counts and digests by what they describe; equal for the same data wherever it is kept.

    The digests cover names, classes and order of the images; their content only where it is in memory already.
    """
    return {
        "images": len(train),
        "held-out images": len(val),
        "digest of the class names": _digest_of_lines(train.class_names),
        "digest of the training images": _digest(train),
        "digest of the held-out images": _digest(val),
    }


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
