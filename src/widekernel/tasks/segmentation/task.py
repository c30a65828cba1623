"""Semantic segmentation as a task of the engine."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import override

from widekernel.data import Batch
from widekernel.data.segmentation.batches import SegmentationViews
from widekernel.dense.segmentation import (
    Segmenter,
    SegmenterOptions,
    View,
    multi_view,
    segmentation_losses,
)
from widekernel.dense.segmentation.losses import IGNORED
from widekernel.engine.processes import Processes
from widekernel.engine.task import Position
from widekernel.tasks.run_parts import RunTask
from widekernel.tasks.segmentation.config import SegmentationConfig, SegmentationTestConfig
from widekernel.tasks.segmentation.evaluation import METRICS, PixelScores

SIZES = ("data.crop_size", "data.test_scale or test.crop")
"""Settings of the size of the images in training and in evaluation."""


class Segmentation(RunTask):
    """Cross-entropy of every pixel, for UPerNet and its auxiliary head; mIoU, mAcc and aAcc on held-out images.

    Args:
        config: settings of the run
        options: those of the network's heads
        class_names: names of the classes
        processes: the processes that train together
    """

    metrics = METRICS
    sizes = SIZES

    def __init__(
        self, config: SegmentationConfig, options: SegmenterOptions, class_names: Sequence[str], processes: Processes
    ) -> None:
        self.config, self.options, self.class_names, self.processes = config, options, class_names, processes

    @override
    def loss(self, model: nn.Module, batch: Batch, position: Position) -> dict[str, Tensor]:
        images, labels = batch.content
        if self.config.data.ignore_index != IGNORED:
            labels = labels.masked_fill(labels == self.config.data.ignore_index, IGNORED)
        average = self.config.loss_average
        losses = segmentation_losses(model(images), labels, self.options, average)
        if average == "labeled" and self.processes.world_size > 1:
            # The mean over the labeled pixels of all processes is not the mean of their means.
            count = (labels != IGNORED).sum().float()
            share = count / self.processes.mean(count).clamp(min=1)
            losses = {name: value * share for name, value in losses.items()}
        return losses

    @override
    def example(self, batch: Batch) -> Tensor:
        return batch.content[0]  # type: ignore[no-any-return]

    @override
    def evaluator(self) -> PixelScores:
        predict = Predictor(self.config.test)
        return PixelScores(self.class_names, predict, self.config.data.ignore_index)


class Predictor:
    """Function from a network and a batch to the class of every pixel of each image, at its original size.

    Args:
        config: how the network sees an image
    """

    def __init__(self, config: SegmentationTestConfig) -> None:
        self.flip, self.options = config.flip, config.inference()

    def __call__(self, model: nn.Module, views: SegmentationViews) -> list[Tensor]:
        """Return the classes `(original height, original width)` of each image."""
        return [self.probabilities(model, views, number).argmax(dim=0) for number in range(len(views.labels))]

    def probabilities(self, model: nn.Module, views: SegmentationViews, number: int) -> Tensor:
        """Return the probabilities `(classes, original height, original width)` of the image of that number."""
        assert isinstance(model, Segmenter)
        seen = []
        for images, sizes in zip(views.images, views.sizes, strict=True):
            # Without the padding, an image has the same result in every batch.
            image = images[number : number + 1, :, : sizes[number].height, : sizes[number].width]
            seen.append(View(image))
            if self.flip:
                seen.append(View(image.flip(3), flip="horizontal"))
        height, width = views.labels[number].shape
        return multi_view(model, seen, (int(height), int(width)), self.options)[0]
