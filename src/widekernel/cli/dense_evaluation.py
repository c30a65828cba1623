"""Evaluation of a network that segments or detects, by one or several processes, with a progress bar."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from widekernel.cli.console import ConsoleReporter
from widekernel.data import LoaderOptions
from widekernel.engine.evaluation import EvaluationOptions
from widekernel.engine.interrupts import InterruptGuard
from widekernel.engine.processes import Processes
from widekernel.engine.reporter import Reporter, SilentReporter
from widekernel.engine.stopping import Stopping
from widekernel.tasks.assembly import choose_device
from widekernel.tasks.dense_evaluation import (
    HeldOut,
    check_classes,
    evaluate_dense,
    held_out_detection,
    held_out_segmentation,
)
from widekernel.tasks.dense_network import load_dense_network
from widekernel.tasks.model_source import ModelSource
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
        names = held_out.class_names
        network = load_dense_network(task, source, settings, lambda: len(names), reporter.message)
        if network.saved is not None:
            check_classes(network.saved.class_names, network.saved.num_classes, names)
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
        found = evaluate_dense(network.model.to(device), held_out, network.preprocessing, (loading, batch_size), options)
        if found is None:
            stopping.stop()
    assert found is not None
    return found, held_out
