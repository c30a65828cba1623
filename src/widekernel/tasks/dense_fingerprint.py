"""Fingerprints of data sets for segmentation and detection, by which changes are noticed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from widekernel.data.detection.sources import DetectionSource
from widekernel.data.segmentation.sources import SegmentationSource
from widekernel.files import sha256_of
from widekernel.tasks.fingerprint import SIZES, digest_of_lines


def segmentation_fingerprint(train: SegmentationSource, val: SegmentationSource | None) -> dict[str, Any]:
    """Return counts and digests by their description; they are the same wherever the data are stored.

    The digests cover the names and order of the classes, the images and the label files. Of their content, they cover the
    sizes of up to `SIZES` images and label files per split.
    """
    found: dict[str, Any] = {"digest of the class names": digest_of_lines(train.class_names)}
    for part, source in (("training", train), ("held-out", val)):
        if source is None:
            continue
        pairs = source.pairs
        names = (f"{pairs.images[i]}\t{pairs.labels[i]}" for i in range(len(source)))
        found["images" if part == "training" else "held-out images"] = len(source)
        found[f"digest of the {part} images"] = digest_of_lines(names)
        files = [(pairs.image_folder / pairs.images[i], pairs.label_folder / pairs.labels[i]) for i in _spread(len(source))]
        found[f"digest of the sizes of {part} files"] = digest_of_lines(_sizes(files))
    return found


def detection_fingerprint(train: DetectionSource, val: DetectionSource | None) -> dict[str, Any]:
    """Return counts and digests by their description; they are the same wherever the data are stored.

    The digests cover the whole annotation files, the choice of the images, and the sizes of up to `SIZES` images per split.
    """
    found: dict[str, Any] = {"digest of the class names": digest_of_lines(train.class_names)}
    for part, source in (("training", train), ("held-out", val)):
        if source is None:
            continue
        found["images" if part == "training" else "held-out images"] = len(source)
        found[f"digest of the {part} annotations"] = sha256_of(source.annotations.path)[:16]
        found[f"digest of the {part} images"] = digest_of_lines(source.sample_name(i) for i in range(len(source)))
        files = [(source.folder / source.sample_name(i),) for i in _spread(len(source))]
        found[f"digest of the sizes of {part} files"] = digest_of_lines(_sizes(files))
    return found


def _spread(count: int) -> range:
    return range(0, count, -(-count // SIZES) or 1)


def _sizes(files: Sequence[tuple[Path, ...]]) -> Iterator[str]:
    for paths in files:
        yield "\t".join(str(path.stat().st_size if path.exists() else -1) for path in paths)
