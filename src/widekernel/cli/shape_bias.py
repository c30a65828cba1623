"""The command `widekernel shape-bias`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse
from rich.table import Table

from widekernel.cli.console import progress, progress_console, table_console
from widekernel.cli.output_files import check_results_folder, make_folder
from widekernel.cli.parsing import new_parser, parse
from widekernel.errors import ConfigError, DataError
from widekernel.settings import require

if TYPE_CHECKING:
    from widekernel.analysis.shape_bias import Decision, ShapeBias
    from widekernel.data.image_files import ImageFiles

_DESCRIPTION = (
    "Measure whether ImageNet classifiers go by shape or by texture, on images whose shape and texture belong to different "
    "categories. Writes the decisions of each network in the columns of the original experiments, a table and a picture."
)


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("shape-bias", _DESCRIPTION, "[MODEL ...]")
    parser.add_argument(
        "models",
        type=str,
        nargs="*",
        help="model names, published checkpoints, run folders, files, or NAME=FILE for weights that do not name their model",
    )
    parser.add_argument(
        "--stimuli", type=str | None, default=None, help="folder or .tar archive of images such as cat1-dog2.png"
    )
    parser.add_argument(
        "--observers", type=str | None, default=None, help="folder with decisions of others (.csv), to compare with"
    )
    parser.add_argument("--output", type=str, default="shape-bias", help="folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in the folder")
    parser.add_argument("--pretrained", type=bool, default=False, help="load the pretrained weights of named models")
    parser.add_argument("--batch_size", type=int, default=32, help="images per forward pass")
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if available), cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: list[str]) -> int:
    """Measure the shape bias of the networks that `arguments` name, and print and write the results."""
    values = parse(make_parser(), arguments)
    require(values["batch_size"] > 0, "batch_size", values["batch_size"], "positive")
    folder = Path(values["output"])
    check_results_folder(folder, "shape_bias.json", values["overwrite"])
    _check_sources(values)
    from widekernel.analysis.shape_bias import decisions_file, read_decisions, shape_bias
    from widekernel.analysis.shape_bias_plot import plot
    from widekernel.files import write_file
    from widekernel.tasks.named_network import label_of

    others = [] if values["observers"] is None else _decision_files(Path(values["observers"]))
    observers = [shape_bias(*read_decisions(path)) for path in others]
    results: list[ShapeBias] = []
    for text in values["models"]:
        label = label_of(text).replace("/", "_")
        decisions = _decisions(text, values)
        make_folder(folder)
        write_file(folder / f"cue-conflict_{label}_session-1.csv", decisions_file(label, decisions))
        results.append(shape_bias(label, decisions))
    make_folder(folder)
    rows = [_row(result) for result in (*results, *observers)]
    write_file(folder / "shape_bias.json", json.dumps(rows, indent=1).encode())
    write_file(folder / "shape_bias.png", plot([*observers, *results], [result.observer for result in results]))
    if values["json"]:
        sys.stdout.write(json.dumps(rows) + "\n")
        return 0
    _print(results, observers, folder)
    return 0


def _check_sources(values: dict[str, Any]) -> None:
    """Raise an error if there is nothing to measure or to compare, or if results would have the same names."""
    from widekernel.tasks.named_network import label_of

    labels = [label_of(text) for text in values["models"]]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(f"Several models are called {repeated[0]!r}, so their results would have the same names.")
    if not values["models"] and values["observers"] is None:
        raise ConfigError("There is nothing to measure: name a model, or give decisions of others with --observers DIR.")
    if values["models"] and values["stimuli"] is None:
        raise ConfigError("--stimuli is not set; give the folder or .tar archive of the cue-conflict images.")


def _decision_files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.csv")) if folder.is_dir() else []
    if not found:
        raise DataError(f"{folder} is no folder with decisions (.csv files). Give the one that holds them as --observers.")
    return found


def _decisions(text: str, values: dict[str, Any]) -> list[Decision]:
    """Run a network on all stimuli, and return its decisions."""
    import torch

    from widekernel.analysis.shape_bias import NUM_CLASSES, Decision, decide, parse_name
    from widekernel.data.image_files import ImageFiles
    from widekernel.tasks.assembly import choose_device
    from widekernel.tasks.image_channels import input_channels, match_channels
    from widekernel.tasks.named_network import label_of, load_named

    device = choose_device(values["device"])
    source = ImageFiles(Path(values["stimuli"]))
    stimuli = [parse_name(name) for name in source.names]
    say = progress_console().print
    model, saved = load_named(text, values["pretrained"], lambda message: say(message, soft_wrap=True))
    if saved.num_classes != NUM_CLASSES:
        raise ConfigError(
            f"{text} has {saved.num_classes} outputs, but shape bias is measured with the {NUM_CLASSES} of ImageNet-1K."
        )
    transform = match_channels(saved.preprocessing.eval_transform(), input_channels(model))
    model.to(device)
    decisions: list[Decision] = []
    with progress(len(source)) as advance, torch.inference_mode():
        for start in range(0, len(source), values["batch_size"]):
            part = range(start, min(start + values["batch_size"], len(source)))
            images = torch.stack([transform(_loaded(source, index)) for index in part])
            responses = decide(model(images.to(device)).float().cpu())
            decisions += [Decision(stimuli[index], response) for index, response in zip(part, responses)]
            advance(label_of(text), len(part))
    return decisions


def _loaded(source: ImageFiles, index: int) -> Any:
    from widekernel.data.images import UnreadableImageError

    try:
        return source.load(index)
    except UnreadableImageError as error:  # a bias over other stimuli could not be compared
        raise DataError(f"{source.path}: {source.sample_name(index)} cannot be read: {error}. Restore the file.") from error


def _row(result: ShapeBias) -> dict[str, Any]:
    overall = result.overall
    return {
        "observer": result.observer,
        **dataclasses.asdict(overall),
        "shape_bias": overall.bias,
        "categories": {
            name: {**dataclasses.asdict(counts), "shape_bias": counts.bias} for name, counts in result.by_category.items()
        },
    }


def _print(results: list[ShapeBias], observers: list[ShapeBias], folder: Path) -> None:
    console = table_console()
    table = Table("", "shape bias", "for the shape", "for the texture", "neither", "stimuli")
    for column in table.columns[1:]:
        column.justify = "right"
    for result in (*results, *observers):
        counts = result.overall
        neither = counts.trials - counts.shape - counts.texture
        table.add_row(
            result.observer, f"{counts.bias:.3f}", *(str(n) for n in (counts.shape, counts.texture, neither, counts.trials))
        )
    console.print(table)
    for result in results:
        console.print(f"shape bias of {result.observer} by category of the shape")
        texts = [f"{name} {counts.bias:.2f}" for name, counts in result.by_category.items()]
        for start in range(0, len(texts), 8):
            console.print("  " + "  ".join(texts[start : start + 8]))
    console.print(f"decisions and picture: {folder}", soft_wrap=True)
