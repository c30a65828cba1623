"""Lines of the documentation that call the command, parsed as the command parses them."""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from widekernel.cli import dense_eval, erf, fold, predict, recipes, shape_bias, sparsify, train, weights
from widekernel.cli import eval as evaluation
from widekernel.cli.options import EvalOptions, parse_with_data_of_the_run
from widekernel.cli.parsing import build, parse, parse_given
from widekernel.cli.task_choice import chosen_task, evaluated_task
from widekernel.data import BatchPlan, DataConfig
from widekernel.recipes import load_recipe
from widekernel.tasks.config import FIRST_TASK
from widekernel.tasks.model_source import ModelSource
from widekernel.tasks.sparsify.config import SparsifyConfig

MODULES: dict[str, Any] = {
    "train": train,
    "eval": evaluation,
    "sparsify": sparsify,
    "erf": erf,
    "fold": fold,
    "shape-bias": shape_bias,
    "predict": predict,
    "recipes": recipes,
    "weights": weights,
}


@cache
def parser_of(command: str, task: str = FIRST_TASK) -> ArgumentParser:
    """Return the parser of a command; to build one takes longer than to parse a line."""
    if task == FIRST_TASK:
        return MODULES[command].make_parser()
    return (dense_eval if command == "eval" else MODULES[command]).make_parser(task)


def check_line(line: str) -> None:
    """Raise unless a line is a command of ours with valid options, whose batch fits the processes."""
    command, *arguments = shlex.split(line)[1:]
    if arguments == ["--help"]:
        assert command in MODULES
    elif command == "train":
        _check_training(arguments)
    elif command == "eval" and (task := evaluated_task(arguments, evaluation.FLAGS)) != FIRST_TASK:
        _check_dense_evaluation(task, arguments)
    elif command in ("eval", "sparsify"):
        values, _ = parse_with_data_of_the_run(parser_of(command), arguments, command)  # type: ignore[arg-type]
        build(DataConfig, values["data"])
        build(EvalOptions if command == "eval" else SparsifyConfig, values)
        assert values["model"] is not None or values["source"].startswith("runs/")
    else:
        assert parse(parser_of(command), arguments).get("models", True)


def _check_training(arguments: list[str]) -> None:
    task = chosen_task(arguments)
    given = parse_given(parser_of("train", task), arguments)
    assert given["data"]["root"]
    if given.get("recipe") is None:
        loop = train.parse_config(arguments).loop
        batch, together = loop.batch_size, loop.micro_batch
    else:
        recipe = load_recipe(given["recipe"])
        assert (recipe.command, recipe.task) == ("train", task)
        batch, together = recipe.total_batch or 0, recipe.settings["loop"].get("micro_batch")
    slurm = given.get("slurm", {"nodes": 1, "gpus": 1})
    BatchPlan(batch, together, given.get("processes", slurm["nodes"] * slurm["gpus"]))


def _check_dense_evaluation(task: str, arguments: list[str]) -> None:
    parser, sections = parser_of("eval", task), dense_eval._sections(task)
    given = parse_given(parser, arguments)
    layers = dense_eval.default_layers(ModelSource(Path(given["source"])), given.get("recipe"), sections)
    assert layers[-1]["model"]["name"]  # published weights and files need a recipe
    values = parse(parser, arguments, layers)
    for key, kind in sections.items():
        build(kind, values[key], key)
    assert values["data"]["root"]
