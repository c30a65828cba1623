"""The command `widekernel predict`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jsonargparse

from widekernel.cli.dense_eval import default_layers
from widekernel.cli.output_files import check_output_folder
from widekernel.cli.parsing import build, new_parser, parse, parse_given, typed
from widekernel.cli.task_choice import evaluated_task
from widekernel.errors import ConfigError
from widekernel.settings import require
from widekernel.tasks.config import FIRST_TASK, TASK
from widekernel.tasks.model_source import ModelSource, Weights
from widekernel.tasks.registry import task_entry

FLAGS = ("--json", "--overwrite", "-h", "--help")
"""Options without a value."""

_DESCRIPTION = {
    FIRST_TASK: "Classify images: print the likeliest classes of each, and draw a contact sheet. Run folders and files of "
    "networks that segment or detect are used as such.",
    "segmentation": "Segment images: write a map of classes and an overlay with a legend for each.",
    "detection": "Detect objects in images: draw them, and write them in the form of COCO's results.",
}
_DEFAULTS = " For a run folder, or a model file in one, the settings of the run are the defaults."

_DATA_SETTINGS = {
    FIRST_TASK: ("input_size", "interpolation", "crop_pct", "test_crop"),
    "segmentation": ("format", "classes", "image_scale", "test_scale", "test_ratios"),
    "detection": ("format", "masks", "image_scale", "size_divisor"),
}
_SHARED_DATA_SETTINGS = ("mean", "std", "exif_transpose", "workers")


def make_parser(task: str = FIRST_TASK) -> jsonargparse.ArgumentParser:
    """Return the parser of the command for networks of a task."""
    parser = new_parser("predict", _DESCRIPTION[task] + _DEFAULTS, "SOURCE IMAGES")
    parser.add_argument(
        "source",
        type=str,
        help="run folder, model file, name of published weights or of a model, or NAME=FILE for weights of the model NAME",
    )
    parser.add_argument("images", type=str, help="an image, a folder of images at any depth, or a .tar archive of them")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="folder for the results; default: predictions, but for classification nothing is written",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="use a folder that holds files already, and replace those of the same names"
    )
    parser.add_argument(
        "--weights", type=Weights, default="model", help="model: the trained weights; ema: their moving average"
    )
    parser.add_argument("--state", choices=["last", "best"], default="last", help="weights of a run folder: last or best")
    parser.add_argument(
        f"--{TASK}",
        type=str | None,
        default=None,
        help="what the network does, for a file that does not say it; --task segmentation --help lists the options for such "
        "networks",
    )
    parser.add_argument(
        "--recipe",
        type=str | None,
        default=None,
        help="recipe whose network, data and test settings are the defaults; `widekernel recipes` lists them",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if available), cpu, cuda or cuda:N")
    _add_of_task(parser, task)
    parser.add_argument("--json", action="store_true", help="print a JSON object for each image, one in each line")
    return parser


def _add_of_task(parser: jsonargparse.ArgumentParser, task: str) -> None:
    """Add the arguments that only networks of this task have."""
    if task == FIRST_TASK:
        parser.add_argument("--top", type=int, default=5, help="number of classes for each image")
        parser.add_argument("--batch_size", type=int, default=32, help="images per forward pass")
    if task == "detection":
        parser.add_argument(
            "--score_threshold",
            type=float,
            default=0.3,
            help="smallest score of the objects that are drawn and printed; detections.json holds all",
        )
    for key, kind in _sections(task).items():
        fields = {field.name for field in dataclasses.fields(kind)}
        kept = {*_DATA_SETTINGS[task], *_SHARED_DATA_SETTINGS} if key == "data" else fields
        parser.add_class_arguments(kind, key, skip=fields - kept)


def _sections(task: str) -> dict[str, Any]:
    """Return the classes of the settings of a run that a prediction takes, by their key."""
    kind = task_entry(task).settings_class()
    fields = {field.name: field.default_factory for field in dataclasses.fields(kind)}
    keys = ("data",) if task == FIRST_TASK else ("model", "data", "test")
    return {key: type(fields[key]()) for key in keys if key in fields}  # type: ignore[operator, misc]


def run(arguments: list[str]) -> int:
    """Predict for the images that `arguments` name, and print and write the results."""
    task = evaluated_task([_file_of(argument) for argument in arguments], FLAGS)
    values = _parse(task, arguments)
    if task == FIRST_TASK:
        for key in ("top", "batch_size"):
            require(values[key] > 0, key, values[key], "positive")
    if task == "detection":
        require(0 <= values["score_threshold"] <= 1, "score_threshold", values["score_threshold"], "from 0 to 1")
    if values["output"] is None and task != FIRST_TASK:
        values["output"] = "predictions"
    images = Path(values["images"])
    _check_output(values["output"], images, bool(values["overwrite"]))
    from widekernel.cli.predicting import PredictionRequest, predict

    request = PredictionRequest(
        task=task,
        source=str(values["source"]),
        images=images,
        output=None if values["output"] is None else Path(values["output"]),
        settings={key: build(kind, values[key], key) for key, kind in _sections(task).items()},
        values=values,
    )
    return predict(request)


def _file_of(argument: str) -> str:
    """Return FILE of an argument NAME=FILE, and any other argument unchanged."""
    name, separator, file = argument.partition("=")
    is_named = separator and not name.startswith("-") and not Path(argument).exists()
    return file if is_named and Path(file).exists() else argument


def _parse(task: str, arguments: list[str]) -> dict[str, Any]:
    """Parse arguments: the settings of the run or of the model file come first, then those of a recipe."""
    parser = make_parser(task)
    given = parse_given(parser, arguments)
    text = _file_of(given["source"])
    layers = default_layers(ModelSource(Path(text)), given.get("recipe"), _sections(task))
    known = {*_DATA_SETTINGS[task], *_SHARED_DATA_SETTINGS}
    for layer in layers:
        if "data" in layer:
            layer["data"] = {key: value for key, value in (layer["data"] or {}).items() if key in known}
    if text != given["source"] and task != FIRST_TASK:
        layers.append({"model": {"name": given["source"].partition("=")[0]}})
    values = parse(parser, arguments, layers)
    if "model" in values:
        values["model"]["args"] = typed(values["model"]["args"])
    return values


def _check_output(output: str | None, images: Path, overwrite: bool) -> None:
    """Raise a `ConfigError` unless the folder of the results can be used, before anything is computed."""
    if output is None:
        return
    folder = Path(output)
    check_output_folder(folder, "--output")
    if images.is_dir() and (folder.absolute().resolve() == images.resolve() or images.resolve() in folder.resolve().parents):
        raise ConfigError(
            f"--output is {output!r}, inside the folder of images {str(images)!r}, so that a later call would read the "
            "pictures as images. Choose another folder."
        )
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigError(f"{folder} holds files. Choose another --output, or add --overwrite.")
