"""Complete classification runs from a configuration, by one or several processes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from widekernel.data import (
    BatchPlan,
    EvaluationSamples,
    ImageSource,
    LabeledImages,
    LoaderOptions,
    OnImage,
    Preprocessing,
    TrainingLoader,
    TrainingSamples,
    open_train_and_val,
)
from widekernel.data.seeding import MODEL_STREAM, scoped_seed
from widekernel.engine import Processes, Reporter
from widekernel.errors import ConfigError
from widekernel.tasks import run
from widekernel.tasks.assembly import build_model, checkpoint_gradients, pretrained_cfg, scale_classifier
from widekernel.tasks.classification.checks import check_settings
from widekernel.tasks.classification.class_map import class_map_note, load_mapped, read_class_map
from widekernel.tasks.classification.class_mapping import inheritance_note
from widekernel.tasks.classification.config import ModelConfig, TrainConfig, check_pairs
from widekernel.tasks.classification.creation import create_task
from widekernel.tasks.classification.missing_classes import missing_classes
from widekernel.tasks.classification.task import Classification
from widekernel.tasks.fingerprint import fingerprint
from widekernel.tasks.foreign_checkpoint import load_weights
from widekernel.tasks.image_channels import input_channels, match_channels
from widekernel.tasks.results import RunResult
from widekernel.tasks.run_parts import RunParts, RunSamples
from widekernel.tasks.saved import SavedModel

Sources = tuple[ImageSource, ImageSource | None]
"""Training and held-out images."""


def train(config: TrainConfig, reporter: Reporter | None = None) -> RunResult:
    """Train a classifier in the folder `config.output`; the same call again resumes the run, or returns its result.

    If torchrun's environment says that there are several processes, all of them make this call and train together; the first
    one alone reports and writes files. The global random generators are as before afterwards.

    Raises:
        WidekernelError: settings, data or run folder cannot be used (before anything is trained), or training fails.
        Interrupted: a signal stopped the training, after saving.
    """
    return run.train(ClassificationParts, config, reporter)


class ClassificationParts(RunParts):
    """What classification brings to a run."""

    config: TrainConfig

    def __init__(self, config: TrainConfig, processes: Processes, notify: Callable[[str], None]) -> None:
        super().__init__(config, processes, notify)
        self._chosen: tuple[int, ...] | None = None  # outputs of the classifier in model.weights, by data.class_map

    @override
    def check(self, plan: BatchPlan, device: torch.device, starts: bool) -> None:
        if self.config.augment.mixes:
            check_pairs(f"The part of loop.batch_size ({self.config.loop.batch_size}) in one forward pass", plan.per_pass)
        check_settings(self.config, device, starts)

    @override
    def open_data(self) -> Sources:
        sources, setting = open_train_and_val(self.config.data), self.config.data.class_map
        self._chosen = None if setting is None else read_class_map(setting, sources[0].class_names)
        return sources

    @override
    def notes(self, sources: Sources, starts: bool) -> list[str]:
        notes = [note for source in sources if source is not None for note in source.notes]
        if self.config.model.weights is not None and starts:
            notes.append(inheritance_note(Path(self.config.model.weights), sources[0].class_names))
        return notes

    @override
    def build(self, sources: Sources, starts: bool) -> nn.Module:
        _check_number_of_classes(self.config, sources[0])
        return self.network(sources[0].class_names, starts)

    def network(self, names: tuple[str, ...], starts: bool) -> nn.Module:
        """Build the network for the classes `names`; with its initial weights only if the run starts."""
        config, num_classes = self.config.model, len(names)
        with scoped_seed(MODEL_STREAM, self.config.seed):
            model = build_model(config.name, num_classes, config.args, config.pretrained and starts)
        is_new = not config.pretrained or pretrained_cfg(model).get("num_classes") != num_classes
        if config.head_init_scale is not None and is_new:
            scale_classifier(model, config.head_init_scale)
        if config.weights is not None and starts:
            self._load(model, config, names)
        if config.grad_checkpointing:
            checkpoint_gradients(model, config.name)
        return model

    def _load(self, model: nn.Module, config: ModelConfig, names: tuple[str, ...]) -> None:
        """Load the weights that the run starts from, and report what was loaded."""
        assert config.weights is not None
        if self._chosen is not None:
            setting = str(self.config.data.class_map)
            report = load_mapped(model, config, self._chosen, setting, self.notify)
            self.notify(str(report))
            self.notify(f"The classifier starts from that in the file: {class_map_note(self._chosen, names, setting)}")
            return
        report, untrained = load_weights(model, config.weights, self.notify)
        self.notify(str(report))
        if untrained:
            self.notify(f"{untrained}: this run trains it.")

    @override
    def describe(self, sources: Sources, network: nn.Module) -> SavedModel:
        names = sources[0].class_names
        return SavedModel(
            name=self.config.model.name,
            model_args=dict(self.config.model.args),
            form="training",
            num_classes=len(names),
            class_names=names,
            preprocessing=Preprocessing.resolve(self.config.data, pretrained_cfg(network)),
        )

    @override
    def samples(self, sources: Sources, network: nn.Module, saved: SavedModel) -> RunSamples:
        (train, val), preprocessing, channels = sources, saved.preprocessing, input_channels(network)
        train_transform = OnImage(match_channels(preprocessing.train_transform(self.config.augment), channels))
        eval_transform = OnImage(match_channels(preprocessing.eval_transform(), channels))
        return RunSamples(
            TrainingSamples(train, train_transform, self.config.seed, LabeledImages.collate),
            None if val is None else EvaluationSamples(val, eval_transform, LabeledImages.collate),
        )

    @override
    def create_task(self, sources: Sources, network: nn.Module, saved: SavedModel) -> Classification:
        return create_task(self.config, saved, input_channels(network), self.notify)

    @override
    def fingerprint(self, sources: Sources) -> dict[str, Any]:
        return fingerprint(*sources)

    @override
    def training_loader(self, samples: TrainingSamples, options: LoaderOptions, plan: BatchPlan) -> TrainingLoader:
        return TrainingLoader(samples, options, plan, self.processes.rank, self.config.augment.repeats)

    @override
    def closing_notes(self, sources: Sources, unreadable: Collection[str]) -> list[str]:
        return missing_classes(sources[0], unreadable)


def _check_number_of_classes(config: TrainConfig, source: ImageSource) -> None:
    """Raise a `ConfigError` unless `model.num_classes` fits the training data."""
    found, wanted = len(source.class_names), config.model.num_classes
    if wanted is not None and wanted != found:
        raise ConfigError(
            f"model.num_classes is {wanted}, but the training data has {found} classes. "
            "Leave model.num_classes out to follow the data, or check data.root."
        )
