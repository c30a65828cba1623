"""Image classification: loss with mixing and smoothing, evaluation, and a whole run from its configuration."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from widekernel.data import (
    Batch,
    EvaluationSamples,
    ImageSource,
    LoaderOptions,
    Preprocessing,
    TrainingLoader,
    TrainingSamples,
    evaluation_loader,
    open_train_and_val,
)
from widekernel.data.loading import MIX_STREAM
from widekernel.data.paths import expanded
from widekernel.data.seeding import scoped_seed
from widekernel.errors import CheckpointError, ConfigError
from widekernel.files import explained, write_atomically
from widekernel.sparsity import save_masks
from widekernel.tasks.assembly import build_model, choose_device, pretrained_cfg
from widekernel.tasks.class_mapping import inheritance_note
from widekernel.tasks.config import TrainConfig
from widekernel.tasks.evaluation import EvaluationOptions, evaluate
from widekernel.tasks.fingerprint import code_fingerprint, difference, fingerprint
from widekernel.tasks.foreign_checkpoint import load_weights
from widekernel.tasks.image_channels import input_channels, match_channels
from widekernel.tasks.missing_classes import missing_classes
from widekernel.tasks.saved import SavedModel, read_saved, save_model
from widekernel.training import (
    CheckpointStore,
    Processes,
    Reporter,
    RunContext,
    RunFolder,
    RunFolderError,
    SilentReporter,
    Trainer,
)
from widekernel.training.config import Metrics
from widekernel.training.curves import save_curves
from widekernel.training.metrics_log import read_metrics
from widekernel.training.preflight import notes_on_workers
from widekernel.training.random_state import seed_run

SUMMARY_KEYS = ("epochs", "step", "val_top1", "val_top5", "train_unreadable", "val_unreadable")
"""What a summary has at least."""


class Classification:
    """The objective of a classification run.

    Args:
        config: the run
        num_classes: outputs of the network
        val_loader: held-out images
        options: how to evaluate
    """

    best_metric = "val_top1"

    def __init__(self, config: TrainConfig, num_classes: int, val_loader: DataLoader, options: EvaluationOptions) -> None:
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
        """Cross-entropy against smoothed, and where configured mixed, targets."""
        if self.mixup is None:
            return F.cross_entropy(model(batch.images), batch.targets, label_smoothing=self.label_smoothing)
        with scoped_seed(MIX_STREAM, *stream):
            images, targets = self.mixup(batch.images, batch.targets)
        return F.cross_entropy(model(images), targets)

    def evaluate(self, model: nn.Module, name: str, stop: Callable[[], bool]) -> Metrics | None:
        """`val_top1` and `val_top5` in percent, `val_loss`, and the count of unreadable images."""
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


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Args:
        folder: where it is
        summary: its final figures
        was_finished: whether it had been finished before
        other_code: if it had, how the code that finished it differs from this; "" if it does not
    """

    folder: RunFolder
    summary: dict[str, Any]
    was_finished: bool
    other_code: str = ""


