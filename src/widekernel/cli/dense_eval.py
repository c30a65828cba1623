"""The command `widekernel eval` for networks that segment or detect."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse
from rich.table import Table

from widekernel.cli.console import progress_console, result_console, table_console
from widekernel.cli.launching import check_number, is_first, is_started, start
from widekernel.cli.parsing import build, new_parser, parse, parse_given, typed
from widekernel.engine.interrupts import Interrupted
from widekernel.errors import ConfigError
from widekernel.recipes import load_recipe, recipe_of_checkpoint
from widekernel.settings import require
from widekernel.tasks.config import TASK
from widekernel.tasks.model_source import ModelSource, Weights
from widekernel.tasks.registry import task_entry
from widekernel.weights.catalog import is_published

if TYPE_CHECKING:
    from widekernel.tasks.dense_evaluation import HeldOut

_DESCRIPTION = {
    "segmentation": "Measure mIoU and pixel accuracy on the held-out split of a data set, with a table of the classes.",
    "detection": "Measure the average precision (COCO) on the held-out split of a data set, with a table of the classes.",
}
_COLUMNS = {
    "name": "class", "iou": "IoU", "accuracy": "Acc", "pixels": "pixels", "objects": "objects",
    "box_ap": "box AP", "box_ap50": "box AP50", "box_ap75": "box AP75",
    "mask_ap": "mask AP", "mask_ap50": "mask AP50", "mask_ap75": "mask AP75",
}  # fmt: skip
"""Headings of the table of classes, by the field of its lines."""

_DEFAULTS = (
    " For a run folder, or a model file in one, the settings of the run are the defaults; for published weights, those of "
    "their recipe."
)


@dataclasses.dataclass(frozen=True)
class DenseEvalOptions:
    """Settings of an evaluation.

    Args:
        batch_size: images per forward pass; published results are those of single images
        device: auto (CUDA if available), cpu, cuda or cuda:N
    """

    batch_size: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "batch_size", self.batch_size, "positive")


def make_parser(task: str) -> jsonargparse.ArgumentParser:
    """Return the parser of the command for networks of a task."""
    parser = new_parser("eval", _DESCRIPTION[task] + _DEFAULTS, "SOURCE")
    parser.add_argument(
        "source", type=str, help="run folder, checkpoint file (.safetensors, .pth), or name of published weights"
    )
    parser.add_argument(
        "--weights", type=Weights, default="model", help="model: the trained weights; ema: their moving average"
    )
    parser.add_argument("--state", choices=["last", "best"], default="last", help="weights of a run folder: last or best")
    parser.add_argument(
        f"--{TASK}", type=str | None, default=None, help="what the network does, for a file that does not say it"
    )
    parser.add_argument(
        "--recipe",
        type=str | None,
        default=None,
        help="recipe whose network, data and test settings are the defaults; `widekernel recipes` lists them",
    )
    parser.add_argument(
        "--processes",
        type=int | None,
        default=None,
        help="processes on this machine that evaluate together; on GPUs, one for each",
    )
    parser.add_class_arguments(DenseEvalOptions, as_group=False)
    for section, kind in _sections(task).items():
        parser.add_class_arguments(kind, section)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _sections(task: str) -> dict[str, Any]:
    """Return the classes of the settings of a run that an evaluation takes, by their key."""
    kind = task_entry(task).settings_class()
    fields = {field.name: field.default_factory for field in dataclasses.fields(kind)}
    return {key: type(fields[key]()) for key in ("model", "data", "test") if key in fields}  # type: ignore[operator, misc]


def run(task: str, arguments: list[str]) -> int:
    """Evaluate the network of a task that `arguments` name, and print the results."""
    values = _parse(task, arguments)
    options = build(DenseEvalOptions, values)
    processes = values["processes"]
    if processes is not None and not is_started(processes):
        check_number(processes)
        return start("eval", arguments, processes)
    from widekernel.cli.dense_evaluation import evaluate_source
    from widekernel.engine.joining import joined_processes

    source = ModelSource(Path(values["source"]), values["weights"], values["state"])
    settings = {key: build(kind, values[key], key) for key, kind in _sections(task).items()}
    with joined_processes(options.device) as joined:
        try:
            found, held_out = evaluate_source(task, source, settings, (options.batch_size, options.device), joined)
        except Interrupted as interruption:
            if joined.is_main:
                progress_console().print(f"Evaluation {interruption}.")
            raise
    if is_first():
        _print(found, held_out, bool(values["json"]))
    return 0


def _parse(task: str, arguments: list[str]) -> dict[str, Any]:
    """Parse arguments: the settings of the run, file or published weights come first, then those of a recipe."""
    parser = make_parser(task)
    given = parse_given(parser, arguments)
    layers = default_layers(ModelSource(Path(given["source"])), given.get("recipe"), _sections(task))
    _refuse_model(Path(given["source"]), given.get("model") or {})
    values = parse(parser, arguments, layers)
    values["model"]["args"] = typed(values["model"]["args"])
    return values


def default_layers(source: ModelSource, recipe: str | None, sections: Collection[str]) -> list[dict[str, Any]]:
    """Return what is known of a source, and the settings of a recipe, which come before those of the command line.

    Args:
        source: the network.
        recipe: name of the recipe.
        sections: keys of the sections that count.
    """
    layers = [_of_source(source)]
    if recipe is not None:
        layers.append(load_recipe(recipe).settings_for("train"))
    return [{key: value for key, value in layer.items() if key in sections} for layer in layers]


def _of_source(source: ModelSource) -> dict[str, Any]:
    """Return the settings that are known of a source: those of its run, of its file, or of the recipe that made it."""
    name = str(source.path)
    if is_published(name) and not source.path.exists():
        recipe = recipe_of_checkpoint(name)
        # The network gets all its weights from the published file.
        return {} if recipe is None else {**recipe.settings, "model": {**recipe.settings["model"], "weights": None}}
    folder = source.run_folder()
    return _described(source.path) if folder is None else folder.read_config()


def _refuse_model(path: Path, given: dict[str, Any]) -> None:
    """Raise a `ConfigError` if settings of the network are given for one that is described where it is stored."""
    from widekernel.tasks.loading import described_task

    if given and described_task(path) is not None:
        names = " and ".join(f"--model.{key}" for key in given)
        raise ConfigError(f"{names} cannot be used with {path}, which describes its network: leave it out.")


def _described(path: Path) -> dict[str, Any]:
    """Return the settings of evaluation in a model file; {} for any other file."""
    from widekernel.errors import CheckpointError
    from widekernel.tasks.saved import read_saved

    if path.suffix != ".safetensors" or not path.exists():
        return {}
    try:
        details = read_saved(path).details
    except CheckpointError:
        return {}
    return {key: details[key] for key in ("data", "test") if key in details}


def _print(found: dict[str, Any], held_out: HeldOut, as_json: bool) -> None:
    lines = held_out.scores.table()
    if as_json:
        classes = [{key: _number(value) for key, value in dataclasses.asdict(line).items()} for line in lines]
        values = {key.removeprefix("val_"): _number(value) for key, value in found.items()}
        sys.stdout.write(json.dumps({**values, "classes": classes}) + "\n")
        return
    rows = [dataclasses.asdict(line) for line in lines]
    measured = [key for key in (rows[0] if rows else ()) if not all(_number(row[key]) is None for row in rows)]
    table = Table(*(_COLUMNS[key] for key in measured))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*(_cell(row[key]) for key in measured))
    table_console().print(table)
    console = result_console()
    width = max(len(metric.label) for metric in held_out.metrics)
    width = max(width, len("unreadable")) + 2
    for metric in held_out.metrics:
        value = found[metric.name]
        console.print(f"{metric.label:<{width}}{'-' if math.isnan(value) else metric.text(value)}")
    console.print(f"{'unreadable':<{width}}{found['val_unreadable']}")


def _cell(value: Any) -> str:
    """Return a value for the table: percentages with two digits after the point, whole numbers in groups of three digits."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _number(value: Any) -> Any:
    """Return a value for JSON, which has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value
