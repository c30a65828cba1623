"""The task of a command: from the command line, files and recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from widekernel.cli.main import main
from widekernel.cli.task_choice import chosen_task, option_values
from widekernel.cli.train import make_parser, parse_config
from widekernel.errors import ConfigError
from widekernel.recipes import list_recipes
from widekernel.recipes.recipe import Recipe
from widekernel.tasks.registry import TASKS


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_its_own_settings_which_can_be_printed_and_read_again(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--task", task, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed).get("task", "classification") == task
    (tmp_path / "settings.yaml").write_text(printed)
    again = parse_config(["--config", str(tmp_path / "settings.yaml")])
    assert again.task == task and again.to_dict() == yaml.safe_load(printed)


@pytest.mark.parametrize("task", TASKS)
def test_every_option_of_every_task_has_help(task: str) -> None:
    actions = [action for action in make_parser(task)._actions if action.help != "==SUPPRESS=="]
    assert [action.dest for action in actions if not (action.help or "").strip()] == []


def test_the_task_comes_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("task: segmentation\n")
    file = ["--config", str(tmp_path / "settings.yaml")]
    assert chosen_task(file) == "segmentation" and chosen_task([]) == "classification"
    assert chosen_task([*file, "--task=segmentation"]) == "segmentation"
    with pytest.raises(ConfigError, match=r"--task is 'detection', but task in .* is 'segmentation'"):
        chosen_task([*file, "--task", "detection"])
    with pytest.raises(ConfigError, match=r"--task is 'segmentation', but the task of the recipe .* is 'classification'"):
        chosen_task(["--task", "segmentation", "--recipe", list_recipes()[0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "segmentatoin"], "--task 'segmentatoin' is unknown.*Did you mean 'segmentation'"),
        (["--task", "segmentation", "--label_smoothing", "0.1"], "has no option --label_smoothing"),
        (["--model.detector", "fcos"], "has no option --model.detector"),
        (["--task", "detection", "--model.detector", "fcos"], "set data.masks to false"),
        (["--task", "detection", "--schedule.epochs", "12"], "the run ends before the last one"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments, "--print_config"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_values_of_options() -> None:
    arguments = ["--config", "a", "--config=b", "--configs", "c", "x", "--config"]
    assert option_values("config", arguments) == ["a", "b"]


@pytest.mark.parametrize("task", TASKS)
def test_recipes_of_every_task_are_accepted(task: str) -> None:
    settings = {"model": {"name": "slak_tiny"}, "data": {"crop_size": 512}, "schedule": {"steps": 10}}
    recipe = Recipe("name", "family", "what", settings, settings, task=task)
    assert (recipe.steps, recipe.epochs, recipe.input_size) == (10, None, 512)
    with pytest.raises(ConfigError, match="task 'poses' is unknown"):
        Recipe("name", "family", "what", settings, settings, task="poses")
