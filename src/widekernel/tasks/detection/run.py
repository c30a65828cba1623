"""Complete detection runs from a configuration, by one or several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from typing_extensions import override

from widekernel.data import BatchPlan, EvaluationSamples, LoaderOptions, TrainingLoader, TrainingSamples
from widekernel.data.detection.batches import DetectionCollate
from widekernel.data.detection.coco_tools import metric_tools
from widekernel.data.detection.sources import DetectionSource, open_detection_splits
from widekernel.data.detection.transforms import EvaluationTransform, TrainingTransform
from widekernel.engine import Reporter
from widekernel.tasks import run
from widekernel.tasks.dense_fingerprint import detection_fingerprint
from widekernel.tasks.dense_parts import DenseParts, dense_preprocessing
from widekernel.tasks.detection.average_precision import GroundTruth
from widekernel.tasks.detection.config import DetectionConfig
from widekernel.tasks.detection.task import Detection
from widekernel.tasks.networks import build_detector
from widekernel.tasks.results import RunResult
from widekernel.tasks.run_parts import RunSamples
from widekernel.tasks.saved import SavedModel

Sources = tuple[DetectionSource, DetectionSource | None]
"""Training and held-out images."""


def train(config: DetectionConfig, reporter: Reporter | None = None) -> RunResult:
    """Train a detector in the folder `config.output`; the same call again resumes the run, or returns its result.

    Several processes and errors are as in `run.train`.
    """
    return run.train(DetectionParts, config, reporter)


class DetectionParts(DenseParts):
    """What object detection brings to a run."""

    config: DetectionConfig

    @override
    def network(self, num_classes: int, pretrained: bool) -> nn.Module:
        return build_detector(self.config.model, num_classes, self.config.data.masks, pretrained)

    @override
    def check(self, plan: BatchPlan, device: torch.device, starts: bool) -> None:
        super().check(plan, device, starts)
        if self.config.data.split("val") is not None:
            metric_tools()  # fails now rather than at the first evaluation

    @override
    def open_data(self) -> Sources:
        return open_detection_splits(self.config.data)

    @override
    def describe(self, sources: Sources, network: nn.Module) -> SavedModel:
        config, names = self.config, sources[0].class_names
        return SavedModel(
            name=config.model.name,
            model_args=dict(config.model.args),
            form="training",
            num_classes=len(names),
            class_names=names,
            preprocessing=dense_preprocessing(config.data, network, max(config.data.short_sides)),
            task=config.task,
            details={
                "heads": config.model.heads(),
                "masks": config.data.masks,
                "category_ids": list(sources[0].annotations.category_ids),
                "colors": [list(color) for color in sources[0].classes.colors],
                "data": {"image_scale": config.data.image_scale, "size_divisor": config.data.size_divisor},
            },
        )

    @override
    def samples(self, sources: Sources, network: nn.Module, saved: SavedModel) -> RunSamples:
        (train, val), config, shown = sources, self.config.data, saved.preprocessing
        collate = DetectionCollate(config.size_divisor)
        train_transform = TrainingTransform(config, shown.mean, shown.std)
        eval_transform = EvaluationTransform(config, shown.mean, shown.std)
        return RunSamples(
            TrainingSamples(train, train_transform, self.config.seed, collate),
            None if val is None else EvaluationSamples(val, eval_transform, collate),
        )

    @override
    def create_task(self, sources: Sources, network: nn.Module, saved: SavedModel) -> Detection:
        val, masks = sources[1], self.config.data.masks
        truth = None if val is None else GroundTruth(val.annotations.path, masks)
        return Detection(truth, masks, self.processes)

    @override
    def fingerprint(self, sources: Sources) -> dict[str, Any]:
        return detection_fingerprint(*sources)

    @override
    def training_loader(self, samples: TrainingSamples, options: LoaderOptions, plan: BatchPlan) -> TrainingLoader:
        source: Any = samples.source
        groups = source.shapes() if self.config.data.group_by_shape else None
        return TrainingLoader(samples, options, plan, self.processes.rank, groups=groups)
