"""The command `widekernel export`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse
from rich.table import Table

from widekernel.cli.console import progress_console, table_console
from widekernel.cli.output_files import check_output_file
from widekernel.cli.parsing import new_parser, parse
from widekernel.errors import ConfigError
from widekernel.settings import require

if TYPE_CHECKING:
    from torch import nn

    from widekernel.export import CheckImages, ExportReport, ExportSettings, Format
    from widekernel.tasks.saved import SavedModel

_DESCRIPTION = (
    "Write a network for onnxruntime, OpenVINO, or PyTorch without widekernel. The file is compared with PyTorch on images "
    "before it takes its place, and a report is written beside it, with its name and .json appended."
)


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("export", _DESCRIPTION, "MODEL")
    parser.add_argument(
        "model",
        type=str,
        help="model name, published checkpoint, run folder, file, or NAME=FILE for weights that do not name their model",
    )
    parser.add_argument("--format", type=str, required=True, help="onnx, openvino or torch-export")
    parser.add_argument("--output", type=str | None, default=None, help="file to write; default: named after the model")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--fold", type=bool, default=True, help="merge branches and batch norms first")
    dynamic = "accept any number of images instead of --batch_size"
    parser.add_argument("--dynamic_batch", "--dynamic-batch", type=bool, default=False, help=dynamic)
    sizes = "accept images of any height and width instead of --input_size"
    parser.add_argument("--dynamic_size", "--dynamic-size", type=bool, default=False, help=sizes)
    parser.add_argument("--batch_size", type=int, default=1, help="number of images in an input")
    parser.add_argument("--input_size", type=int | None, default=None, help="pixels; default: the model's own")
    parser.add_argument("--half", action="store_true", help="store the weights in float16; inputs and outputs stay float32")
    parser.add_argument("--int8", action="store_true", help="quantize to 8 bits, calibrated with images of --data")
    kernels = "strips, dense, or auto: sums of rectangles as the engine computes them faster"
    parser.add_argument("--kernels", type=str, default="auto", help=kernels)
    parser.add_argument(
        "--data", type=str | None, default=None, help="folder or .tar archive of images for the check; default: noise"
    )
    parser.add_argument("--images", type=int, default=50, help="number of images for the check, drawn at random")
    calibration = "number of other images that --int8 is calibrated with"
    parser.add_argument("--calibration_images", type=int, default=200, help=calibration)
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of images")
    parser.add_argument("--pretrained", type=bool, default=False, help="load the pretrained weights of a named model")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def run(arguments: list[str]) -> int:
    """Export the network that `arguments` name, and print what was written and how it compares with PyTorch."""
    values = parse(make_parser(), arguments)
    for key in ("images", "calibration_images", "batch_size"):
        require(values[key] > 0, key, values[key], "positive")
    require(values["seed"] >= 0, "seed", values["seed"], "0 or more")
    size = values["input_size"]
    require(size is None or size > 0, "input_size", size, "positive")
    from widekernel.export import ExportSettings, export, format_named
    from widekernel.export.exporting import report_file

    settings = ExportSettings(
        values["format"],
        values["fold"],
        values["dynamic_batch"],
        values["dynamic_size"],
        values["half"],
        values["int8"],
        values["kernels"],
        values["batch_size"],
    )
    form = format_named(settings.format)
    form.require_packages(settings.int8)
    if settings.int8 and values["data"] is None:
        raise ConfigError("--int8 needs images to calibrate with. Give a folder or a .tar archive of them (--data DIR).")
    path = Path(values["output"]) if values["output"] else _default_output(values["model"], settings, form)
    beside = (*form.files(path)[:-1], report_file(path))
    check_output_file(path, f"{form.name} exports", Path(values["model"]), values["overwrite"], beside, form.suffix)
    model, saved = _loaded(values)
    report = export(model, path, settings, saved, _images(model, saved, values, settings.int8))
    if values["json"]:
        sys.stdout.write(json.dumps(report.to_dict(), default=str) + "\n")
        return 0
    _print(report, form, report_file(path))
    return 0


def _default_output(text: str, settings: ExportSettings, form: Format) -> Path:
    from widekernel.tasks.named_network import label_of

    kind = {"float32": "", "float16": "_half", "int8": "_int8"}[settings.precision]
    return Path(re.sub(r"[^\w.-]", "_", label_of(text)) + kind + form.suffix)


def _loaded(values: dict[str, Any]) -> tuple[nn.Module, SavedModel]:
    """Load the network, with the input size that was asked for in its description."""
    from dataclasses import replace

    from widekernel.data import DataConfig
    from widekernel.tasks.named_network import load_named

    say = progress_console().print
    model, saved = load_named(values["model"], values["pretrained"], lambda message: say(message, soft_wrap=True))
    if values["input_size"] is not None:
        size = DataConfig(input_size=values["input_size"])
        saved = replace(saved, preprocessing=saved.preprocessing.overridden_by(size))
    return model, saved


def _images(model: nn.Module, saved: SavedModel, values: dict[str, Any], int8: bool) -> CheckImages:
    """Return images for the check, and for quantization if wanted: those of --data, or noise."""
    from widekernel.export.images import noise_images, read_images
    from widekernel.tasks.image_channels import input_channels, match_channels

    channels = input_channels(model)
    if values["data"] is None:
        return noise_images(values["images"], channels, saved.preprocessing.input_size, values["seed"])
    say = progress_console().print
    return read_images(
        Path(values["data"]),
        match_channels(saved.preprocessing.eval_transform(), channels),
        values["images"],
        values["calibration_images"] if int8 else 0,
        values["seed"],
        lambda message: say(message, soft_wrap=True),
    )


def _print(report: ExportReport, form: Format, report_path: Path) -> None:
    console, found, settings = table_console(), report.comparison, report.settings
    for path in report.files:
        console.print(f"{path}  {path.stat().st_size / 1e6:.1f} MB", soft_wrap=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    of = "" if report.source == "seeded noise" else "images of "
    table.add_row("network", f"{report.form} form, {settings.precision}{_kernels(report.kernels)}")
    table.add_row("compared with PyTorch", f"on {found.images} images: {of}{report.source}")
    table.add_row("largest difference", f"{found.max_difference:.2g} of the largest output")
    if found.agreement is not None:
        table.add_row("same top class", f"{100 * found.agreement:.1f} % of the images")
    if found.accuracy is not None:
        before, after = (100 * share for share in found.accuracy)
        table.add_row("accuracy", f"{before:.1f} % in PyTorch, {after:.1f} % in {form.engine}")
    for shape, difference in report.probes.items():
        table.add_row(f"input of {shape}", f"{difference:.2g} of the largest output, noise")
    if settings.int8:
        twice = f", {report.shared_images} of which are also in the check" if report.shared_images else ""
        table.add_row("calibrated", f"with {report.calibration_images} images{twice}")
    times = ", ".join(f"{engine} {time:.2f} ms" for engine, time in report.milliseconds.items())
    table.add_row(f"latency of {settings.batch} images" if settings.batch > 1 else "latency of one image", times)
    threads = report.machine["threads"]
    table.add_row("measured on", f"{report.machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}")
    console.print(table)
    console.print(f"report: {report_path}", soft_wrap=True)


def _kernels(forms: dict[str, int]) -> str:
    parts = ", ".join(f"{form} {count}" for form, count in forms.items())
    return f"; large kernels: {parts}" if parts else ""
