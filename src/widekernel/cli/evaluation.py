"""Evaluation of a network on the held-out split of a data set, by one or several processes, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

import widekernel
from widekernel.cli.console import ConsoleReporter
from widekernel.cli.options import EvalOptions
from widekernel.data import (
    DataConfig,
    EvaluationLoader,
    EvaluationSamples,
    LabeledImages,
    LoaderOptions,
    OnImage,
    open_split,
)
from widekernel.engine.interrupts import InterruptGuard
from widekernel.engine.processes import Processes
from widekernel.engine.reporter import SilentReporter
from widekernel.engine.run_folder import RunFolder
from widekernel.engine.stopping import Stopping
from widekernel.errors import ConfigError
from widekernel.tasks.assembly import choose_device
from widekernel.tasks.classification.class_map import check_outputs, class_map_note, read_class_map
from widekernel.tasks.classification.class_mapping import class_mapping, mapping_note
from widekernel.tasks.classification.evaluation import Accuracy, Evaluation, EvaluationOptions, evaluate
from widekernel.tasks.classification.evaluation_data import changed_images_warning, location_of
from widekernel.tasks.classification.fold_evaluation import FoldEvaluation, evaluate_both
from widekernel.tasks.image_channels import input_channels, match_channels
from widekernel.tasks.saved import SavedModel

Result = TypeVar("Result")
Pass = Callable[[nn.Module, EvaluationLoader, EvaluationOptions, Callable[[], Accuracy]], Result | None]
"""Function that evaluates a network: network, batches, options and what creates an evaluator of the accuracy."""


def evaluate_on(
    model: nn.Module,
    saved: SavedModel,
    data: DataConfig,
    options: EvalOptions,
    run: RunFolder | None = None,
    processes: Processes | None = None,
) -> Evaluation:
    """Evaluate `model` on the held-out split of `data`; preprocessing that `data` does not set is that of `saved`.

    Messages name the images, and warn if `run`, which trained the network, had other images in the same place.

    Raises:
        WidekernelError: the data cannot be used, or has other classes.
        Interrupted: a signal stopped the evaluation.
    """
    return _evaluate(model, saved, data, options, (run, processes or Processes()), _one_form)


def compare_folded(
    model: nn.Module,
    saved: SavedModel,
    data: DataConfig,
    options: EvalOptions,
    run: RunFolder | None = None,
    processes: Processes | None = None,
) -> FoldEvaluation:
    """Evaluate `model` and its folded form on the same images; otherwise as `evaluate_on`.

    Raises:
        WidekernelError: the network is folded already, or as for `evaluate_on`.
        Interrupted: a signal stopped the evaluation.
    """
    if saved.form == "folded":
        raise ConfigError("--fold-check compares a network with its folded form, but this one is folded: leave it out.")
    return _evaluate(model, saved, data, options, (run, processes or Processes()), _both_forms)


def _one_form(
    model: nn.Module, loader: EvaluationLoader, options: EvaluationOptions, accuracy: Callable[[], Accuracy]
) -> Evaluation | None:
    return evaluate(model, loader, options, accuracy())


def _both_forms(
    model: nn.Module, loader: EvaluationLoader, options: EvaluationOptions, accuracy: Callable[[], Accuracy]
) -> FoldEvaluation | None:
    folded = widekernel.fold(model.eval()).eval()
    return evaluate_both(model, folded, loader, options, (accuracy(), accuracy()))


def _evaluate(
    model: nn.Module,
    saved: SavedModel,
    data: DataConfig,
    options: EvalOptions,
    where: tuple[RunFolder | None, Processes],
    evaluation: Pass[Result],
) -> Result:
    run, processes = where
    device = processes.device or choose_device(options.device)
    source = processes.main_first(lambda: open_split(data, "val"))
    accuracy, classes_note = _classes(saved, data, source.class_names)
    transform = match_channels(saved.preprocessing.overridden_by(data).eval_transform(), input_channels(model))
    reporting = ConsoleReporter() if processes.is_main else _Silent()
    with reporting as reporter, InterruptGuard() as guard:
        reporter.message(f"Evaluating on {location_of(data, source)}.")
        for note in filter(None, (changed_images_warning(run, data, source), *source.notes, classes_note)):
            reporter.message(note)
        stopping = Stopping(guard, processes)
        loading = LoaderOptions.configured(data, pin_memory=device.type == "cuda", notify=reporter.message)
        samples = EvaluationSamples(source, OnImage(transform), LabeledImages.collate)
        loader = EvaluationLoader(samples, options.batch_size, loading, processes.shard)
        how = EvaluationOptions(device, data.max_unreadable, processes=processes, reporter=reporter, stop=stopping.now)
        processes.note(0, "evaluating")
        result = evaluation(model.to(device), loader, how, accuracy)
        if result is None:
            stopping.stop()
    return result


def _classes(saved: SavedModel, data: DataConfig, names: tuple[str, ...]) -> tuple[Callable[[], Accuracy], str]:
    """Return what creates an evaluator for these classes, and a line for the user on how they are matched, or ""."""
    if data.class_map is None:
        order = class_mapping(saved, names)
        return lambda: Accuracy(order), mapping_note(saved, names)
    chosen = read_class_map(data.class_map, names)
    check_outputs(chosen, saved.num_classes, data.class_map)
    return lambda: Accuracy(class_map=chosen), class_map_note(chosen, names, data.class_map)


class _Silent(SilentReporter):
    """Reporter of the processes that print nothing, as a context manager like that of the first."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...
