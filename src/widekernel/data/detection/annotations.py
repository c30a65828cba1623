"""Annotation files in the form of COCO, checked and stored compactly."""

import json
from array import array
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from widekernel.data.detection.annotation_checks import problems
from widekernel.data.detection.masks import MaskForms
from widekernel.data.names import Names
from widekernel.dense.detection.structures import Targets
from widekernel.errors import DataError

_SHOWN = 5
"""Number of mistakes that an error lists."""

SMALLEST_BOX = 1.0
"""Smallest width and height, in pixels, of the objects that a detector learns."""


class CocoImage(NamedTuple):
    """Identifier, file name and size of an image."""

    id: int
    file_name: str
    height: int
    width: int


@dataclass
class CocoFile:
    """Content of an annotation file.

    The objects are those that a detector learns. As in published code, left out are objects with the flag `ignore`, those
    whose area is 0, those that are less than one pixel wide or high, and those outside the image; crowds are kept apart.

    Args:
        path: the file
        names: names of the classes, in the order of the file's categories, which is that of the class indices
        category_ids: identifiers of the classes in the file
        images: identifiers of the images `(n,)`, int64
        file_names: their file names
        sizes: their heights and widths `(n, 2)`, int64
        annotated: whether each image has any annotation `(n,)`, boolean
        starts: place of the first object of each image, and the number of objects `(n + 1,)`, int64
        boxes: x1, y1, x2, y2 of the objects `(m, 4)`, float32
        labels: their classes `(m,)`, int64
        masks: their masks; `None` if only boxes were wanted
        crowd_images: place of the image of each crowd `(k,)`, int64
        crowd_boxes: x1, y1, x2, y2 of the crowds `(k, 4)`, float32
        notes: lines for the user
    """

    path: Path
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: np.ndarray
    file_names: Names
    sizes: np.ndarray
    annotated: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: MaskForms | None
    crowd_images: np.ndarray
    crowd_boxes: np.ndarray
    notes: tuple[str, ...] = ()

    def image(self, place: int) -> CocoImage:
        """Return the identifier, the file name and the size of an image."""
        height, width = self.sizes[place].tolist()
        return CocoImage(int(self.images[place]), self.file_names[place], height, width)

    def targets(self, place: int) -> Targets:
        """Return the objects of an image, in its pixels.

        Raises:
            DataError: pycocotools, which decodes masks, is not installed.
        """
        objects = slice(int(self.starts[place]), int(self.starts[place + 1]))
        boxes, labels = torch.from_numpy(self.boxes[objects].copy()), torch.from_numpy(self.labels[objects].copy())
        if self.masks is None:
            return Targets(boxes, labels)
        height, width = self.sizes[place].tolist()
        return Targets(boxes, labels, self.masks.decode(range(objects.start, objects.stop), height, width))

    def crowds(self, place: int) -> np.ndarray:
        """Return the boxes of the crowds in an image `(k, 4)`, float32."""
        return self.crowd_boxes[self.crowd_images == place]


def read_coco(path: Path, masks: bool) -> CocoFile:
    """Read and check an annotation file.

    Args:
        path: the JSON file.
        masks: whether the masks of objects are wanted.

    Raises:
        DataError: the file cannot be read, or annotations are malformed: the message lists the first and their ids.
    """
    content = load_json(path)
    found = problems(content, masks)
    shown = list(islice(found, _SHOWN))
    if shown:
        more = sum(1 for _ in found)
        others = f"\n  and {more:,} more" if more else ""
        places = "1 place" if len(shown) + more == 1 else f"{len(shown) + more:,} places"
        lines = "".join(f"\n  {line}" for line in shown)
        raise DataError(f"{path} is malformed in {places}. Correct the file:{lines}{others}")
    return _Collector(path, content, masks).file()


def load_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        DataError: the file cannot be read, or is not JSON.
    """
    try:
        with path.open("rb") as file:
            return json.load(file)
    except OSError as error:
        raise DataError(f"The annotation file {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8
        raise DataError(f"The annotation file {path} is not JSON: {error}.") from error


class _Collector:
    """Collection of the objects of a checked annotation file, ordered by image."""

    def __init__(self, path: Path, content: dict[str, Any], masks: bool) -> None:
        self.path, self.content = path, content
        self.places = {entry["id"]: place for place, entry in enumerate(content["images"])}
        self.classes = {entry["id"]: index for index, entry in enumerate(content["categories"])}
        self.masks = MaskForms() if masks else None
        self.boxes, self.crowd_boxes = array("d"), array("d")
        self.labels, self.objects, self.crowd_images = array("q"), array("q"), array("q")
        self.left_out: list[int] = []

    def file(self) -> CocoFile:
        """Return the content."""
        images = self.content["images"]
        annotated = np.zeros(len(images), bool)
        ordered = sorted(self.content["annotations"], key=lambda entry: self.places[entry["image_id"]])
        for entry in ordered:  # the sort is stable: the objects of an image keep their order
            place = self.places[entry["image_id"]]
            annotated[place] = True
            self._add(entry, place)
        counts = np.bincount(np.asarray(self.objects, np.int64), minlength=len(images))
        return CocoFile(
            path=self.path,
            names=tuple(entry["name"] for entry in self.content["categories"]),
            category_ids=tuple(self.classes),
            images=np.array([entry["id"] for entry in images], np.int64),
            file_names=Names(entry["file_name"] for entry in images),
            sizes=np.array([[entry["height"], entry["width"]] for entry in images], np.int64).reshape(-1, 2),
            annotated=annotated,
            starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes=_corners(self.boxes),
            labels=np.array(self.labels, np.int64),
            masks=self.masks,
            crowd_images=np.array(self.crowd_images, np.int64),
            crowd_boxes=_corners(self.crowd_boxes),
            notes=self._notes(),
        )

    def _add(self, entry: dict[str, Any], place: int) -> None:
        if not _is_learned(entry, self.content["images"][place]):
            self.left_out.append(entry["id"])
        elif entry.get("iscrowd", 0):
            self.crowd_images.append(place)
            self.crowd_boxes.extend(entry["bbox"])
        else:
            self.objects.append(place)
            self.boxes.extend(entry["bbox"])
            self.labels.append(self.classes[entry["category_id"]])
            if self.masks is not None:
                self.masks.append(entry["segmentation"])

    def _notes(self) -> tuple[str, ...]:
        if not self.left_out:
            return ()
        return (
            f"{self.path} has {len(self.left_out):,} annotations that detectors do not learn: flagged `ignore`, of area 0, "
            f"thinner than one pixel, or outside the image. The first is {self.left_out[0]}.",
        )


def _is_learned(entry: dict[str, Any], image: dict[str, Any]) -> bool:
    x, y, width, height = entry["bbox"]
    if entry.get("ignore"):
        return False
    inside_x = min(x + width, image["width"]) - max(x, 0)
    inside_y = min(y + height, image["height"]) - max(y, 0)
    return bool(
        inside_x > 0
        and inside_y > 0
        and entry.get("area", width * height) > 0
        and width >= SMALLEST_BOX
        and height >= SMALLEST_BOX
    )


def _corners(boxes: array) -> np.ndarray:
    """Return x1, y1, x2, y2 `(n, 4)`, float32, of boxes with x, y, width and height."""
    values = np.array(boxes, np.float64).reshape(-1, 4)
    values[:, 2:] += values[:, :2]
    return values.astype(np.float32)
