"""Average precision by pycocotools, with the numbers of detections that published results use."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from widekernel.data.detection.annotations import load_json
from widekernel.data.detection.coco_tools import mask_tools, metric_tools
from widekernel.data.detection.masks import encode_mask
from widekernel.errors import ArgumentError

MAX_DETECTIONS = (100, 300, 1000)
"""Numbers of detections per image; the AP over all thresholds takes the first, everything else the last."""

AREAS = ("all", "small", "medium", "large")
"""pycocotools' ranges of the area of an object: all, up to 32², up to 96², above."""


class ImageDetections(NamedTuple):
    """Detections in an image, by falling score.

    Args:
        image_id: identifier of the image in the annotation file
        boxes: x1, y1, x2, y2 in pixels of the original image `(n, 4)`, float64
        scores: `(n,)`, float64
        labels: class indices `(n,)`, int64
        masks: compressed run lengths of each; `None` without masks
    """

    image_id: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class AveragePrecision:
    """Average precision from 0 to 1; NaN where there is no object to be found.

    Args:
        ap: mean over the IoU thresholds .5, .55, … .95
        ap50: at the IoU threshold .5
        ap75: at the IoU threshold .75
        small: mean over the thresholds, for objects of up to 32² pixels
        medium: the same for objects of 32² to 96² pixels
        large: the same for objects of more than 96² pixels
        by_class: `ap` of each class
        by_class50: `ap50` of each class
        by_class75: `ap75` of each class
        objects: number of objects of each class, without crowds
    """

    ap: float
    ap50: float
    ap75: float
    small: float
    medium: float
    large: float
    by_class: tuple[float, ...]
    by_class50: tuple[float, ...]
    by_class75: tuple[float, ...]
    objects: tuple[int, ...]


