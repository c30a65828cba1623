"""Evaluation of a network on held-out data by one or several processes; every sample counts exactly once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from widekernel.data.batches import Unreadable
from widekernel.data.loading import EvaluationLoader
from widekernel.engine.error_context import INPUT_SIZE, LoadingError, NetworkError, errors_as
from widekernel.engine.processes import Processes
from widekernel.engine.reporter import Reporter, SilentReporter
from widekernel.engine.task import Evaluator
from widekernel.engine.unreadable import SAMPLES, check_unreadable
from widekernel.errors import DataError
from widekernel.layers.training_modes import training_modes_restored


@dataclass(frozen=True)
class EvaluationOptions:
    """Settings of an evaluation.

    Args:
        device: device of the model
        max_unreadable: largest number of unreadable samples that is accepted
        processes: the processes that evaluate together
        reporter: receives progress and messages
        stop: called between batches, equally often in all processes; if true, the evaluation ends without a result
        memory_format: memory format of images
        nouns: what messages call one sample, and several
        size: setting of the size of the images, for messages
        announce: told which weights are evaluated next
    """

    device: torch.device
    max_unreadable: int
    processes: Processes = field(default_factory=Processes)
    reporter: Reporter = field(default_factory=SilentReporter)
    stop: Callable[[], bool] = lambda: False
    memory_format: torch.memory_format = torch.contiguous_format
    nouns: tuple[str, str] = SAMPLES
    size: str = INPUT_SIZE
    announce: Callable[[str], None] = lambda name: None


def evaluate(
    model: nn.Module, loader: EvaluationLoader, evaluator: Evaluator, options: EvaluationOptions, name: str = ""
) -> dict[str, float] | None:
    """Evaluate `model` in evaluation mode and full precision, and restore the mode of every module afterwards.

    Args:
        model: network to evaluate.
        loader: batches of this process.
        evaluator: adds up the results.
        options: settings of the evaluation.
        name: name of the weights in messages, such as "averaged weights".

    Returns:
        the metrics, and `val_unreadable`, the number of samples that could not be read; `None` if `options.stop()` became
        true.

    Raises:
        DataError: no sample could be read.
        NetworkError: the network fails on the data.
        TrainingError: more than `max_unreadable` samples could not be read.
    """
    options.reporter.start_evaluation(len(loader), name)
    unreadable: set[str] = set()
    readable = torch.zeros(1, dtype=torch.float64)
    with training_modes_restored(model), torch.inference_mode():
        model.eval()
        batches = iter(loader)
        # To stop together, all processes must call `stop` equally often.
        for number in range(loader.most_batches):
            if options.stop():
                return None
            with errors_as(LoadingError, f"Loading batch {number + 1} of the evaluation"):
                batch = next(batches, None)
            if batch is None:
                continue
            _note_unreadable(batch.unreadable, unreadable, options)
            if batch.size:
                with errors_as(NetworkError, "Evaluating the network", options.size):
                    evaluator.update(model, batch.to(options.device, options.memory_format))
                readable += batch.size
            options.reporter.evaluated(1)
        unreadable = options.processes.union(unreadable)
        check_unreadable(unreadable, options.max_unreadable, "evaluation", options.nouns[1])
        if not options.processes.sum(readable).item():
            raise DataError(f"None of the {len(unreadable)} {options.nouns[1]} could be read. Check the data set.")
        evaluator.reduce(options.processes)
    return {**evaluator.result(), "val_unreadable": len(unreadable)}


def evaluate_all(
    networks: Mapping[str, nn.Module],
    loader: EvaluationLoader,
    evaluator: Callable[[], Evaluator],
    options: EvaluationOptions,
) -> dict[str, float] | None:
    """Evaluate several networks, whose buffers all processes take from process 0; otherwise as `evaluate`.

    Args:
        networks: the networks by the prefix of their metrics: "" for the weights, "ema_" for averaged ones.
        loader: batches of this process.
        evaluator: creates an evaluator.
        options: settings of the evaluation.

    Returns:
        the metrics of all networks, by prefix and name; `None` if `options.stop()` became true.
    """
    values: dict[str, float] = {}
    for prefix, network in networks.items():
        name = "averaged weights" if prefix else "weights"
        options.processes.synchronize_buffers(network)
        options.announce(name)
        found = evaluate(network, loader, evaluator(), options, name)
        if found is None:
            return None
        values.update({f"{prefix}{key}": value for key, value in found.items()})
    return values


def _note_unreadable(samples: tuple[Unreadable, ...], seen: set[str], options: EvaluationOptions) -> None:
    for sample in samples:
        options.reporter.message(f"Left out an unreadable {options.nouns[0]}: {sample}")
        seen.add(sample.name)
    check_unreadable(seen, options.max_unreadable, "evaluation", options.nouns[1])
