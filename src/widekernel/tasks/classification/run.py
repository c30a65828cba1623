"""Image classification: the objective, and complete runs from a configuration."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from widekernel.data import (
    Batch,
    BatchPlan,
    EvaluationLoader,
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
from widekernel.data.paths import expand_path
from widekernel.data.seeding import MIX_STREAM, scoped_seed
from widekernel.engine import Processes, Reporter, RunContext, RunFolder, SilentReporter, Trainer
from widekernel.engine.config import Metrics
from widekernel.engine.preflight import notes_on_workers
from widekernel.engine.random_state import seed_run
from widekernel.errors import ConfigError
from widekernel.tasks.assembly import build_model, choose_device, pretrained_cfg
from widekernel.tasks.classification.class_mapping import inheritance_note
from widekernel.tasks.classification.config import TrainConfig
from widekernel.tasks.classification.evaluation import EvaluationOptions, evaluate
from widekernel.tasks.classification.missing_classes import missing_classes
from widekernel.tasks.classification.results import RunResult, earlier_result, has_states, write_results
from widekernel.tasks.fingerprint import code_fingerprint, fingerprint
from widekernel.tasks.foreign_checkpoint import load_weights
from widekernel.tasks.image_channels import input_channels, match_channels
from widekernel.tasks.saved import SavedModel


class Classification:
    """Objective of a classification run.

    Args:
        config: settings of the run
        num_classes: outputs of the network
        val_loader: held-out images
        options: settings of the evaluation
    """

    best_metric = "val_top1"

    def __init__(
        self, config: TrainConfig, num_classes: int, val_loader: EvaluationLoader, options: EvaluationOptions
    ) -> None:
        self.label_smoothing, self.val_loader, self.options = config.label_smoothing, val_loader, options
        augment = config.augment
        self.mixup: Mixup | None = None
        if augment.mixes:
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.switch_prob,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )

    def loss(self, model: nn.Module, batch: Batch, stream: tuple[int, ...]) -> Tensor:
        """Return the cross-entropy with smoothed targets, which are also mixed if configured."""
        images, targets = batch.content
        if self.mixup is None:
            return F.cross_entropy(model(images), targets, label_smoothing=self.label_smoothing)
        with scoped_seed(MIX_STREAM, *stream):
            images, targets = self.mixup(images, targets)
        return F.cross_entropy(model(images), targets)

    def evaluate(self, model: nn.Module, name: str, stop: Callable[[], bool]) -> Metrics | None:
        """Return `val_top1` and `val_top5` in percent, `val_loss`, and the numbers of images and of unreadable images."""
        result = evaluate(model, self.val_loader, replace(self.options, stop=stop), name)
        if result is None:
            return None
        return {
            "val_top1": result.top1,
            "val_top5": result.top5,
            "val_loss": result.loss,
            "val_images": result.images,
            "val_unreadable": result.unreadable,
        }


def train(config: TrainConfig, reporter: Reporter | None = None, processes: Processes | None = None) -> RunResult:
    """Train as configured in the folder `config.output`; the same call again resumes the run, or returns its result.

    This seeds the global random generators, so call it at the entry point of a training process.

    Raises:
        WidekernelError: settings, data or run folder cannot be used (before anything is trained), or training fails.
        Interrupted: a signal stopped the training, after saving.
    """
    if config.output is None:
        raise ConfigError("output is not set; give the run folder.")
    reporter, processes = reporter or SilentReporter(), processes or Processes()
    folder = RunFolder(config.output)
    with folder.reserved() if processes.is_main else nullcontext():
        return _train(config, folder, reporter, processes)


def _train(config: TrainConfig, folder: RunFolder, reporter: Reporter, processes: Processes) -> RunResult:
    device = choose_device(config.loop.device)
    train_source, val_source = open_train_and_val(config.data)
    _report_notes(config, folder, (train_source, val_source), reporter)
    num_classes = _count_classes(config, train_source)
    seed_run(config.seed, processes.rank)
    model = _build(config, num_classes, has_states(folder), reporter)
    saved = SavedModel(
        name=config.model.name,
        model_args=dict(config.model.args),
        form="training",
        num_classes=num_classes,
        class_names=train_source.class_names,
        preprocessing=Preprocessing.resolve(config.data, pretrained_cfg(model)),
    )
    samples = _make_samples(config, (train_source, val_source), saved.preprocessing, input_channels(model))
    settings = _with_absolute_root(config)
    folder.prepare(settings)
    images, code = fingerprint(train_source, val_source), code_fingerprint()
    context = RunContext(folder, device, processes, reporter, images, code, saved.to_dict(), settings)
    was_finished = folder.summary.exists()
    result = earlier_result(config, context)
    if result is not None:
        return result
    for note in notes_on_workers(config.data.workers):
        reporter.message(note)

    loader, val_loader = _make_loaders(config, samples, context)
    model.to(device).to(memory_format=torch.channels_last if config.loop.channels_last else torch.contiguous_format)
    evaluation = EvaluationOptions(device, config.data.max_unreadable, processes=processes, reporter=reporter)
    objective = Classification(config, num_classes, val_loader, evaluation)
    trainer = Trainer(model, objective, loader, config.training, context)
    report = trainer.sparsity.report()
    if report is not None:
        reporter.message(report.summary())
    trainer.run()
    for warning in missing_classes(train_source, trainer.progress.unreadable):
        reporter.message(warning)
    return RunResult(folder, write_results(trainer, saved), was_finished)


def _report_notes(
    config: TrainConfig, folder: RunFolder, sources: tuple[ImageSource, ImageSource], reporter: Reporter
) -> None:
    """Report notes on the data and, if the run starts from weights, on their classes."""
    notes = [note for source in sources for note in source.notes]
    if config.model.weights is not None and not has_states(folder):
        notes.append(inheritance_note(Path(config.model.weights), sources[0].class_names))
    for note in filter(None, dict.fromkeys(notes)):
        reporter.message(note)


def _count_classes(config: TrainConfig, source: ImageSource) -> int:
    """Return the number of classes in the training data, after checking `model.num_classes` against it."""
    found, wanted = len(source.class_names), config.model.num_classes
    if wanted is not None and wanted != found:
        raise ConfigError(
            f"model.num_classes is {wanted}, but the training data has {found} classes. "
            "Leave model.num_classes out to follow the data, or check data.root."
        )
    return found


def _build(config: TrainConfig, num_classes: int, has_begun: bool, reporter: Reporter) -> nn.Module:
    """Build the network with its initial weights, which a run that has begun takes from its training state instead."""
    pretrained = config.model.pretrained and not has_begun
    model = build_model(config.model.name, num_classes, config.model.args, pretrained)
    if config.model.weights is not None and not has_begun:
        report, untrained = load_weights(model, config.model.weights, reporter.message)
        reporter.message(str(report))
        if untrained:
            reporter.message(f"{untrained}: this run trains it.")
    return model


def _make_samples(
    config: TrainConfig, sources: tuple[ImageSource, ImageSource], preprocessing: Preprocessing, channels: int
) -> tuple[TrainingSamples, EvaluationSamples]:
    """Return the training and held-out images, transformed for a network that takes `channels` channels."""
    train, val = sources
    train_transform = match_channels(preprocessing.train_transform(config.augment), channels)
    eval_transform = match_channels(preprocessing.eval_transform(), channels)
    return (
        TrainingSamples(train, OnImage(train_transform), config.seed, LabeledImages.collate),
        EvaluationSamples(val, OnImage(eval_transform), LabeledImages.collate),
    )


def _make_loaders(
    config: TrainConfig, samples: tuple[TrainingSamples, EvaluationSamples], context: RunContext
) -> tuple[TrainingLoader, EvaluationLoader]:
    """Return the loaders of the training and held-out batches of this process."""
    train, val = samples
    device, shard, notify = context.device, context.processes.shard, context.reporter.message
    options = LoaderOptions.configured(config.data, pin_memory=device.type == "cuda", notify=notify)
    micro_batch, accumulate = config.loop.batch_size, config.loop.accumulate
    plan = BatchPlan(micro_batch * accumulate * shard.world_size, micro_batch, shard.world_size)
    eval_size = config.loop.eval_batch_size or max(1, config.loop.batch_size * 3 // 2)
    return TrainingLoader(train, options, plan, shard.rank), EvaluationLoader(val, eval_size, options, shard)


def _with_absolute_root(config: TrainConfig) -> dict[str, Any]:
    """Return the settings as the run stores them: with an absolute `data.root`, which is valid from any folder."""
    if config.data.root is not None:
        root = os.path.abspath(expand_path("data.root", config.data.root))  # noqa: PTH100 - resolve() would follow links
        config = replace(config, data=replace(config.data, root=root))
    return config.to_dict()
