"""What `widekernel predict` writes and prints for each image: pictures, class maps, detections and lines of text."""

from __future__ import annotations

import io
import json
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from typing_extensions import override

from widekernel.data.formats import printable
from widekernel.data.image_files import ImageFiles
from widekernel.dense.detection.structures import Detections
from widekernel.drawing import Color, class_overlay, contact_sheet, object_overlay, palette_image, percent
from widekernel.files import write_file
from widekernel.tasks.detection.evaluation import on_host
from widekernel.tasks.prediction import TopClasses

MOST_TILES = 60
"""Largest number of images on a contact sheet."""

_SHOWN_CLASSES = 5
_LONG_NAME = 22


@dataclass(frozen=True)
class Classes:
    """The classes of a network.

    Args:
        names: name of each
        colors: color of each; empty where none are needed
        ids: identifier of each in annotation files
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...] = ()
    ids: tuple[int, ...] = ()


class PredictionWriter(ABC):
    """Function that receives what was found in an image, writes files and prints a line.

    Args:
        files: the images
        classes: the classes of the network
        folder: folder for files; `None` writes none
        as_json: print a JSON object for each image instead of text
    """

    def __init__(self, files: ImageFiles, classes: Classes, folder: Path | None, as_json: bool) -> None:
        self.files, self.classes, self.folder, self.as_json = files, classes, folder, as_json
        self._index = {name: index for index, name in enumerate(files.names)}
        self._stems = dict(zip(files.names, file_stems(files.names)))

    def __call__(self, name: str, found: Any) -> None:
        """Write and print what was found in the image `name`.

        Raises:
            WidekernelError: a file cannot be written.
        """
        values, text = self.write(name, found)
        text = json.dumps({"image": name, **values}) if self.as_json else f"{printable(name)}  {text}"
        _print(text)

    @abstractmethod
    def write(self, name: str, found: Any) -> tuple[dict[str, Any], str]:
        """Write the files of an image, and return what is printed: values for JSON, and a line of text."""

    def finish(self) -> list[str]:
        """Write the files about all images, and return lines that say what was written."""
        return []

    def image(self, name: str) -> Image.Image:
        """Return the image of that name."""
        return self.files.load(self._index[name])

    def save(self, kind: str, name: str, picture: Image.Image) -> None:
        """Write a picture about an image as `folder/kind/NAME.png`."""
        if self.folder is not None:
            path = self.folder / kind / f"{self._stems[name]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, png(picture))


class ClassificationWriter(PredictionWriter):
    """Prints the likeliest classes, and draws a contact sheet of the first images."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._tiles: list[tuple[Image.Image, Sequence[str]]] = []
        self._count = 0

    @override
    def write(self, name: str, found: TopClasses) -> tuple[dict[str, Any], str]:
        indices, shares = found.indices.tolist(), found.probabilities.tolist()
        names = [self.classes.names[index] for index in indices]
        self._count += 1
        if self.folder is not None and len(self._tiles) < MOST_TILES:
            small = self.image(name)
            small.thumbnail((256, 256))
            lines = [f"{percent(share)}  {label}" for label, share in zip(names[:2], shares)]
            self._tiles.append((small, [name if len(name) <= _LONG_NAME else f"…{name[-_LONG_NAME:]}", *lines]))
        top = [{"class": label, "index": index, "probability": share} for label, index, share in zip(names, indices, shares)]
        return {"top": top}, ", ".join(f"{label} {percent(share)}" for label, share in zip(names, shares))

    @override
    def finish(self) -> list[str]:
        if self.folder is None or not self._tiles:
            return []
        path = self.folder / "contact_sheet.png"
        write_file(path, png(contact_sheet(self._tiles)))
        of = f" of the first {len(self._tiles)} images" if len(self._tiles) < self._count else ""
        return [f"contact sheet{of}: {path}"]


class SegmentationWriter(PredictionWriter):
    """Writes class maps with a palette, overlays with a legend, and the names and colors of the classes."""

    @override
    def write(self, name: str, found: Tensor) -> tuple[dict[str, Any], str]:
        indices = found.cpu().numpy().astype(np.uint8)
        self.save("classes", name, palette_image(indices, self.classes.colors))
        self.save("overlays", name, class_overlay(self.image(name), indices, self.classes.names, self.classes.colors))
        counts = np.bincount(indices.ravel(), minlength=len(self.classes.names))
        order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
        shares = {self.classes.names[index]: float(counts[index] / indices.size) for index in order}
        texts = [f"{label} {percent(share)}" for label, share in shares.items()]
        more = f", {len(texts) - _SHOWN_CLASSES} more" if len(texts) > _SHOWN_CLASSES else ""
        return {"classes": shares}, ", ".join(texts[:_SHOWN_CLASSES]) + more

    @override
    def finish(self) -> list[str]:
        assert self.folder is not None
        table = {"classes": self.classes.names, "palette": self.classes.colors}
        write_file(self.folder / "classes.json", json.dumps(table).encode())
        return [f"class maps: {self.folder / 'classes'}", f"overlays: {self.folder / 'overlays'}"]


