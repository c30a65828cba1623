"""``widekernel train``."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import jsonargparse

from widekernel.cli.console import ConsoleReporter, results
from widekernel.cli.parsing import build, known_keys, new_parser, parse, read_settings, settings_by_key, typed
from widekernel.data.paths import expanded
from widekernel.errors import ConfigError
from widekernel.recipes import load_recipe
from widekernel.tasks.config import TrainConfig
from widekernel.training.interrupts import Interrupted

if TYPE_CHECKING:
    from widekernel.tasks.classification import RunResult

_DESCRIPTION = (
    "Train a classifier. Settings come from a recipe, then from configuration files, then from the command line; "
    "the later ones win. The same command again resumes the run or reports its result."
)


def run(arguments: list[str]) -> int:
    """Parse ``arguments``, train, and print the result."""
    config = parse_config(arguments)
    from widekernel.tasks.classification import train

    with ConsoleReporter() as reporter:
        try:
            result = train(config, reporter)
        except Interrupted as interruption:
            name = signal.Signals(interruption.signal_number).name
            reporter.message(f"Stopped by {name}; the state is saved. The same command resumes the run.")
            return 128 + interruption.signal_number
    print_result(result)
    return 0


def make_parser() -> jsonargparse.ArgumentParser:
    """The parser of all training settings."""
    parser = new_parser("train", _DESCRIPTION)
    parser.add_argument("--recipe", type=str | None, default=None, help="named settings; `widekernel recipes` lists them")
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile, help="YAML file with settings")
    parser.add_class_arguments(TrainConfig, as_group=False)
    return parser


def parse_config(arguments: list[str]) -> TrainConfig:
    """The training configuration that ``arguments`` describe.

    Raises:
        ConfigError: a setting, recipe or file is unknown, unreadable, of the wrong type or out of range.
    """
    parser = make_parser()
    files, rest = _split_config_files(arguments)
    recipe_name = None
    contents = {file: read_settings(file, parser) for file in files}
    for content in contents.values():
        recipe_name = content.get("recipe", recipe_name)
    recipe_name = _recipe_argument(rest) or recipe_name
    if recipe_name is not None:
        recipe = load_recipe(recipe_name)
        parser.set_defaults(settings_by_key(recipe.settings, known_keys(parser)))
    # files first: the command line wins wherever --config stands on it
    values = parse(parser, [f"--config={file}" for file in files if contents[file]] + rest)
    values.pop("config", None)
    values.pop("recipe", None)
    values["model"]["args"] = typed(values["model"]["args"])
    if values["output"] is None:
        values["output"] = str(Path("runs") / (recipe_name or values["model"]["name"]))
    return build(TrainConfig, values)


def print_result(result: RunResult) -> None:
    """Tell how a run ended."""
    summary, console = result.summary, results()
    state = "was already finished" if result.was_finished else "is finished"
    if result.other_code:
        state = f"was finished {result.other_code};"
        state += " `widekernel eval` measures its model with this code, another --output trains anew"
    console.print(f"The run in {result.folder.path} {state} ({summary['epochs']} epochs, {summary['step']} steps).",
                  soft_wrap=True)  # fmt: skip
    console.print(f"  weights           top-1 {summary['val_top1']:.2f} %  top-5 {summary['val_top5']:.2f} %")
    if "ema_val_top1" in summary:
        console.print(f"  averaged weights  top-1 {summary['ema_val_top1']:.2f} %  top-5 {summary['ema_val_top5']:.2f} %")
    skipped = summary["train_unreadable"], summary["val_unreadable"]
    if any(skipped):
        console.print(f"  unreadable images: {skipped[0]} in training, {skipped[1]} held out")
    console.print(f"  model             {result.folder.model}", soft_wrap=True)


def _split_config_files(arguments: list[str]) -> tuple[list[str], list[str]]:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", action="append", default=[])
    try:
        found, rest = finder.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"widekernel train: {error}.") from error
    return [expanded("--config", file) for file in found.config], rest


def _recipe_argument(arguments: list[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--recipe")
    try:
        return finder.parse_known_args(arguments)[0].recipe
    except argparse.ArgumentError as error:
        raise ConfigError(f"widekernel train: {error}.") from error