class GroundTruth:
    """Objects of an annotation file in the form of COCO, for measurements.

    The mask of a crowd without one is its box.

    Args:
        path: the file, which has been checked (`read_coco`)
        masks: whether masks are measured too
    """

    def __init__(self, path: Path, masks: bool) -> None:
        self.path, self.masks = path, masks

    @cached_property
    def coco(self) -> Any:
        """The objects as pycocotools' `COCO`."""
        content = load_json(self.path)
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        for entry in content["annotations"]:
            entry.setdefault("iscrowd", 0)
            if self.masks and not entry.get("segmentation"):  # of a crowd, as `read_coco` has checked
                entry["segmentation"] = [_rectangle(*entry["bbox"])]
            if "area" not in entry:
                entry["area"] = self._area(entry, *sizes[entry["image_id"]])
        return _indexed(content)

    @cached_property
    def category_ids(self) -> list[int]:
        """Identifiers of the classes, in the order of the file, which is that of the class indices."""
        return [entry["id"] for entry in self.coco.dataset["categories"]]

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the class indices."""
        return [entry["name"] for entry in self.coco.dataset["categories"]]

    def _area(self, entry: dict[str, Any], height: int, width: int) -> float:
        if self.masks:
            return float(mask_tools().area(encode_mask(entry["segmentation"], height, width)))
        return float(entry["bbox"][2] * entry["bbox"][3])

    def measure(
        self, detections: Sequence[ImageDetections], kind: Literal["bbox", "segm"], images: Collection[int]
    ) -> AveragePrecision:
        """Return the average precision of detections.

        Args:
            detections: the detections of each image; an image without entry has none.
            kind: what is compared with the objects: boxes or masks.
            images: identifiers of the images that count.

        Raises:
            ArgumentError: masks are to be measured, but the detections have none; or a class index is too large.
            DataError: pycocotools is not installed.
        """
        _, coco_eval = metric_tools()
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            measured = coco_eval(self.coco, self._results(detections, kind), kind)
            measured.params.catIds = self.category_ids
            measured.params.imgIds = sorted(images)
            measured.params.maxDets = list(MAX_DETECTIONS)
            measured.evaluate()
            measured.accumulate()
        return _average(measured, self.category_ids)

    def _results(self, detections: Sequence[ImageDetections], kind: str) -> Any:
        """Return the detections as pycocotools' `COCO`."""
        entries = [entry for found in detections for entry in self._entries(found, kind)]
        for number, entry in enumerate(entries):
            entry["id"] = number + 1
        dataset = self.coco.dataset
        return _indexed({"images": dataset["images"], "categories": dataset["categories"], "annotations": entries})

    def _entries(self, found: ImageDetections, kind: str) -> list[dict[str, Any]]:
        """Return the detections of an image as annotations, whose areas are those of the boxes or of the masks."""
        largest = int(found.labels.max()) if len(found.labels) else 0
        if largest >= len(self.category_ids):
            raise ArgumentError(
                f"A detection has the class index {largest}, but {self.path} has {len(self.category_ids)} categories: the "
                "network must have been trained with the same ones."
            )
        if kind == "segm" and found.masks is None:
            raise ArgumentError(
                "The annotations have masks, but the detector yields only boxes: measure boxes (data.masks false), or use a "
                "detector of masks."
            )
        corners = np.asarray(found.boxes, np.float64).reshape(-1, 4)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        entries: list[dict[str, Any]] = [
            {
                "image_id": found.image_id,
                "category_id": self.category_ids[label],
                "score": score,
                "iscrowd": 0,
                "bbox": box,
                "area": box[2] * box[3],
            }
            for box, score, label in zip(boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
        ]
        if kind == "segm":
            for entry, mask in zip(entries, found.masks or (), strict=True):
                entry.update(segmentation=mask, area=float(mask_tools().area(mask)))
        return entries


def _rectangle(x: float, y: float, width: float, height: float) -> list[float]:
    """Return the corners of a box as a polygon of COCO."""
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _indexed(content: dict[str, Any]) -> Any:
    coco, _ = metric_tools()
    indexed = coco()
    indexed.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        indexed.createIndex()
    return indexed


def _average(measured: Any, category_ids: Sequence[int]) -> AveragePrecision:
    """Return what published results state, from the precision by threshold, recall, class, area and number of detections.

    pycocotools sorts the classes by their identifiers; in the result, they are in the order of `category_ids`.
    """
    precision = measured.eval["precision"]
    half, three_quarters = (int(np.argmin(abs(measured.params.iouThrs - value))) for value in (0.5, 0.75))
    small, medium, large = (_mean(precision[:, :, :, area, 2]) for area in range(1, len(AREAS)))
    places = {category: place for place, category in enumerate(measured.params.catIds)}
    classes = [places[category] for category in category_ids]
    return AveragePrecision(
        ap=_mean(precision[:, :, :, 0, 0]),
        ap50=_mean(precision[half, :, :, 0, 2]),
        ap75=_mean(precision[three_quarters, :, :, 0, 2]),
        small=small,
        medium=medium,
        large=large,
        by_class=tuple(_mean(precision[:, :, index, 0, 2]) for index in classes),
        by_class50=tuple(_mean(precision[half, :, index, 0, 2]) for index in classes),
        by_class75=tuple(_mean(precision[three_quarters, :, index, 0, 2]) for index in classes),
        objects=_objects(measured),
    )


def _objects(measured: Any) -> tuple[int, ...]:
    """Return the number of objects of each class in the images that count, without crowds and what is to be ignored."""
    counts = dict.fromkeys(measured.params.catIds, 0)
    images = set(measured.params.imgIds)
    for entry in measured.cocoGt.dataset["annotations"]:
        if entry["image_id"] in images and not entry["iscrowd"] and not entry.get("ignore", 0):
            counts[entry["category_id"]] += 1
    return tuple(counts.values())


def _mean(precision: np.ndarray) -> float:
    """Return the mean over everything for which there are objects; -1 stands for the rest."""
    counted = precision[precision > -1]
    return float(counted.mean()) if counted.size else float("nan")