class DetectionWriter(PredictionWriter):
    """Draws the objects, and writes all of them in the form of COCO's results.

    Args:
        threshold: smallest score of the objects that are drawn and printed
        arguments: as for `PredictionWriter`
    """

    def __init__(self, threshold: float, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.threshold = threshold
        self._results: list[dict[str, Any]] = []
        self._image_ids = image_ids(self.files.names)

    @override
    def write(self, name: str, found: Detections) -> tuple[dict[str, Any], str]:
        # By falling score, so those above the threshold come first.
        kept = int((found.scores >= self.threshold).sum())
        labels, scores = found.labels.tolist(), found.scores.tolist()
        boxes = found.boxes.cpu().numpy()
        names = [self.classes.names[label] for label in labels]
        counts = Counter(names[:kept])
        self.save("overlays", name, self._picture(name, found, kept))
        self._results += self._entries(name, found)
        listed = [
            {"class": label, "score": score, "box": [round(side, 2) for side in box]}
            for label, score, box in zip(names[:kept], scores, boxes.tolist())
        ]
        texts = [f"{count} {label}" for label, count in counts.most_common()]
        return {"objects": listed}, ", ".join(texts) or f"no object with a score of {self.threshold:g} or more"

    def _picture(self, name: str, found: Detections, kept: int) -> Image.Image:
        labels = found.labels[:kept].tolist()
        texts = [f"{self.classes.names[k]} {score:.2f}" for k, score in zip(labels, found.scores.tolist())]
        masks = None if found.masks is None else found.masks[:kept].cpu().numpy()
        colors = [self.classes.colors[label] for label in labels]
        counts = Counter(labels)
        legend = [(f"{count} {self.classes.names[k]}", self.classes.colors[k]) for k, count in counts.most_common()]
        return object_overlay(self.image(name), found.boxes[:kept].cpu().numpy(), texts, colors, masks, legend)

    def _entries(self, name: str, found: Detections) -> list[dict[str, Any]]:
        """Return all detections of an image as entries of COCO's results."""
        host = on_host(self._image_ids[name], found)
        entries = []
        for number, (box, score, label) in enumerate(zip(host.boxes.tolist(), host.scores.tolist(), host.labels.tolist())):
            x1, y1, x2, y2 = box
            entry: dict[str, Any] = {
                "image_id": host.image_id,
                "category_id": self.classes.ids[label],
                "bbox": [round(side, 3) for side in (x1, y1, x2 - x1, y2 - y1)],
                "score": round(score, 6),
            }
            if host.masks is not None:
                mask = host.masks[number]
                entry["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode("ascii")}
            entries.append(entry)
        return entries

    @override
    def finish(self) -> list[str]:
        assert self.folder is not None
        path = self.folder / "detections.json"
        write_file(path, json.dumps(self._results).encode())
        ids = {
            "images": [{"id": number, "file_name": name} for name, number in self._image_ids.items()],
            "categories": [{"id": number, "name": name} for number, name in zip(self.classes.ids, self.classes.names)],
        }
        write_file(self.folder / "images.json", json.dumps(ids).encode())
        return [f"overlays: {self.folder / 'overlays'}", f"{len(self._results):,} detections: {path}"]


def _print(text: str) -> None:
    """Print a result: above the progress bar of a terminal, but into the file or pipe to which output is sent.

    A progress bar on standard error takes the place of standard output.
    """
    own = sys.stdout
    file = own if own.isatty() else getattr(own, "rich_proxied_file", own)
    file.write(f"{text}\n")
    file.flush()


def image_ids(names: Sequence[str]) -> dict[str, int]:
    """Return an identifier for each image: the number that is its name, as in COCO, or else its position from 1."""
    stems = [PurePosixPath(name).stem for name in names]
    numbers = [int(stem) for stem in stems if stem.isascii() and stem.isdigit()]
    if len(set(numbers)) == len(names):
        return dict(zip(names, numbers))
    return {name: position + 1 for position, name in enumerate(names)}


def file_stems(names: Sequence[str]) -> list[str]:
    """Return a path without ending for the files about each image, relative to a folder that it does not leave.

    It is that of the image without the ending. Of images that differ in the ending only, it has the ending, too.
    """
    paths = [PurePosixPath(*(part for part in PurePosixPath(name).parts if part not in ("/", "//", ".."))) for name in names]
    plain = Counter(str(path.with_suffix("")).lower() for path in paths)
    stems, used = [], set()
    for path in paths:
        stem = str(path.with_suffix(""))
        if plain[stem.lower()] > 1:
            stem = f"{stem}_{path.suffix[1:]}"
        unique, number = stem, 2
        while unique.lower() in used:
            unique, number = f"{stem}_{number}", number + 1
        used.add(unique.lower())
        stems.append(unique)
    return stems


def png(picture: Image.Image) -> bytes:
    """Return a picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
