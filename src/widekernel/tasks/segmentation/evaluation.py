"""Intersection over union and accuracy of a segmentation; every labeled pixel counts exactly once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from widekernel.data import Batch
from widekernel.data.segmentation.batches import SegmentationViews
from widekernel.engine.metrics import Metric
from widekernel.engine.processes import Processes
from widekernel.engine.task import Evaluator
from widekernel.errors import ShapeError

METRICS = (
    Metric("val_miou", "mIoU", "%"),
    Metric("val_macc", "mAcc", "%"),
    Metric("val_aacc", "aAcc", "%"),
)
"""What an evaluation yields, by the keys in metrics.jsonl."""

Predict = Callable[[nn.Module, SegmentationViews], Sequence[Tensor]]
"""Function from a network and a batch to the class of every pixel, `(original height, original width)`, of each image."""


def confusion(prediction: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count pixels by their class and the predicted one.

    Args:
        prediction: predicted classes, integers of any shape.
        labels: true classes, of the same shape.
        num_classes: number of classes.
        ignore_index: label of the pixels that do not count.

    Returns:
        `(classes, classes)`, int64: true classes in rows, predicted ones in columns.

    Raises:
        ShapeError: the shapes differ.
    """
    if prediction.shape != labels.shape:
        raise ShapeError(
            f"The prediction has the shape {tuple(prediction.shape)}, but the labels {tuple(labels.shape)}: predict at the "
            "original size of the image."
        )
    labeled = labels != ignore_index
    cells = labels[labeled].long() * num_classes + prediction[labeled].long()
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class SegmentationScores:
    """What follows from the counts of pixels; classes without any pixel are NaN and left out of the means.

    Args:
        iou: intersection over union of each class `(classes,)`, float64; NaN if it is neither there nor predicted
        accuracy: share of the pixels of each class that are right `(classes,)`, float64; NaN if it is not there
        overall: share of all labeled pixels that are right; NaN if there are none
        pixels: labeled pixels of each class `(classes,)`, int64
    """

    iou: Tensor
    accuracy: Tensor
    overall: float
    pixels: Tensor

    @classmethod
    def of(cls, counts: Tensor) -> SegmentationScores:
        """Return the scores of counts `(classes, classes)` as `confusion` returns them."""
        right, there, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        iou = right.double() / (there + predicted - right).double()
        return cls(iou, right.double() / there.double(), (right.sum().double() / counts.sum().double()).item(), there)

    @property
    def mean_iou(self) -> float:
        """Mean over the classes that are there or predicted."""
        return self.iou.nanmean().item()

    @property
    def mean_accuracy(self) -> float:
        """Mean over the classes that are there."""
        return self.accuracy.nanmean().item()


@dataclass(frozen=True)
class ClassScore:
    """Line of the table of classes.

    Args:
        name: name of the class
        iou: intersection over union, in percent; NaN if the class is neither there nor predicted
        accuracy: share of its pixels that are right, in percent; NaN if it is not there
        pixels: number of its pixels
    """

    name: str
    iou: float
    accuracy: float
    pixels: int


class PixelScores(Evaluator):
    """Evaluator of mIoU, mAcc and aAcc.

    Args:
        class_names: names of the classes
        predict: what runs the network: in one pass, in windows, or at several scales
        ignore_index: label of the pixels that do not count
        observe: receives the predictions and the batch
    """

    def __init__(
        self,
        class_names: Sequence[str],
        predict: Predict,
        ignore_index: int = 255,
        observe: Callable[[Sequence[Tensor], SegmentationViews], None] = lambda predictions, views: None,
    ) -> None:
        self.class_names, self._predict, self._ignore_index, self._observe = class_names, predict, ignore_index, observe
        # Integers: sums do not depend on how the images are divided into batches and among processes.
        self._counts = torch.zeros(len(class_names), len(class_names), dtype=torch.int64)
        self._images = 0

    @override
    def update(self, model: nn.Module, batch: Batch) -> None:
        views: SegmentationViews = batch.content
        predictions = self._predict(model, views)
        for prediction, labels in zip(predictions, views.labels, strict=True):
            self.add(prediction, labels)
        self._observe(predictions, views)

    def add(self, prediction: Tensor, labels: Tensor) -> None:
        """Add the predicted and the true classes `(height, width)` of an image."""
        found = confusion(prediction, labels, len(self.class_names), self._ignore_index)
        self._counts = self._counts.to(found.device) + found
        self._images += 1

    @override
    def reduce(self, processes: Processes) -> None:
        # From the host: a process that has had no readable image has its counts there, whatever the device.
        self._counts = processes.sum(self._counts.cpu())
        self._images = int(processes.sum(torch.tensor([self._images])).item())

    @property
    def counts(self) -> Tensor:
        """Pixels `(classes, classes)`, int64, by their class (rows) and the predicted one (columns)."""
        return self._counts

    @override
    def result(self) -> dict[str, float]:
        scores = SegmentationScores.of(self._counts)
        return {
            "val_miou": 100 * scores.mean_iou,
            "val_macc": 100 * scores.mean_accuracy,
            "val_aacc": 100 * scores.overall,
            "val_images": self._images,
        }

    def table(self) -> list[ClassScore]:
        """Return the scores of each class."""
        scores = SegmentationScores.of(self._counts)
        columns = (100 * scores.iou).tolist(), (100 * scores.accuracy).tolist(), scores.pixels.tolist()
        return [ClassScore(*line) for line in zip(self.class_names, *columns, strict=True)]
