"""The command `widekernel report`."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import jsonargparse

from widekernel.cli.console import progress_console, progress_of_stages, result_console
from widekernel.cli.output_files import check_output_folder, make_folder
from widekernel.cli.parsing import build, new_parser, parse
from widekernel.data.paths import expand_path
from widekernel.errors import ConfigError
from widekernel.report.parts import ReportOptions

_DESCRIPTION = (
    "Write everything that can be known about a network to one HTML page, which needs no other file and no network: "
    "weights, training, accuracy, receptive field, kernels, masks, complexity, speed on this machine, and a comparison."
)
_MOST_BYTES = 5_000_000
"""Largest size of a page that is worth no warning."""


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("report", _DESCRIPTION, "SOURCE")
    parser.add_argument(
        "source",
        type=str,
        help="run folder, checkpoint file, model name, published checkpoint, or NAME=FILE for weights that do not name "
        "their model",
    )
    parser.add_argument("--compare", type=str | None, default=None, help="another network, named in the same ways")
    parser.add_argument(
        "--data",
        type=str | None,
        default=None,
        help="held-out images: a folder of class folders, or a .tar archive of them; without classes, they serve all but "
        "the accuracy. Default: those that the settings of the run name",
    )
    parser.add_argument("--output", type=str, default="report.html", help="the page")
    parser.add_argument(
        "--json", type=str | None, default=None, help="file for the data of the page, pictures excepted; default: none"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page and an existing --json file")
    parser.add_argument(
        "--weights", choices=["model", "ema"], default="model", help="of a run: the trained weights, or their moving average"
    )
    parser.add_argument("--pretrained", type=bool, default=False, help="load the pretrained weights of named models")
    parser.add_class_arguments(ReportOptions, as_group=False)
    return parser


def run(arguments: list[str]) -> int:
    """Collect the data of a network, and write the page."""
    values = parse(make_parser(), arguments)
    options = build(ReportOptions, values)
    page = Path(values["output"])
    _check(page, values["overwrite"], "--output", "a report is an .html file", (".html", ".htm"))
    data_file = None if values["json"] is None else Path(values["json"])
    if data_file is not None:
        _check(data_file, values["overwrite"], "--json", "the data of a report are a .json file", (".json",))
    data = None if values["data"] is None else expand_path("data", values["data"])
    from widekernel.files import write_file
    from widekernel.report.collecting import collect
    from widekernel.report.images import find_images
    from widekernel.report.page import check_packages, render_page
    from widekernel.report.plain_data import plain_data
    from widekernel.report.subject import open_subject

    check_packages()

    def say(text: str) -> None:
        progress_console().print(text, soft_wrap=True)

    subject = open_subject(values["source"], values["pretrained"], values["weights"], say)
    other = None
    if values["compare"] is not None:
        other = open_subject(expand_path("compare", values["compare"]), values["pretrained"], notify=say)
    images = find_images(subject, data)
    with progress_of_stages() as advance:
        report = collect(subject, images, options, other, advance)
    text = render_page(report, shlex.join(["widekernel", "report", *arguments])).encode(errors="backslashreplace")
    make_folder(page.parent)
    write_file(page, text)
    if data_file is not None:
        make_folder(data_file.parent)
        write_file(data_file, (json.dumps(plain_data(report), indent=1, allow_nan=False) + "\n").encode())
    if len(text) > _MOST_BYTES:
        say(f"The page has {len(text) / 1e6:.1f} MB, which is more than usual.")
    result_console().print(f"{page} ({len(text) / 1e3:,.0f} kB)", soft_wrap=True)
    if data_file is not None:
        result_console().print(f"{data_file}", soft_wrap=True)
    return 0


def _check(file: Path, overwrite: bool, option: str, rule: str, suffixes: tuple[str, ...]) -> None:
    """Raise a `ConfigError` unless the file can be written and nothing is lost."""
    if file.is_dir():
        raise ConfigError(f"{option} is {str(file)!r}, which is a folder. Give it a file, such as report{suffixes[0]}.")
    if file.suffix.lower() not in suffixes:
        raise ConfigError(f"{option} is {str(file)!r}, but {rule}.")
    if file.exists() and not overwrite:
        raise ConfigError(f"{file} exists. Choose another {option}, or add --overwrite.")
    check_output_folder(file.parent, option)
    if file.exists() and not os.access(file, os.W_OK):
        raise ConfigError(f"{file} cannot be written. Choose another {option}.")
