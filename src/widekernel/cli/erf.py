"""The command `widekernel erf`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse
from rich.table import Table

from widekernel.cli.console import progress, progress_console, table_console
from widekernel.cli.output_files import check_results_folder, make_folder
from widekernel.cli.parsing import new_parser, parse
from widekernel.errors import ConfigError, DataError, WidekernelError, in_short
from widekernel.files import reason_of
from widekernel.settings import require

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from widekernel.data.image_files import ImageFiles
    from widekernel.tasks.saved import SavedModel

_DESCRIPTION = (
    "Measure effective receptive fields: how much each pixel contributes to the center of the last feature map, and the "
    "areas that hold 20, 30, 50 and 99 % of it. Writes the matrices, a picture and a table."
)
_OFFICIAL_SIZE = 1024


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("erf", _DESCRIPTION, "MODEL [MODEL ...]")
    parser.add_argument(
        "models",
        type=str,
        nargs="+",
        help="model names, published checkpoints, run folders, files, NAME=FILE for weights that do not name their model, "
        "or matrices of scores (.npy)",
    )
    parser.add_argument("--data", type=str | None, default=None, help="folder or .tar archive of images, or one image")
    parser.add_argument("--images", type=int, default=50, help="number of images, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of images")
    parser.add_argument("--output", type=str, default="erf", help="folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in the folder")
    parser.add_argument(
        "--input_size",
        type=int,
        default=_OFFICIAL_SIZE,
        help="height and width of the input in pixels, to which images are warped",
    )
    parser.add_argument(
        "--layer", type=str | None, default=None, help="module that computes the feature map; default: the last one"
    )
    parser.add_argument("--pretrained", type=bool, default=False, help="load the pretrained weights of named models")
    parser.add_argument(
        "--fold", type=bool, default=True, help="fold our networks first: the same function in less time and memory"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if available), cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: list[str]) -> int:
    """Measure the fields that `arguments` ask for, and print and write the results."""
    values = parse(make_parser(), arguments)
    for key in ("images", "input_size"):
        require(values[key] > 0, key, values[key], "positive")
    require(values["seed"] >= 0, "seed", values["seed"], "0 or more")
    folder = Path(values["output"])
    check_results_folder(folder, "erf.json", values["overwrite"])
    _check_names(values)
    from widekernel.analysis.erf import THRESHOLDS, Area, area_ratios, heat_maps
    from widekernel.files import write_file

    matrices: dict[str, np.ndarray] = {}
    rows: dict[str, dict[str, Any]] = {}
    for text in values["models"]:
        label = _label(text)
        matrices[label], rows[label] = _read(Path(text)) if text.endswith(".npy") else _measured(text, values)
        areas = area_ratios(matrices[label])
        rows[label]["areas"] = {str(key): None if area is None else area._asdict() for key, area in areas.items()}
        make_folder(folder)
        if not text.endswith(".npy"):
            write_file(folder / f"{label}.npy", _npy(matrices[label]))
    write_file(folder / "erf.png", heat_maps(matrices))
    write_file(folder / "erf.json", json.dumps(rows, indent=1).encode())
    if values["json"]:
        sys.stdout.write(json.dumps(rows) + "\n")
        return 0
    console = table_console()
    table = Table("", *(f"{100 * threshold:g} %" for threshold in THRESHOLDS), "images")
    for label, row in rows.items():
        cells = ["-" if area is None else Area(**area).percentage for area in row["areas"].values()]
        table.add_row(label, *cells, str(row.get("images", "")))
    console.print(table)
    console.print("area of the smallest centered square with more than the given share of the scores")
    console.print(f"matrices and picture: {folder}", soft_wrap=True)
    return 0


def _check_names(values: dict[str, Any]) -> None:
    """Raise an error for models that would overwrite each other's results, and for missing images."""
    labels = [_label(text) for text in values["models"]]
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise ConfigError(f"Several models are called {repeated[0]!r}, so their results would have the same names.")
    if values["data"] is None and not all(text.endswith(".npy") for text in values["models"]):
        raise ConfigError("--data is not set; give a folder or a .tar archive of images (--data DIR).")


def _label(text: str) -> str:
    from widekernel.tasks.named_network import label_of

    return Path(text).stem if text.endswith(".npy") else label_of(text).replace("/", "_")


def _read(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Read a matrix of scores that this command or the authors' script has written."""
    import numpy as np

    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "it is not a NumPy file of numbers"
        raise DataError(f"{path} cannot be read as a matrix of scores: {reason}.") from error
    return matrix, {"matrix": str(path)}


def _measured(text: str, values: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    from widekernel.analysis.erf import contribution
    from widekernel.data.image_files import ImageFiles
    from widekernel.tasks.assembly import choose_device
    from widekernel.tasks.named_network import load_named

    say = progress_console().print
    device = choose_device(values["device"])
    source = ImageFiles(Path(values["data"]))
    if len(source) < values["images"]:
        say(f"{source.path} holds {len(source)} images; all of them are used, instead of {values['images']}.")
    model, saved = load_named(text, values["pretrained"], lambda message: say(message, soft_wrap=True))
    model = _folded(model, saved) if values["fold"] else model
    count = min(values["images"], len(source))
    with progress(count) as advance:
        advance(f"{_label(text)}", 0)
        images = _images(source, count, values, _transform(model, saved, values["input_size"]))
        try:
            found = contribution(model.to(device), images, values["layer"], lambda: advance(_label(text), 1))
        except WidekernelError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            # Networks of other libraries raise anything for an input size that they do not take.
            size, own = values["input_size"], saved.preprocessing.input_size
            raise ConfigError(
                f"{_label(text)} fails on images of {size}×{size} pixels ({in_short(error).rstrip('.')}). Choose another "
                f"--input_size; its own is {own}."
            ) from error
    return found.matrix, {"images": found.images, "skipped": found.skipped, "input_size": values["input_size"]}


def _folded(model: nn.Module, saved: SavedModel) -> nn.Module:
    import widekernel
    from widekernel.models.base import StagedConvNet

    return widekernel.fold(model) if isinstance(model, StagedConvNet) and saved.form != "folded" else model


def _transform(model: nn.Module, saved: SavedModel, size: int) -> Any:
    """Return the transform of images: warped to the square, and normalized as the network expects."""
    from widekernel.tasks.image_channels import input_channels, match_channels

    return match_channels(saved.preprocessing.warped(size).eval_transform(), input_channels(model))


def _images(source: ImageFiles, count: int, values: dict[str, Any], transform: Any) -> Iterator[Tensor]:
    """Yield `count` readable images in a random order, one after another."""
    from widekernel.data.image_files import draw

    def report(index: int, error: Exception) -> None:
        progress_console().print(f"Left out an unreadable image: {source.sample_name(index)}: {error}", soft_wrap=True)

    found = False
    for _, image in draw(source, count, values["seed"], report):
        found = True
        yield transform(image)
    if not found:
        raise DataError(f"None of the images of {source.path} can be read. Give other images (--data DIR).")


def _npy(matrix: np.ndarray) -> bytes:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, matrix)
    return buffer.getvalue()
