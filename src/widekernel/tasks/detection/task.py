"""Object detection and instance segmentation as a task of the engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from widekernel.data import Batch
from widekernel.data.detection.batches import DetectionBatch
from widekernel.data.seeding import SAMPLING_STREAM, derive_seed
from widekernel.dense.detection.processes import alone
from widekernel.engine.processes import Processes
from widekernel.engine.task import Position
from widekernel.tasks.detection.average_precision import GroundTruth
from widekernel.tasks.detection.evaluation import CocoScores, metrics_of
from widekernel.tasks.run_parts import RunTask

SIZES = ("data.short_sides", "data.image_scale")
"""Settings of the size of the images in training and in evaluation."""


class Detection(RunTask):
    """The losses of a detector; average precision of boxes, and of masks if there are any, on held-out images.

    Args:
        truth: objects of the held-out images; `None` if nothing is evaluated
        masks: whether masks are predicted
        processes: the processes that train together
    """

    sizes = SIZES

    def __init__(self, truth: GroundTruth | None, masks: bool, processes: Processes) -> None:
        self.truth, self.processes = truth, processes
        self.metrics = metrics_of(masks)

    @override
    def prepare(self, network: nn.Module, seed: int) -> None:
        """Let losses be divided by the numbers of samples of all processes."""
        own: Any = network
        own.mean_over_processes = self.processes.mean

    @override
    def finish(self, network: nn.Module) -> None:
        own: Any = network
        own.mean_over_processes = alone

    @override
    def loss(self, model: nn.Module, batch: Batch, position: Position) -> dict[str, Tensor]:
        content: DetectionBatch = batch.content
        # As a function of the place in the global batch, samples do not depend on how that is divided.
        places = range(position.first, position.first + batch.size)
        seeds = [derive_seed(SAMPLING_STREAM, position.seed, position.step, place) for place in places]
        return model(content.images, content.sizes, content.targets, seeds)  # type: ignore[no-any-return]

    @override
    def evaluator(self) -> CocoScores:
        assert self.truth is not None
        return CocoScores(self.truth)
