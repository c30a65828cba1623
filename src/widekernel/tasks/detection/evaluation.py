"""Average precision of a detector by the rules of COCO; every image counts exactly once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from typing_extensions import override

from widekernel.data import Batch
from widekernel.data.detection.batches import DetectionBatch
from widekernel.data.detection.coco_tools import mask_tools
from widekernel.dense.detection.structures import Detections
from widekernel.engine.metrics import Metric
from widekernel.engine.processes import Processes
from widekernel.engine.task import Evaluator
from widekernel.tasks.detection.average_precision import AveragePrecision, GroundTruth, ImageDetections

_KINDS = {"bbox": "box", "segm": "mask"}
_FIELDS = {
    "ap": "AP", "ap50": "AP50", "ap75": "AP75", "small": "AP small", "medium": "AP medium", "large": "AP large",
}  # fmt: skip


def metrics_of(masks: bool) -> tuple[Metric, ...]:
    """Return what an evaluation yields, by the keys in metrics.jsonl: the AP of boxes, and that of masks if there are any.

    The first, by which the best training state is chosen, is the AP of boxes over all thresholds.
    """
    kinds = ("box", "mask") if masks else ("box",)
    return tuple(Metric(f"val_{kind}_{field}", f"{kind} {label}", "%") for kind in kinds for field, label in _FIELDS.items())


@dataclass(frozen=True)
class ClassPrecision:
    """Line of the table of classes; AP in percent, NaN if the class has no objects.

    Args:
        name: name of the class
        objects: number of its objects, without crowds
        box_ap: AP of boxes over the IoU thresholds .5 to .95
        box_ap50: AP of boxes at the IoU threshold .5
        box_ap75: AP of boxes at the IoU threshold .75
        mask_ap: AP of masks over the thresholds; NaN without masks
        mask_ap50: AP of masks at the threshold .5; NaN without masks
        mask_ap75: AP of masks at the threshold .75; NaN without masks
    """

    name: str
    objects: int
    box_ap: float
    box_ap50: float
    box_ap75: float
    mask_ap: float = float("nan")
    mask_ap50: float = float("nan")
    mask_ap75: float = float("nan")


Predict = Callable[[nn.Module, DetectionBatch], Sequence[Detections]]
"""Function from a network and a batch to the detections in each image."""


def detect(model: nn.Module, batch: DetectionBatch) -> Sequence[Detections]:
    """Return what a detector in evaluation mode finds in a batch."""
    return model(batch.images, batch.sizes)  # type: ignore[no-any-return]


class CocoScores(Evaluator):
    """Evaluator of the average precision of boxes, and of masks if the ground truth has them.

    Args:
        truth: the objects
        predict: what runs the network
        observe: receives the detections and the batch
    """

    def __init__(
        self,
        truth: GroundTruth,
        predict: Predict = detect,
        observe: Callable[[Sequence[Detections], DetectionBatch], None] = lambda detections, batch: None,
    ) -> None:
        self.truth, self._predict, self._observe = truth, predict, observe
        self._found: list[ImageDetections] = []
        self._scores: dict[str, AveragePrecision] = {}

    @override
    def update(self, model: nn.Module, batch: Batch) -> None:
        content: DetectionBatch = batch.content
        detections = self._predict(model, content)
        for image_id, found in zip(content.ids, detections, strict=True):
            self.add(image_id, found)
        self._observe(detections, content)

    def add(self, image_id: int, found: Detections) -> None:
        """Add the detections in the image with that identifier in the annotation file."""
        self._found.append(on_host(image_id, found))

    @override
    def reduce(self, processes: Processes) -> None:
        # The order of the images does not matter: pycocotools sorts them.
        found = [entry for part in processes.gather(self._found) for entry in part]
        self._scores = processes.from_main(lambda: self._measured(found))

    def _measured(self, found: list[ImageDetections]) -> dict[str, AveragePrecision]:
        images = {entry.image_id for entry in found}
        kinds = ("bbox", "segm") if self.truth.masks else ("bbox",)
        return {kind: self.truth.measure(found, kind, images) for kind in kinds}  # type: ignore[arg-type]

    @override
    def result(self) -> dict[str, float]:
        return {
            f"val_{_KINDS[kind]}_{field}": 100 * getattr(scores, field)
            for kind, scores in self._scores.items()
            for field in _FIELDS
        }

    def table(self) -> list[ClassPrecision]:
        """Return the average precision of each class."""
        columns: list[Sequence[float]] = [next(iter(self._scores.values())).objects]
        for scores in self._scores.values():
            columns += [
                [100 * value for value in of_class] for of_class in (scores.by_class, scores.by_class50, scores.by_class75)
            ]
        return [ClassPrecision(*line) for line in zip(self.truth.class_names, *columns, strict=True)]


def on_host(image_id: int, found: Detections) -> ImageDetections:
    """Return detections as arrays on the host, with compressed masks.

    Raises:
        DataError: there are masks, and pycocotools is not installed.
    """
    masks = None
    if found.masks is not None:
        pixels = found.masks.byte().cpu().numpy()
        masks = mask_tools().encode(np.asfortranarray(pixels.transpose(1, 2, 0))) if len(pixels) else []
    return ImageDetections(
        image_id,
        found.boxes.double().cpu().numpy(),
        found.scores.double().cpu().numpy(),
        found.labels.cpu().numpy(),
        masks,
    )
