"""Complete segmentation runs from a configuration, by one or several processes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from widekernel.data import BatchPlan, EvaluationSamples, TrainingSamples
from widekernel.data.segmentation.batches import SegmentationBatch, SegmentationViews
from widekernel.data.segmentation.sources import SegmentationSource, open_segmentation
from widekernel.data.segmentation.transforms import EvaluationTransform, TrainingTransform
from widekernel.engine import Reporter
from widekernel.errors import ConfigError, DataError
from widekernel.tasks import run
from widekernel.tasks.dense_fingerprint import segmentation_fingerprint
from widekernel.tasks.dense_parts import DenseParts, dense_preprocessing
from widekernel.tasks.networks import build_segmenter
from widekernel.tasks.results import RunResult
from widekernel.tasks.run_parts import RunSamples
from widekernel.tasks.saved import SavedModel
from widekernel.tasks.segmentation.config import SegmentationConfig
from widekernel.tasks.segmentation.task import Segmentation

MOST_CLASSES = 255
"""Largest number of classes: pixels without one have the label 255 in the loss."""

Sources = tuple[SegmentationSource, SegmentationSource | None]
"""Training and held-out images."""


def train(config: SegmentationConfig, reporter: Reporter | None = None) -> RunResult:
    """Train a segmentation network in the folder `config.output`; the same call again resumes it, or returns its result.

    Several processes and errors are as in `run.train`.
    """
    return run.train(SegmentationParts, config, reporter)


class SegmentationParts(DenseParts):
    """What semantic segmentation brings to a run."""

    config: SegmentationConfig

    @override
    def network(self, num_classes: int, pretrained: bool) -> nn.Module:
        return build_segmenter(self.config.model, num_classes, pretrained)

    @override
    def check(self, plan: BatchPlan, device: torch.device, starts: bool) -> None:
        together = plan.per_pass * (plan.world_size if self.config.loop.sync_batch_norm else 1)
        if together < 2 and 1 in self.config.model.pool_scales:
            raise ConfigError(
                f"One image is in a forward pass (loop.batch_size {self.config.loop.batch_size}), but the batch norm after "
                "pooling to 1×1 (model.pool_scales) needs at least 2: raise loop.batch_size or loop.micro_batch."
            )
        super().check(plan, device, starts)

    @override
    def open_data(self) -> Sources:
        config = self.config.data
        train = open_segmentation(config, "train")
        val = None if config.split("val") is None else open_segmentation(config, "val")
        if len(train.class_names) > MOST_CLASSES:
            raise DataError(f"The data has {len(train.class_names)} classes, but at most {MOST_CLASSES} can be trained.")
        return train, val

    @override
    def describe(self, sources: Sources, network: nn.Module) -> SavedModel:
        config, names = self.config, sources[0].class_names
        return SavedModel(
            name=config.model.name,
            model_args=dict(config.model.args),
            form="training",
            num_classes=len(names),
            class_names=names,
            preprocessing=dense_preprocessing(config.data, network, config.data.crop_size),
            task=config.task,
            details={
                "heads": config.model.heads(),
                "colors": [list(color) for color in sources[0].classes.colors],
                "data": {"test_scale": config.data.test_scale or config.data.image_scale},
                "test": asdict(config.test),
            },
        )

    @override
    def samples(self, sources: Sources, network: nn.Module, saved: SavedModel) -> RunSamples:
        (train, val), config, shown = sources, self.config.data, saved.preprocessing
        train_transform = TrainingTransform(config, shown.mean, shown.std)
        eval_transform = EvaluationTransform(config, shown.mean, shown.std)
        return RunSamples(
            TrainingSamples(train, train_transform, self.config.seed, SegmentationBatch.collate),
            None if val is None else EvaluationSamples(val, eval_transform, SegmentationViews.collate),
        )

    @override
    def create_task(self, sources: Sources, network: nn.Module, saved: SavedModel) -> Segmentation:
        options: Any = network.options
        return Segmentation(self.config, options, saved.class_names, self.processes)

    @override
    def fingerprint(self, sources: Sources) -> dict[str, Any]:
        return segmentation_fingerprint(*sources)