def train(config: TrainConfig, reporter: Reporter | None = None, processes: Processes | None = None) -> RunResult:
    """Train as configured in `config.output`; the same call again resumes, or returns the finished result.

    Seeds the global random generators, as the entry point of a training process.

    Raises:
        WidekernelError: configuration, data or run folder cannot be used; nothing has been trained then.
        Interrupted: stopped by a signal, after saving.
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
    notes = [*train_source.notes, *val_source.notes]
    if config.model.weights is not None and not _has_states(folder):
        notes.append(inheritance_note(Path(config.model.weights), train_source.class_names))
    for note in filter(None, dict.fromkeys(notes)):
        reporter.message(note)
    num_classes = _count_classes(config, train_source)
    seed_run(config.seed, processes.rank)
    model = _build(config, num_classes, _has_states(folder), reporter)
    preprocessing = Preprocessing.resolve(config.data, pretrained_cfg(model))
    channels = input_channels(model)
    train_transform = match_channels(preprocessing.train_transform(config.augment), channels)
    eval_transform = match_channels(preprocessing.eval_transform(), channels)
    settings = _located(config)
    folder.prepare(settings)
    images, code = fingerprint(train_source, val_source), code_fingerprint()
    summary = folder.read_summary(SUMMARY_KEYS)
    if summary is not None:
        folder.check_same_data(_data_of(summary, folder), images)
        if not _lacks_models(config, folder, reporter):
            return RunResult(folder, summary, was_finished=True, other_code=difference(summary.get("code"), code))
    for note in notes_on_workers(config.data.workers):
        reporter.message(note)

    options = _loader_options(config, device)
    loader = TrainingLoader(TrainingSamples(train_source, train_transform, config.seed), options, processes.shard)
    eval_size = config.loop.eval_batch_size or max(1, config.loop.batch_size * 3 // 2)
    val_loader = evaluation_loader(
        EvaluationSamples(val_source, eval_transform),
        replace(options, batch_size=eval_size),
        processes.shard,
    )
    layout = torch.channels_last if config.loop.channels_last else torch.contiguous_format
    model.to(device).to(memory_format=layout)
    objective = Classification(
        config,
        num_classes,
        val_loader,
        EvaluationOptions(device, config.data.max_unreadable, processes=processes, reporter=reporter),
    )
    saved = SavedModel(
        name=config.model.name,
        model_args=dict(config.model.args),
        form="training",
        num_classes=num_classes,
        class_names=train_source.class_names,
        preprocessing=preprocessing,
    )
    context = RunContext(folder, device, processes, reporter, images, code, saved.to_dict(), settings)
    trainer = Trainer(model, objective, loader, config.training, context)
    report = trainer.sparsity.report()
    if report is not None:
        reporter.message(report.summary())
    trainer.run()
    for note in missing_classes(train_source, trainer.progress.unreadable):
        reporter.message(note)
    return RunResult(folder, _finish(trainer, saved), was_finished=summary is not None)


def _located(config: TrainConfig) -> dict[str, Any]:
    """The settings as the run keeps them: the folder of the data means the same from wherever it is read."""
    if config.data.root is not None:
        root = os.path.abspath(expanded("data.root", config.data.root))  # noqa: PTH100 - resolve() would follow links
        config = replace(config, data=replace(config.data, root=root))
    return config.to_dict()


def _has_states(folder: RunFolder) -> bool:
    return folder.has_begun() and bool(CheckpointStore(folder.checkpoints).paths())


def _data_of(summary: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """Description of the data of a finished run, which earlier versions kept in training states only."""
    if "data" not in summary and _has_states(folder):
        return CheckpointStore(folder.checkpoints).load_latest()["data"]  # type: ignore[index]
    return summary.get("data", {})


def _build(config: TrainConfig, num_classes: int, has_begun: bool, reporter: Reporter) -> nn.Module:
    """The network with its first weights, which a run that has begun needs no more: its training state has newer ones."""
    pretrained = config.model.pretrained and not has_begun
    model = build_model(config.model.name, num_classes, config.model.args, pretrained)
    if config.model.weights is not None and not has_begun:
        report, untrained = load_weights(model, config.model.weights, reporter.message)
        reporter.message(str(report))
        if untrained:
            reporter.message(f"{untrained}: this run trains it.")
    return model


def _lacks_models(config: TrainConfig, folder: RunFolder, reporter: Reporter) -> bool:
    """Whether a finished run has to write its models again.

    Raises:
        RunFolderError: it would have to, but has no training state left.
    """
    expected = [folder.model] if config.ema.decay is None else [folder.model, folder.model_ema]
    missing = [path for path in expected if not _is_whole(path)]
    if not missing:
        return False
    if not _has_states(folder):
        raise RunFolderError(
            f"The run in {folder.path} is finished, but {missing[0].name} is missing or damaged, and there is no training "
            "state to write it from. Restore the file, or choose another --output."
        )
    reporter.message(f"{missing[0]} is missing or damaged; it is written again from the last training state.")
    return True


def _is_whole(path: Path) -> bool:
    """Whether a model file is there, not cut off, and in the form that training leaves."""
    try:
        return read_saved(path).form == "training"
    except CheckpointError:
        return False


def _finish(trainer: Trainer, saved: SavedModel) -> dict[str, Any]:
    folder = trainer.context.folder
    rows = read_metrics(folder.metrics)
    last = [row for row in rows if "val_top1" in row][-1]
    progress = trainer.progress
    summary = {
        "epochs": progress.epoch,
        **{key: value for key, value in last.items() if key not in ("epoch", "lr")},
        "best_top1": progress.best,
        "best_step": progress.best_step,
        "data": trainer.context.fingerprint,
        "code": trainer.context.code,
    }
    if trainer.context.processes.is_main:
        save_model(trainer.sparsity.finished(trainer.model), folder.model, saved)
        _write_sparsity(trainer)
        if trainer.ema is not None:
            save_model(trainer.ema.module, folder.model_ema, saved)
        save_curves(rows, folder.curves)
        folder.write_summary(summary)
    return summary


def _write_sparsity(trainer: Trainer) -> None:
    """Keep the masks and the report of a sparse run beside its model."""
    report, folder = trainer.sparsity.report(), trainer.context.folder
    if report is None:
        return
    save_masks(trainer.sparsity.masks(), folder.masks)
    text = json.dumps(report.to_dict(), indent=1)
    with explained(folder.sparsity):
        write_atomically(folder.sparsity, lambda file: file.write(text.encode()))
    with explained(folder.sparsity_picture):
        picture = report.picture()
        write_atomically(folder.sparsity_picture, lambda file: file.write(picture))


def _count_classes(config: TrainConfig, source: ImageSource) -> int:
    found, wanted = len(source.class_names), config.model.num_classes
    if wanted is not None and wanted != found:
        raise ConfigError(
            f"model.num_classes is {wanted}, but the training data has {found} classes. "
            "Leave model.num_classes out to follow the data, or check data.root."
        )
    return found


def _loader_options(config: TrainConfig, device: torch.device) -> LoaderOptions:
    return LoaderOptions(config.loop.batch_size, config.data.workers, pin_memory=device.type == "cuda")
