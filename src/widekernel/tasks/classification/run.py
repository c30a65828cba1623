"""Complete classification runs from a configuration, by one or several processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from widekernel.data import (
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
from widekernel.data.seeding import MODEL_STREAM, scoped_seed
from widekernel.engine import Processes, Reporter, RunContext, RunFolder, SilentReporter, Trainer
from widekernel.engine.joining import joined_processes
from widekernel.engine.preflight import notes_on_workers
from widekernel.engine.step_batches import RunData
from widekernel.errors import ConfigError
from widekernel.settings import flatten
from widekernel.tasks.assembly import build_model, checkpoint_gradients, choose_device, pretrained_cfg, scale_classifier
from widekernel.tasks.classification.checks import check_settings
from widekernel.tasks.classification.class_map import class_map_note, load_mapped, read_class_map
from widekernel.tasks.classification.class_mapping import inheritance_note
from widekernel.tasks.classification.config import ModelConfig, TrainConfig, check_pairs, upgraded
from widekernel.tasks.classification.creation import create_task
from widekernel.tasks.classification.missing_classes import missing_classes
from widekernel.tasks.fingerprint import code_fingerprint, fingerprint
from widekernel.tasks.foreign_checkpoint import load_weights
from widekernel.tasks.image_channels import input_channels, match_channels
from widekernel.tasks.results import RunResult, earlier_result, has_states, write_results
from widekernel.tasks.saved import SavedModel

T = TypeVar("T")
Sources = tuple[ImageSource, ImageSource | None]
"""Training and held-out images."""


def train(config: TrainConfig, reporter: Reporter | None = None) -> RunResult:
    """Train as configured in the folder `config.output`; the same call again resumes the run, or returns its result.

    If torchrun's environment says that there are several processes, all of them make this call and train together; the first
    one alone reports and writes files. The global random generators are as before afterwards.

    Raises:
        WidekernelError: settings, data or run folder cannot be used (before anything is trained), or training fails.
        Interrupted: a signal stopped the training, after saving.
    """
    if config.output is None:
        raise ConfigError("output is not set; give the run folder.")
    with joined_processes(config.loop.device, config.loop.timeout) as processes, ExitStack() as stack:
        shown = reporter if reporter is not None and processes.is_main else SilentReporter()
        folder = RunFolder(config.output, upgraded)
        processes.from_main(lambda: _enter(stack, folder))
        return _Run(config, folder, shown, processes).result()


def _enter(stack: ExitStack, folder: RunFolder) -> None:
    stack.enter_context(folder.reserved())


@dataclass(frozen=True)
class _Run:
    """One call of `train`, on one process."""

    config: TrainConfig
    folder: RunFolder
    reporter: Reporter
    processes: Processes

    def result(self) -> RunResult:
        """Train, unless the run is finished, and return the result."""
        config, folder, processes = self.config, self.folder, self.processes
        _require_same(flatten(config.to_dict()), processes, "settings", "Start all processes with the same command.")
        device = processes.device or choose_device(config.loop.device, "loop.device")
        # Opening the data may take minutes, so what can be refused without them comes first.
        plan = _make_plan(config, processes.world_size)
        has_begun = processes.from_main(lambda: has_states(folder))
        check_settings(config, device, starts=not has_begun)
        settings = _with_absolute_root(config)
        processes.from_main(lambda: folder.prepare(settings))
        processes.note(0, "opening the data")
        sources = self._main_first(lambda: open_train_and_val(config.data))
        chosen = None if config.data.class_map is None else read_class_map(config.data.class_map, sources[0].class_names)
        self._report_notes(sources, has_begun)
        num_classes = _count_classes(config, sources[0])
        processes.note(0, "building the network")
        model = self._main_first(lambda: self._build(sources[0].class_names, has_begun, chosen))
        saved = SavedModel(
            name=config.model.name,
            model_args=dict(config.model.args),
            form="training",
            num_classes=num_classes,
            class_names=sources[0].class_names,
            preprocessing=Preprocessing.resolve(config.data, pretrained_cfg(model)),
        )
        samples = _make_samples(config, sources, saved.preprocessing, input_channels(model))
        task = self._main_first(lambda: create_task(config, saved, input_channels(model), self.reporter.message))
        context = self._make_context(sources, saved, device, settings, task.digests)
        was_finished = processes.from_main(folder.summary.exists)
        evaluated = () if sources[1] is None else config.training.evaluated
        result = processes.from_main(lambda: earlier_result(config.ema.decay is not None, evaluated, task, context))
        if result is not None:
            return result
        for note in self._notes_on_steps(plan):
            self.reporter.message(note)

        data = _make_loaders(config, samples, plan, context)
        layout = torch.channels_last if config.loop.channels_last else torch.contiguous_format
        task.prepare(model, config.seed)
        task.to(device, layout)
        trainer = Trainer(model.to(device).to(memory_format=layout), task, data, config.training, context)
        report = trainer.sparsity.report()
        if report is not None:
            self.reporter.message(report.summary())
        trainer.run()
        for warning in missing_classes(sources[0], trainer.progress.unreadable):
            self.reporter.message(warning)
        for network in (trainer.model, *(() if trainer.average is None else (trainer.average.module,))):
            task.finish(network)
        processes.note(trainer.progress.step, "saving the results")
        summary = processes.from_main(lambda: write_results(trainer, saved))
        return RunResult(folder, summary, was_finished, task.metrics)

    def _main_first(self, function: Callable[[], T]) -> T:
        """Call `function` in the first process, which may fill caches or fail for all, and then in the others."""
        results: list[T] = []
        self.processes.from_main(lambda: results.append(function()))
        return results[0] if self.processes.is_main else function()

    def _notes_on_steps(self, plan: BatchPlan) -> list[str]:
        """Return notes on the loading processes, the division of a batch and a learning rate that is scaled to it."""
        config = self.config
        notes = notes_on_workers(config.data.workers)
        if plan.world_size * plan.accumulate > 1:
            notes.append(f"One optimizer step: {plan.describe()}.")
        if config.schedule.lr_scale_batch is not None:
            notes.append(
                f"The peak learning rate is {config.training.optimizer.lr:.6g}: optimizer.lr ({config.optimizer.lr:g}) × "
                f"loop.batch_size ({plan.batch_size}) / schedule.lr_scale_batch ({config.schedule.lr_scale_batch})."
            )
        return notes

    def _report_notes(self, sources: Sources, has_begun: bool) -> None:
        """Report notes on the data and, if the run starts from weights, on their classes."""
        notes = [note for source in sources if source is not None for note in source.notes]
        if self.config.model.weights is not None and not has_begun:
            notes.append(inheritance_note(Path(self.config.model.weights), sources[0].class_names))
        for note in filter(None, dict.fromkeys(notes)):
            self.reporter.message(note)

    def _build(self, names: tuple[str, ...], has_begun: bool, chosen: tuple[int, ...] | None) -> nn.Module:
        """Build the network with its initial weights, which a run that has begun takes from its training state instead.

        `chosen` are the outputs of the classifier in `model.weights` that the network starts from, by data.class_map.
        """
        config, num_classes = self.config.model, len(names)
        with scoped_seed(MODEL_STREAM, self.config.seed):
            model = build_model(config.name, num_classes, config.args, config.pretrained and not has_begun)
        is_new = not config.pretrained or pretrained_cfg(model).get("num_classes") != num_classes
        if config.head_init_scale is not None and is_new:
            scale_classifier(model, config.head_init_scale)
        if config.weights is not None and not has_begun:
            self._load(model, config, chosen, names)
        if config.grad_checkpointing:
            checkpoint_gradients(model, config.name)
        return model

    def _load(self, model: nn.Module, config: ModelConfig, chosen: tuple[int, ...] | None, names: tuple[str, ...]) -> None:
        """Load the weights that the run starts from, and report what was loaded."""
        assert config.weights is not None
        if chosen is not None:
            setting = str(self.config.data.class_map)
            report = load_mapped(model, config, chosen, setting, self.reporter.message)
            self.reporter.message(str(report))
            self.reporter.message(f"The classifier starts from that in the file: {class_map_note(chosen, names, setting)}")
            return
        report, untrained = load_weights(model, config.weights, self.reporter.message)
        self.reporter.message(str(report))
        if untrained:
            self.reporter.message(f"{untrained}: this run trains it.")

    def _make_context(
        self,
        sources: Sources,
        saved: SavedModel,
        device: torch.device,
        settings: dict[str, Any],
        digests: dict[str, str],
    ) -> RunContext:
        processes, images = self.processes, {**fingerprint(*sources), **digests}
        _require_same(images, processes, "data", "Give all hosts the same data (data.root).")
        code = code_fingerprint()
        return RunContext(self.folder, device, processes, self.reporter, images, code, saved.to_dict(), settings)


def _count_classes(config: TrainConfig, source: ImageSource) -> int:
    """Return the number of classes in the training data, after checking `model.num_classes` against it."""
    found, wanted = len(source.class_names), config.model.num_classes
    if wanted is not None and wanted != found:
        raise ConfigError(
            f"model.num_classes is {wanted}, but the training data has {found} classes. "
            "Leave model.num_classes out to follow the data, or check data.root."
        )
    return found


def _make_plan(config: TrainConfig, world_size: int) -> BatchPlan:
    """Return the division of the global batch.

    Raises:
        ConfigError: it cannot be divided, or not into pairs if images are mixed.
    """
    plan = BatchPlan(config.loop.batch_size, config.loop.micro_batch, world_size)
    if config.augment.mixes:
        check_pairs(f"The part of loop.batch_size ({config.loop.batch_size}) in one forward pass", plan.per_pass)
    return plan


def _require_same(values: dict[str, Any], processes: Processes, what: str, fix: str) -> None:
    """Raise a `ConfigError` unless all processes have the same `values`; `what` names them."""
    found = processes.gather(values)
    for rank, other in enumerate(found):
        differing = [key for key in found[0].keys() | other.keys() if found[0].get(key) != other.get(key)]
        if differing:
            key = min(differing)
            raise ConfigError(
                f"Process {rank} has other {what} than process 0: {key} is {other.get(key)!r} instead of "
                f"{found[0].get(key)!r}. {fix}"
            )


def _make_samples(
    config: TrainConfig, sources: Sources, preprocessing: Preprocessing, channels: int
) -> tuple[TrainingSamples, EvaluationSamples | None]:
    """Return the training and held-out images, transformed for a network that takes `channels` channels."""
    train, val = sources
    train_transform = OnImage(match_channels(preprocessing.train_transform(config.augment), channels))
    eval_transform = OnImage(match_channels(preprocessing.eval_transform(), channels))
    return (
        TrainingSamples(train, train_transform, config.seed, LabeledImages.collate),
        None if val is None else EvaluationSamples(val, eval_transform, LabeledImages.collate),
    )


def _make_loaders(
    config: TrainConfig,
    samples: tuple[TrainingSamples, EvaluationSamples | None],
    plan: BatchPlan,
    context: RunContext,
) -> RunData:
    """Return the loaders of the training and held-out batches of this process."""
    train, val = samples
    pinned = context.device.type == "cuda"
    options = LoaderOptions.configured(config.data, pin_memory=pinned, notify=context.reporter.message)
    eval_size = config.loop.eval_batch_size or max(1, plan.per_pass * 3 // 2)
    return RunData(
        TrainingLoader(train, options, plan, context.processes.rank, config.augment.repeats),
        None if val is None else EvaluationLoader(val, eval_size, options, context.processes.shard),
    )


def _with_absolute_root(config: TrainConfig) -> dict[str, Any]:
    """Return the settings as the run stores them: with an absolute `data.root`, which is valid from any folder."""
    if config.data.root is not None:
        root = os.path.abspath(expand_path("data.root", config.data.root))  # noqa: PTH100 - resolve() would follow links
        config = replace(config, data=replace(config.data, root=root))
    return config.to_dict()
