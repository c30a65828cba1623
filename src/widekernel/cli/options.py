"""Options shared by several commands."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jsonargparse

from widekernel.cli.parsing import parse, parse_given
from widekernel.errors import CheckpointError
from widekernel.recipes import Command, load_recipe
from widekernel.settings import require
from widekernel.tasks.config import FIRST_TASK, TASK, wrong_task
from widekernel.tasks.model_source import ModelSource


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Settings of an evaluation.

    Args:
        batch_size: images per forward pass
        device: auto (CUDA if available), cpu, cuda or cuda:N
    """

    batch_size: int = 128
    device: str = "auto"

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "batch_size", self.batch_size, "positive")


def add_recipe_argument(parser: jsonargparse.ArgumentParser) -> None:
    """Add the argument that names a recipe."""
    parser.add_argument(
        "--recipe",
        type=str | None,
        default=None,
        help="recipe whose model and data settings are the defaults; `widekernel recipes` lists them",
    )


def parse_with_data_of_the_run(
    parser: jsonargparse.ArgumentParser, arguments: list[str], command: Command = "eval"
) -> tuple[dict[str, Any], bool]:
    """Parse `arguments`; if the source is a run folder or a file in one, the run's data settings are the defaults.

    The settings of a recipe come after those of the run. A run needs neither its model nor, without images, its data.

    Args:
        parser: parser of the command, with the argument `--recipe`.
        arguments: the arguments of the command line.
        command: name of the command, which tells the settings of a recipe that count.

    Returns:
        the values, and whether they name a data set.

    Raises:
        ConfigError: an argument or the recipe is unknown, or a value has the wrong type.
        CheckpointError: the run is of another task than classification.
        RunFolderError: the configuration of the run cannot be read.
    """
    given = parse_given(parser, arguments)
    folder = ModelSource(Path(given["source"])).run_folder()
    config = {} if folder is None else folder.read_config()
    if config.get(TASK, FIRST_TASK) != FIRST_TASK:
        raise CheckpointError(wrong_task(given["source"], config[TASK], FIRST_TASK))
    of_run = config.get("data") or {}
    # The classifier of a run has the classes of its data; a map was for the weights that the run started from.
    layers = [] if folder is None else [{"data": {key: value for key, value in of_run.items() if key != "class_map"}}]
    data = given.get("data", {})
    has_data = folder is not None or "name" in data or data.get("root") is not None
    if given.get("recipe") is not None:
        settings = load_recipe(given["recipe"]).settings_for(command)
        useless = [*(("model", "model_args") if folder is not None else ()), *(() if has_data else ("data",))]
        layers.append({key: value for key, value in settings.items() if key not in useless})
    return parse(parser, arguments, layers), has_data
