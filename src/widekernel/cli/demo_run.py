"""Program of `widekernel demo`: train, evaluate, fold, save, reload, compare and plot a network on digits."""

import dataclasses
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from widekernel.cli.console import ConsoleReporter, progress_console, result_console
from widekernel.cli.demo_picture import PictureContent, draw
from widekernel.cli.train import parse_config
from widekernel.data import (
    DataConfig,
    EvaluationLoader,
    EvaluationSamples,
    ImageSource,
    LabeledImages,
    LoaderOptions,
    OnImage,
    Shard,
    open_split,
)
from widekernel.engine.interrupts import Interrupted
from widekernel.engine.metrics_log import read_metrics
from widekernel.errors import WidekernelError
from widekernel.tasks.classification.config import TrainConfig
from widekernel.tasks.classification.evaluation import Accuracy, EvaluationOptions, evaluate
from widekernel.tasks.classification.run import train
from widekernel.tasks.folding import fold_and_check
from widekernel.tasks.results import RunResult
from widekernel.tasks.saved import SavedModel, restore_model, save_model

RECIPE = "slak_nano_digits"
LATENCY_BATCH = 16
LATENCY_ROUNDS = 9


class DemoError(WidekernelError, RuntimeError):
    """Error for two forms of the network that disagree."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Results of one form of the network on the held-out digits.

    Args:
        name: name of the form
        model: the network
        top1: accuracy in percent
        predictions: predicted class of every digit `(n,)`
        targets: true classes `(n,)`
    """

    name: str
    model: nn.Module
    top1: float
    predictions: Tensor
    targets: Tensor


def show(output: str, seed: int) -> int:
    """Train a network in the folder `output` or reuse the run there, and show the rest; return the exit code."""
    config = parse_config(["--recipe", RECIPE, f"--output={output}", f"--seed={seed}"])
    assert isinstance(config, TrainConfig)
    started = time.perf_counter()
    try:
        with ConsoleReporter() as reporter:
            outcome = train(config, reporter)
    except Interrupted:
        progress_console().print("Stopped; the state is saved. The same command resumes the run.")
        raise
    console = result_console()
    if outcome.was_finished:
        console.print(f"The run in {outcome.folder.path} is already finished; its results are used.", soft_wrap=True)
    else:
        console.print(f"Trained {config.model.name} on digits in {time.perf_counter() - started:.0f} s.")
    _show(outcome, config.data, console)
    return 0


def _show(outcome: RunResult, data: DataConfig, console: Console) -> None:
    folder = outcome.folder
    dense, saved = restore_model(folder.model)
    folded, check = fold_and_check(dense, saved.preprocessing.input_size)
    console.print(f"Folding changes no output by more than {check.max_error:.2g} (outputs reach {check.max_output:.3g}).")
    paths = folder.path / "dense.safetensors", folder.path / "folded.safetensors"
    save_model(dense, paths[0], saved)
    save_model(folded, paths[1], dataclasses.replace(saved, form="folded"))
    digits = open_split(data, "val")
    forms = {
        "dense, as trained": dense,
        "folded": folded,
        "dense, reloaded": restore_model(paths[0])[0],
        "folded, reloaded": restore_model(paths[1])[0],
    }
    measured = [_measure(name, model, digits, saved) for name, model in forms.items()]
    latencies = _latencies([form.model for form in measured], saved.preprocessing.input_size)
    table = _table(measured, latencies, len(digits))
    console.print(table)
    _require_equal(measured)
    content = PictureContent(
        digits=[digits.load(index)[0] for index in range(len(digits))],
        class_names=saved.class_names,
        targets=measured[0].targets.tolist(),
        predictions=measured[1].predictions.tolist(),
        history=read_metrics(folder.metrics),
        metrics=outcome.metrics,
        dense=dense,
        folded=folded,
        rows=[(form.name, form.top1, latency) for form, latency in zip(measured, latencies, strict=True)],
    )
    picture = folder.path / "demo.png"
    draw(content, picture)
    console.print(f"Saved {paths[0]} and {paths[1]}", soft_wrap=True)
    console.print(f"Picture: {picture.resolve()}", soft_wrap=True)


def _measure(name: str, model: nn.Module, source: ImageSource, saved: SavedModel) -> Measured:
    predictions, targets = [], []

    def observe(logits: Tensor, wanted: Tensor) -> None:
        predictions.append(logits.argmax(1))
        targets.append(wanted)

    samples = EvaluationSamples(source, OnImage(saved.preprocessing.eval_transform()), LabeledImages.collate)
    loader = EvaluationLoader(samples, 90, LoaderOptions(), Shard())
    options = EvaluationOptions(torch.device("cpu"), max_unreadable=0)
    result = evaluate(model, loader, options, Accuracy(observe=observe))
    if result is None:
        raise DemoError("The evaluation was stopped.")
    return Measured(name, model, result.top1, torch.cat(predictions), torch.cat(targets))


def _latencies(models: list[nn.Module], size: int) -> list[float]:
    """Return the median milliseconds per image of each model; models take turns, so that a busy machine slows all alike."""
    images = torch.randn(LATENCY_BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(LATENCY_ROUNDS + 2):
            for model, taken in zip(models, times, strict=True):
                start = time.perf_counter()
                model(images)
                taken.append((time.perf_counter() - start) * 1e3 / LATENCY_BATCH)
    return [statistics.median(taken[2:]) for taken in times]  # the first two rounds warm up


def _table(measured: list[Measured], latencies: list[float], count: int) -> Table:
    table = Table("network", "parameters", "top-1 (%)", "ms per image", title=f"{count} held-out digits")
    for column in table.columns[1:]:
        column.justify = "right"
    for form, latency in zip(measured, latencies, strict=True):
        parameters = sum(parameter.numel() for parameter in form.model.parameters())
        table.add_row(form.name, f"{parameters:,}", f"{form.top1:.2f}", f"{latency:.2f}")
    table.caption = f"medians of {LATENCY_ROUNDS} batches of {LATENCY_BATCH}, timed in turn"
    return table


def _require_equal(measured: list[Measured]) -> None:
    first = measured[0]
    for form in measured[1:]:
        differing = int((form.predictions != first.predictions).sum())
        if form.top1 != first.top1 or differing:
            raise DemoError(
                f"The network ({form.name}) has {form.top1:.2f} % and the network ({first.name}) {first.top1:.2f} %, "
                f"with {differing} different predictions, but they must agree."
            )
