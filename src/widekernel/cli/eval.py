"""The command `widekernel eval`."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

import jsonargparse

from widekernel.cli.console import progress_console, result_console
from widekernel.cli.options import EvalOptions, add_recipe_argument, parse_with_data_of_the_run
from widekernel.cli.parsing import build, new_parser
from widekernel.cli.source_arguments import add_source_arguments, load_source, source_from
from widekernel.data.config import DataConfig
from widekernel.engine.interrupts import Interrupted

if TYPE_CHECKING:
    from widekernel.tasks.classification.evaluation import Evaluation

_DESCRIPTION = (
    "Measure accuracy and loss on the held-out split of a data set. For a run folder, or a model file in one, the data "
    "settings of the run are the defaults."
)


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("eval", _DESCRIPTION, "SOURCE")
    add_source_arguments(parser)
    add_recipe_argument(parser)
    parser.add_class_arguments(EvalOptions, as_group=False)
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: list[str]) -> int:
    """Evaluate the network that `arguments` name, and print the results."""
    values, _ = parse_with_data_of_the_run(make_parser(), arguments, "eval")
    source = source_from(values)
    data = build(DataConfig, values["data"])
    options = build(EvalOptions, values)
    from widekernel.cli.evaluation import evaluate_on

    model, saved = load_source(source)
    try:
        result = evaluate_on(model, saved, data, options, source.run_folder())
    except Interrupted as interruption:
        progress_console().print(f"Evaluation {interruption}.")
        raise
    _print(result, values["json"])
    return 0


def _print(result: Evaluation, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(dataclasses.asdict(result)) + "\n")
        return
    console = result_console()
    console.print(f"top-1       {result.top1:.2f} %")
    console.print(f"top-5       {result.top5:.2f} %")
    console.print(f"loss        {result.loss:.4f}")
    console.print(f"images      {result.images}")
    console.print(f"unreadable  {result.unreadable}")
