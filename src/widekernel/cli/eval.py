"""The command `widekernel eval`."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any, Literal

import jsonargparse

from widekernel.cli import dense_eval
from widekernel.cli.console import progress_console, result_console
from widekernel.cli.launching import check_number, is_first, is_started, start
from widekernel.cli.options import EvalOptions, add_recipe_argument, parse_with_data_of_the_run
from widekernel.cli.parsing import build, new_parser, parse_given
from widekernel.cli.source_arguments import add_source_arguments, load_source, source_from
from widekernel.cli.task_choice import evaluated_task
from widekernel.data.config import DataConfig
from widekernel.engine.interrupts import Interrupted
from widekernel.errors import ConfigError
from widekernel.tasks.config import FIRST_TASK, TASK

if TYPE_CHECKING:
    from widekernel.tasks.classification.evaluation import Evaluation
    from widekernel.tasks.classification.fold_evaluation import FoldEvaluation

FLAGS = ("--fold-check", "--json", "-h", "--help")
"""Options without a value."""

_DESCRIPTION = (
    "Measure accuracy and loss on the held-out split of a data set, each image once. For a run folder, or a model file in "
    "one, the data settings of the run are the defaults."
)


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("eval", _DESCRIPTION, "SOURCE")
    add_source_arguments(parser)
    add_recipe_argument(parser)
    parser.add_argument(
        "--ema", type=bool | None, default=None, help="true: the averaged weights; false: the weights; as --weights"
    )
    parser.add_argument(
        "--test_crop", type=Literal["center", "warp"] | None, default=None, help="short for --data.test_crop"
    )
    parser.add_argument(
        "--fold-check",
        dest="fold_check",
        action="store_true",
        help="also evaluate the folded network, and report the largest difference of the logits",
    )
    parser.add_argument(
        "--processes",
        type=int | None,
        default=None,
        help="processes on this machine that evaluate together; on GPUs, one for each",
    )
    parser.add_argument(
        f"--{TASK}",
        type=str | None,
        default=None,
        help="what the network does, for a file that does not say it; --task segmentation --help lists the options for such "
        "networks",
    )
    parser.add_class_arguments(EvalOptions, as_group=False)
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: list[str]) -> int:
    """Evaluate the network that `arguments` name, and print the results."""
    task = evaluated_task(arguments, FLAGS)
    if task != FIRST_TASK:
        return dense_eval.run(task, arguments)
    values, _ = parse_with_data_of_the_run(make_parser(), arguments, "eval")
    _apply_short_forms(values, parse_given(make_parser(), arguments))
    source = source_from(values)
    data = build(DataConfig, values["data"])
    options = build(EvalOptions, values)
    processes = values["processes"]
    if processes is not None and not is_started(processes):
        check_number(processes)
        return start("eval", arguments, processes)
    from widekernel.cli.evaluation import compare_folded, evaluate_on
    from widekernel.engine.joining import joined_processes

    with joined_processes(options.device) as joined:
        model, saved = load_source(source, silent=not joined.is_main)
        evaluation = compare_folded if values["fold_check"] else evaluate_on
        try:
            result = evaluation(model, saved, data, options, source.run_folder(), joined)
        except Interrupted as interruption:
            if joined.is_main:
                progress_console().print(f"Evaluation {interruption}.")
            raise
    if is_first():
        _print(result, values["json"])
    return 0


def _apply_short_forms(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Set the values that --ema and --test_crop stand for.

    Raises:
        ConfigError: the long form says something else.
    """
    if values["ema"] is not None:
        wanted = "ema" if values["ema"] else "model"
        if given.get("weights", wanted) != wanted:
            raise ConfigError(f"--ema is {str(values['ema']).lower()}, but --weights is {given['weights']}: leave one out.")
        values["weights"] = wanted
    if values["test_crop"] is not None:
        values["data"]["test_crop"] = values["test_crop"]
        if "crop_pct" not in (given.get("data") or {}):  # that of the run belongs to its own crop
            values["data"]["crop_pct"] = None


def _print(result: Evaluation | FoldEvaluation, as_json: bool) -> None:
    values = dataclasses.asdict(result)
    if as_json:
        if "before" in values:
            values = {**values.pop("before"), "folded": values.pop("after"), **values}
        sys.stdout.write(json.dumps(values) + "\n")
        return
    console = result_console()
    forms = [values["before"], values["after"]] if "before" in values else [values]
    if len(forms) > 1:
        console.print("            network    folded")
    texts = {"top-1": ("top1", ".2f", " %"), "top-5": ("top5", ".2f", " %"), "loss": ("loss", ".4f", "")}
    for label, (key, digits, unit) in texts.items():
        shown = [f"{form[key]:{digits}}{unit}" for form in forms]
        console.print(f"{label:<12}{'   '.join(f'{text:<8}' for text in shown)}".rstrip())
    console.print(f"images      {forms[0]['images']}")
    console.print(f"unreadable  {forms[0]['unreadable']}")
    if len(forms) > 1:
        console.print(f"difference  {values['max_difference']:.3g} at most, of logits up to {values['max_logit']:.3g}")
