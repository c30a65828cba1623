"""What identifies the images of a run, so that a resumed run notices that they are others."""

import hashlib
from typing import Any

import numpy as np

from widekernel.data import ImageSource


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
    targets = _targets(source)
    lines = [f"{source.sample_name(index)}\t{targets[index] if targets else '?'}" for index in range(len(source))]
    images = getattr(source, "images", None)
    if isinstance(images, np.ndarray):
        lines.append(hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest())
    return _digest_of_lines(lines)


def _targets(source: ImageSource) -> list[int] | None:
    """Class indices in the order of the images, where they are known without decoding."""
    for holder in (source, getattr(source, "dataset", None)):
        targets = getattr(holder, "targets", None)
        if targets is None:
            targets = [sample[1] for sample in getattr(holder, "samples", ())]
        if len(targets) == len(source):
            return [int(target) for target in targets]
    return None


def _digest_of_lines(lines: "list[str] | tuple[str, ...]") -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]
