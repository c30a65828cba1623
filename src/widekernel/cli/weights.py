"""The command `widekernel weights`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import jsonargparse
from rich.progress import Progress
from rich.table import Table
from typing_extensions import override

from widekernel.cli.console import download_bar, progress_console, result_console, table_console
from widekernel.cli.parsing import new_parser, parse
from widekernel.errors import ConfigError, nearest
from widekernel.recipes import recipe_of_checkpoint
from widekernel.weights import Checkpoint, Listener, cached_file, fetch, find_checkpoint, list_checkpoints

_DESCRIPTION = (
    "List the authors' published weights; with NAME, show one of them, or download it with --fetch. The names are those of "
    "timm.create_model(NAME, pretrained=True) and widekernel.load_checkpoint(model, NAME)."
)
_METRICS = {"top1": "top-1", "mIoU_ss": "mIoU", "box_AP": "box AP", "mask_AP": "mask AP"}


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("weights", _DESCRIPTION, "[NAME]")
    parser.add_argument("name", type=str | None, nargs="?", default=None, help="name of the weights: replknet_31b.in1k_224")
    parser.add_argument("--model", type=str, default="*", help="list only networks whose names match, such as slak*")
    parser.add_argument(
        "--task",
        type=Literal["classification", "segmentation", "detection"] | None,
        default=None,
        help="list only weights for this task: classification, segmentation or detection",
    )
    parser.add_argument(
        "--fetch", action="store_true", help="download the weights NAME, if they are not here, and print the path"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: a list, or one object for NAME")
    return parser


def run(arguments: list[str]) -> int:
    """List the published weights, or show or fetch some."""
    values = parse(make_parser(), arguments)
    if values["name"] is None:
        if values["fetch"]:
            raise ConfigError("--fetch downloads the weights that you name: add NAME. `widekernel weights` lists the names.")
        _list(_chosen(values["model"], values["task"]), values["json"])
        return 0
    if values["model"] != "*" or values["task"] is not None:
        raise ConfigError(
            f"--model and --task choose from the list, but {values['name']!r} is named already: leave them out."
        )
    checkpoint = find_checkpoint(values["name"])
    if values["fetch"]:
        with _reported() as listener:
            fetch(checkpoint, listener=listener)
    if values["json"]:
        sys.stdout.write(json.dumps(_as_dict(checkpoint), ensure_ascii=False) + "\n")
    elif values["fetch"]:
        sys.stdout.write(f"{cached_file(checkpoint)}\n")
    else:
        _show(checkpoint)
    return 0


def _chosen(pattern: str, task: Any) -> list[Checkpoint]:
    found = list_checkpoints(pattern, task)
    if not found:
        known = sorted({each.model for each in list_checkpoints()})
        of_task = f" for {task}" if task else ""
        raise ConfigError(
            f"No published weights{of_task} match {pattern!r}.{nearest(pattern, known)} Use a pattern such as slak*."
        )
    return found


def _list(checkpoints: Sequence[Checkpoint], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps([_as_dict(each) for each in checkpoints], ensure_ascii=False) + "\n")
        return
    table = Table("name", "task", "training data", "pixels", "result (%)", "parameters (M)", "license", "from", "here")
    for column in (3, 5):
        table.columns[column].justify = "right"
    for each in checkpoints:
        here = "yes" if cached_file(each) else ""
        table.add_row(
            each.name,
            each.task,
            each.training_data,
            each.resolution or "",
            _results(each),
            f"{each.params:g}" if each.params else "",
            each.license,
            ", ".join(dict.fromkeys(source.place for source in each.sources)) or "no link",
            here,
        )
    table_console().print(table)


def _show(checkpoint: Checkpoint) -> None:
    console = result_console()
    for name, text in _facts(checkpoint):
        console.print(f"{name:<15}{text}", soft_wrap=True)


def _facts(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield the names and texts of the lines that describe published weights."""
    yield "name", checkpoint.name
    yield "network", f"{checkpoint.title} ({checkpoint.origin})"
    yield "task", checkpoint.task
    yield "training data", checkpoint.training_data
    yield "pixels", checkpoint.resolution or "not stated"
    yield "classes", str(checkpoint.classes or "not stated")
    yield "results", _results(checkpoint) or "not stated"
    if checkpoint.params:
        macs = f", {checkpoint.macs:g} GMACs" if checkpoint.macs else ""
        yield "size", f"{checkpoint.params:g} M parameters{macs} (as published)"
    yield "preprocessing", ", ".join(f"{key} {value}" for key, value in checkpoint.preprocessing.items())
    yield "layout", checkpoint.layout
    yield "license", checkpoint.license
    if checkpoint.arguments:
        yield "arguments", ", ".join(f"{key}={value!r}" for key, value in checkpoint.arguments.items())
    for source in checkpoint.sources:
        how = "by hand" if source.kind == "by_hand" else source.note
        yield "from", f"{source.link}{f' ({how})' if how else ''}"
    yield "here", str(cached_file(checkpoint) or "no")
    if checkpoint.note:
        yield "note", checkpoint.note
    recipe = recipe_of_checkpoint(checkpoint.name)
    if recipe is not None:
        yield "recipe", recipe.name
    yield "use", _use(checkpoint)
    if checkpoint.task != "classification":
        yield "backbone", _loading(checkpoint)


def _use(checkpoint: Checkpoint) -> str:
    if checkpoint.task == "classification" and (checkpoint.timm or not _is_of_timm(checkpoint)):
        whose = " (timm's own tag)" if checkpoint.timm else ""
        return f"timm.create_model({checkpoint.name!r}, pretrained=True){whose}"
    if recipe_of_checkpoint(checkpoint.name) is not None:
        return f"widekernel eval {checkpoint.name} --data.root FOLDER"
    return _loading(checkpoint)


def _loading(checkpoint: Checkpoint) -> str:
    return f"widekernel.load_checkpoint(timm.create_model({checkpoint.model!r}), {checkpoint.name!r})"


def _is_of_timm(checkpoint: Checkpoint) -> bool:
    """Return whether the network is one of timm's: such networks have timm's tags only."""
    return any(each.timm and each.model == checkpoint.model for each in list_checkpoints(checkpoint.model))


def _results(checkpoint: Checkpoint) -> str:
    return ", ".join(f"{value:g} {_METRICS[key]}" for key, value in checkpoint.metrics.items() if key in _METRICS)


def _as_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    path, recipe = cached_file(checkpoint), recipe_of_checkpoint(checkpoint.name)
    return {
        **dataclasses.asdict(checkpoint),
        "recipe": None if recipe is None else recipe.name,
        "file": str(path) if path else None,
    }


class _Reporter(Listener):
    """Shows a download on standard error: a bar in a terminal, and lines about what happens."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, visible=False)

    @override
    def start(self, place: str) -> None:
        self._bar.console.print(f"Fetching from {place}.", soft_wrap=True)
        self._bar.reset(self._task, total=None, description=place, visible=True)

    @override
    def advance(self, done: int, total: int | None) -> None:
        self._bar.update(self._task, completed=done, total=total)

    @override
    def failed(self, place: str, reason: str) -> None:
        self._bar.console.print(f"{place}: {reason}.", soft_wrap=True)

    @override
    def wait(self, lock: str) -> None:
        self._bar.console.print(f"Another process is fetching the file; waiting for {lock}.", soft_wrap=True)


@contextmanager
def _reported() -> Iterator[Listener]:
    """Show a download within the block; yield what receives its events."""
    console = progress_console()
    with download_bar(console) as bar:
        yield _Reporter(bar)
