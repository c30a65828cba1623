"""``widekernel eval``."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from widekernel.cli.console import ConsoleReporter, progress_console, results
from widekernel.cli.parsing import build, known_keys, new_parser, parse, settings_by_key, typed
from widekernel.data import DataConfig, EvaluationSamples, LoaderOptions, Share, evaluation_loader, open_split
from widekernel.data.config import require
from widekernel.tasks.assembly import choose_device
from widekernel.tasks.class_order import assumption, class_order
from widekernel.tasks.evaluation import Evaluation, EvaluationOptions, evaluate
from widekernel.tasks.loading import Source, Weights, load
from widekernel.tasks.saved import SavedModel
from widekernel.training.interrupts import Interrupted, InterruptGuard

_DESCRIPTION = (
    "Measure accuracy on the held-out split of a data set. The data settings of the run are the default for a run "
    "folder and for a model file in one."
)


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """How to evaluate.

    Args:
        batch_size: images per forward pass
        device: auto, cpu, cuda or cuda:N
    """

    batch_size: int = 128
    device: str = "auto"

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "batch_size", self.batch_size, "positive")


def run(arguments: list[str]) -> int:
    """Evaluate what ``arguments`` name and print the figures."""
    parser = new_parser("eval", _DESCRIPTION)
    add_source_arguments(parser)
    parser.add_class_arguments(EvalOptions, as_group=False)
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    values = parse(parser, arguments)
    folder = source_from(values).run_folder()
    if folder is not None:
        settings = {"data": folder.read_config().get("data") or {}}
        parser.set_defaults(settings_by_key(settings, known_keys(parser)))
        values = parse(parser, arguments)
    data = build(DataConfig, values["data"])
    options = build(EvalOptions, values)
    model, saved = load(source_from(values))
    try:
        result = evaluate_on(model, saved, data, options)
    except Interrupted as interruption:
        progress_console().print(f"Evaluation {interruption}.")
        return 128 + interruption.signal_number
    _print(result, values["json"])
    return 0


def add_source_arguments(parser: Any) -> None:
    """The arguments that name a model: run folder or file, and which of its weights."""
    parser.add_argument("source", type=str, help="run folder, or checkpoint file (.safetensors, .pth)")
    parser.add_argument("--weights", type=Weights, default="model", help="the weights, or their moving average")
    parser.add_argument("--state", choices=["last", "best"], default="last", help="which weights of a run folder")
    parser.add_argument("--model", type=str | None, default=None, help="model name, for a file that does not tell")
    parser.add_argument("--num_classes", type=int | None, default=None, help="outputs of that model")
    parser.add_argument("--model_args", type=dict[str, Any] | None, default=None, help="further arguments of that model")


def source_from(values: dict[str, Any]) -> Source:
    """The source that parsed arguments name."""
    return Source(
        Path(values["source"]),
        weights=values["weights"],
        state=values["state"],
        model=values["model"],
        model_args=typed(values["model_args"] or {}),
        num_classes=values["num_classes"],
    )


def evaluate_on(model: nn.Module, saved: SavedModel, data: DataConfig, options: EvalOptions) -> Evaluation:
    """Accuracy of ``model`` on the held-out split of ``data``, preprocessed as ``saved`` says unless ``data`` differs.

    Raises:
        WidekernelError: the data cannot be used, or has other classes.
        Interrupted: stopped by a signal.
    """
    device = choose_device(options.device)
    source = open_split(data, "val")
    order = class_order(saved, source.class_names)
    transform = saved.preprocessing.overridden_by(data).eval_transform()
    loading = LoaderOptions(options.batch_size, data.workers, pin_memory=device.type == "cuda")
    loader = evaluation_loader(EvaluationSamples(source, transform), loading, Share())
    with ConsoleReporter() as reporter, InterruptGuard() as guard:
        for note in filter(None, (*source.notes, assumption(saved, source.class_names))):
            reporter.message(note)
        how = EvaluationOptions(
            device, data.max_unreadable, order, reporter=reporter, stop=lambda: guard.received is not None
        )
        result = evaluate(model.to(device), loader, how)
    if result is None:
        raise Interrupted(guard.received or 0)
    return result


def _print(result: Evaluation, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(dataclasses.asdict(result)) + "\n")
        return
    console = results()
    console.print(f"top-1       {result.top1:.2f} %")
    console.print(f"top-5       {result.top5:.2f} %")
    console.print(f"loss        {result.loss:.4f}")
    console.print(f"images      {result.images}")
    console.print(f"unreadable  {result.unreadable}")
