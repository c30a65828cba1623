"""Evaluation of a network that segments or detects, by one or several processes, with a progress bar."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from widekernel.cli.console import ConsoleReporter
from widekernel.data import LoaderOptions, Preprocessing
from widekernel.engine.evaluation import EvaluationOptions
from widekernel.engine.interrupts import InterruptGuard
from widekernel.engine.processes import Processes
from widekernel.engine.reporter import Reporter, SilentReporter
from widekernel.engine.stopping import Stopping
from widekernel.errors import CheckpointError
from widekernel.tasks.assembly import choose_device
from widekernel.tasks.dense_evaluation import (
    HeldOut,
    check_classes,
    evaluate_dense,
    held_out_detection,
    held_out_segmentation,
)
from widekernel.tasks.dense_parts import dense_preprocessing, is_whole
from widekernel.tasks.foreign_checkpoint import load_weights
from widekernel.tasks.loading import described_task, load
from widekernel.tasks.model_source import ModelSource
from widekernel.tasks.networks import build_detector, build_segmenter
from widekernel.tasks.run_parts import IMAGES


def evaluate_source(
    task: str, source: ModelSource, settings: dict[str, Any], how: tuple[int, str], processes: Processes
) -> tuple[dict[str, Any], HeldOut]:
    """Evaluate the network of `source` on the held-out split of a data set.

    Args:
        task: what the network does.
        source: the network.
        settings: sections `data`, `model` (for a file that does not describe its network) and, of segmentation, `test`.
        how: images per forward pass, and the device.
        processes: the processes that evaluate together.

    Returns:
        the metrics, and the data with their scores.

    Raises:
        WidekernelError: network or data cannot be used.
        Interrupted: a signal stopped the evaluation.
    """
    batch_size, device_name = how
    device = processes.device or choose_device(device_name)
    data = settings["data"]
    with ExitStack() as stack:
        reporter: Reporter = stack.enter_context(ConsoleReporter()) if processes.is_main else SilentReporter()
        guard = stack.enter_context(InterruptGuard())
        held_out = processes.main_first(
            lambda: held_out_segmentation(data, settings["test"]) if task == "segmentation" else held_out_detection(data)
        )
        model, shown = _network(task, source, settings, held_out, reporter)
        reporter.message(f"Evaluating on {data.format} in {data.root}.")
        for note in held_out.notes:
            reporter.message(note)
        stopping = Stopping(guard, processes)
        loading = LoaderOptions.configured(data, pin_memory=device.type == "cuda", notify=reporter.message)
        options = EvaluationOptions(
            device,
            data.max_unreadable,
            processes=processes,
            reporter=reporter,
            stop=stopping.now,
            nouns=IMAGES,
            size=held_out.size,
        )
        processes.note(0, "evaluating")
        found = evaluate_dense(model.to(device), held_out, shown, (loading, batch_size), options)
        if found is None:
            stopping.stop()
    assert found is not None
    return found, held_out


def _network(
    task: str, source: ModelSource, settings: dict[str, Any], held_out: HeldOut, reporter: Reporter
) -> tuple[nn.Module, Preprocessing]:
    """Load the network, and return it with how its images are normalized."""
    data = settings["data"]
    if described_task(source.path) is not None:
        model, saved = load(source, reporter.message, task)
        check_classes(saved.class_names, saved.num_classes, held_out.class_names)
        shown = saved.preprocessing
        return model, replace(shown, mean=data.mean or shown.mean, std=data.std or shown.std)
    config, classes = settings["model"], len(held_out.class_names)
    network: Any = (
        build_segmenter(config, classes) if task == "segmentation" else build_detector(config, classes, data.masks)
    )
    path = str(source.path)
    if not is_whole(network, path):
        raise CheckpointError(
            f"{path} holds no heads for {task}, so there is nothing to evaluate: train with --model.weights {path}."
        )
    report, _ = load_weights(network, path, reporter.message, weights=source.weights)
    reporter.message(str(report))
    return network.eval(), dense_preprocessing(data, network, 1)
