"""Evaluation of networks for segmentation and detection on the held-out split of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from widekernel.data import EvaluationLoader, EvaluationSamples, LoaderOptions, Preprocessing
from widekernel.data.detection import transforms as detection_transforms
from widekernel.data.detection.batches import DetectionCollate
from widekernel.data.detection.config import DetectionDataConfig
from widekernel.data.detection.sources import DetectionSource, open_detection
from widekernel.data.formats import brief
from widekernel.data.segmentation import transforms as segmentation_transforms
from widekernel.data.segmentation.batches import SegmentationViews
from widekernel.data.segmentation.config import SegmentationDataConfig
from widekernel.data.segmentation.sources import SegmentationSource, open_segmentation
from widekernel.engine.evaluation import EvaluationOptions, evaluate
from widekernel.engine.metrics import Metric
from widekernel.errors import DataError
from widekernel.tasks.detection import task as detection_task
from widekernel.tasks.detection.average_precision import GroundTruth
from widekernel.tasks.detection.evaluation import CocoScores, metrics_of
from widekernel.tasks.segmentation import task as segmentation_task
from widekernel.tasks.segmentation.config import SegmentationTestConfig
from widekernel.tasks.segmentation.evaluation import METRICS, PixelScores

Scores = PixelScores | CocoScores


@dataclass(frozen=True)
class HeldOut:
    """Held-out data of a task, ready to be evaluated.

    Args:
        class_names: names of the classes
        notes: lines for the user on the data
        metrics: what is measured
        size: setting of the size of the images, for messages
        samples: creates the images, normalized as a network wants them
        scores: evaluator
    """

    class_names: tuple[str, ...]
    notes: tuple[str, ...]
    metrics: tuple[Metric, ...]
    size: str
    samples: Callable[[Preprocessing], EvaluationSamples]
    scores: Scores


def held_out_segmentation(data: SegmentationDataConfig, test: SegmentationTestConfig) -> HeldOut:
    """Open the held-out images with their labels.

    Raises:
        WidekernelError: the data cannot be used.
    """
    source: SegmentationSource = open_segmentation(data, "val")

    def samples(shown: Preprocessing) -> EvaluationSamples:
        transform = segmentation_transforms.EvaluationTransform(data, shown.mean, shown.std)
        return EvaluationSamples(source, transform, SegmentationViews.collate)

    scores = PixelScores(source.class_names, segmentation_task.Predictor(test), data.ignore_index)
    return HeldOut(source.class_names, source.notes, METRICS, segmentation_task.SIZES[1], samples, scores)


def held_out_detection(data: DetectionDataConfig) -> HeldOut:
    """Open the held-out images with their objects.

    Raises:
        WidekernelError: the data cannot be used.
    """
    source: DetectionSource = open_detection(data, "val")

    def samples(shown: Preprocessing) -> EvaluationSamples:
        transform = detection_transforms.EvaluationTransform(data, shown.mean, shown.std)
        return EvaluationSamples(source, transform, DetectionCollate(data.size_divisor))

    scores = CocoScores(GroundTruth(source.annotations.path, data.masks))
    return HeldOut(source.class_names, source.notes, metrics_of(data.masks), detection_task.SIZES[1], samples, scores)


def check_classes(known: tuple[str, ...], outputs: int, found: tuple[str, ...]) -> None:
    """Raise a `DataError` unless the data have the classes of the network, in the same order.

    Args:
        known: the classes of the network; empty if it does not name them.
        outputs: their number.
        found: the classes of the data.
    """
    if known and known != found:
        raise DataError(
            f"The network was trained on the classes {brief(known, 5)}, but the data have {brief(found, 5)}. Both must be "
            "the same, in the same order: check the data set."
        )
    if outputs != len(found):
        raise DataError(f"The network has {outputs} classes, but the data have {len(found)}: check the data set.")


def evaluate_dense(
    model: nn.Module, held_out: HeldOut, shown: Preprocessing, loading: tuple[LoaderOptions, int], how: EvaluationOptions
) -> dict[str, Any] | None:
    """Evaluate a network, which is on its device.

    Args:
        model: the network.
        held_out: the data, of its task.
        shown: how images are normalized.
        loading: options for loading, and images per batch.
        how: settings of the evaluation.

    Returns:
        the metrics by name, and `val_unreadable`; `None` if the evaluation was stopped.
    """
    options, size = loading
    loader = EvaluationLoader(held_out.samples(shown), size, options, how.processes.shard)
    return evaluate(model, loader, held_out.scores, how)
