"""Lines of the documentation that call the command, parsed as the command parses them."""

from __future__ import annotations

import shlex
from typing import Any

from widekernel.cli import dense_eval, erf, predict, recipes, shape_bias, sparsify, train, weights
from widekernel.cli import eval as evaluation
from widekernel.cli.options import EvalOptions, parse_with_data_of_the_run
from widekernel.cli.parsing import build, parse, parse_given
from widekernel.cli.task_choice import chosen_task, evaluated_task
from widekernel.data import BatchPlan, DataConfig
from widekernel.recipes import load_recipe
from widekernel.tasks.config import FIRST_TASK
from widekernel.tasks.registry import task_entry
from widekernel.tasks.sparsify.config import SparsifyConfig

MODULES: dict[str, Any] = {
    "train": train,
    "eval": evaluation,
    "sparsify": sparsify,
    "erf": erf,
    "shape-bias": shape_bias,
    "predict": predict,
    "recipes": recipes,
    "weights": weights,
}


def check_line(line: str) -> None:
    """Raise unless a line is a command of ours with valid options, whose batch fits the processes."""
    command, *arguments = shlex.split(line)[1:]
    if arguments == ["--help"]:
        assert command in MODULES
    elif command == "train":
        _check_training(arguments)
    elif command == "eval" and (task := evaluated_task(arguments, evaluation.FLAGS)) != FIRST_TASK:
        values = dense_eval._parse(task, arguments)
        for key, kind in dense_eval._sections(task).items():
            build(kind, values[key], key)
        assert values["data"]["root"]
    elif command in ("eval", "sparsify"):
        values, _ = parse_with_data_of_the_run(MODULES[command].make_parser(), arguments, command)  # type: ignore[arg-type]
        build(DataConfig, values["data"])
        build(EvalOptions if command == "eval" else SparsifyConfig, values)
        assert values["model"] is not None or values["source"].startswith("runs/")
    else:
        values = parse(MODULES[command].make_parser(), arguments)
        assert values.get("models", True)


def _check_training(arguments: list[str]) -> None:
    parser = train.make_parser(chosen_task(arguments))
    given = parse_given(parser, arguments)
    assert given["data"]["root"]
    config = train.parse_config(arguments)
    assert isinstance(config, task_entry(chosen_task(arguments)).settings_class())
    if given.get("recipe") is not None:
        assert load_recipe(given["recipe"]).command == "train"
    slurm = given.get("slurm", {"nodes": 1, "gpus": 1})
    processes = given.get("processes", slurm["nodes"] * slurm["gpus"])
    BatchPlan(config.loop.batch_size, config.loop.micro_batch, processes)
