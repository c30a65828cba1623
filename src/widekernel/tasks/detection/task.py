"""Object detection and instance segmentation as a task of the engine."""

from __future__ import annotations

from typing import Any

import torch
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

    Several processes compute the losses of one that has all of their images in a single forward pass: counts by which losses
    are divided are those of all processes, and images are padded to the largest of all processes, because convolutions and
    norms see the padding. Images of other forward passes (`loop.micro_batch`) do not count, as they do not for batch norms.

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
        own.mean_over_processes = self._mean

    @override
    def finish(self, network: nn.Module) -> None:
        own: Any = network
        own.mean_over_processes = alone

    @override
    def loss(self, model: nn.Module, batch: Batch, position: Position) -> dict[str, Tensor]:
        content = self._padded(batch.content)
        # As a function of the place in the global batch, samples do not depend on how that is divided.
        places = range(position.first, position.first + batch.size)
        seeds = [derive_seed(SAMPLING_STREAM, position.seed, position.step, place) for place in places]
        return model(content.images, content.sizes, content.targets, seeds)  # type: ignore[no-any-return]

    def _mean(self, values: Tensor, least: Tensor | float = 0.0) -> Tensor:
        # The same as the largest of the sum and `least`, divided by the number of processes.
        return self.processes.mean(values).clamp(min=least / self.processes.world_size)

    def _padded(self, batch: DetectionBatch) -> DetectionBatch:
        """Pad the images to the largest of all processes; shapes are known to the host, which does not wait for a GPU."""
        height, width = self.processes.largest(torch.tensor(batch.images.shape[-2:])).tolist()
        return batch.padded(height, width)

    @override
    def example(self, batch: Batch) -> tuple[Any, ...]:
        return batch.content.images, batch.content.sizes

    @override
    def evaluator(self) -> CocoScores:
        assert self.truth is not None
        return CocoScores(self.truth)
