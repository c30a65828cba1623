"""The task of a command, which decides what its other options are: from the command line, the files and the recipe."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from widekernel.cli.parsing import read_yaml
from widekernel.cli.paths import expand_paths
from widekernel.errors import CheckpointError, ConfigError
from widekernel.recipes import load_recipe
from widekernel.tasks.config import FIRST_TASK, TASK
from widekernel.tasks.registry import TASKS, task_entry
from widekernel.weights.catalog import find_checkpoint, is_published


def chosen_task(arguments: Sequence[str]) -> str:
    """Return the task that the arguments, their files or their recipe name; classification if none of them does.

    Raises:
        ConfigError: a task, a recipe or a file is unknown or unreadable, or two of them name different tasks.
    """
    files = {path: read_yaml(path) for path in expand_paths({"config": option_values("config", arguments)})["config"]}
    named: dict[str, str] = {}
    for value in option_values(TASK, arguments)[-1:]:
        named["--task"] = value
    for path, content in files.items():
        if TASK in content:
            named[f"{TASK} in {path}"] = content[TASK]
    recipes = [content["recipe"] for content in files.values() if content.get("recipe")] + option_values("recipe", arguments)
    if recipes:
        named[f"the task of the recipe {recipes[-1]}"] = load_recipe(str(recipes[-1])).task
    for place, task in named.items():
        task_entry(task, place)
    (first, task), *others = named.items() or [("", FIRST_TASK)]
    for place, other in others:
        if other != task:
            raise ConfigError(f"{first} is {task!r}, but {place} is {other!r}: leave one of them out.")
    return task


def evaluated_task(arguments: Sequence[str], flags: Collection[str]) -> str:
    """Return the task of the network that a command evaluates: that of its run or file, or as for `chosen_task`.

    Args:
        arguments: the arguments of the command, of which one that is no option names the network.
        flags: options without a value.

    Raises:
        ConfigError: as for `chosen_task`, or the network has another task than the arguments name.
        CheckpointError: the task of the network is unknown.
    """
    named = chosen_task(arguments)
    source = _source(arguments, flags)
    if source is None or {"-h", "--help"} & set(arguments):
        return named
    from widekernel.tasks.loading import described_task  # needs PyTorch, which help does not

    if is_published(source) and not Path(source).exists():
        found: str | None = find_checkpoint(source).task
    else:
        found = described_task(Path(str(expand_paths({"source": source})["source"])))
    if found is not None and found not in TASKS:
        raise CheckpointError(
            f"{source} holds a network for {found!r}, a task that this version does not know; it knows {', '.join(TASKS)}."
        )
    says = option_values(TASK, arguments) or option_values("recipe", arguments)
    if found is not None and says and found != named:
        raise ConfigError(
            f"{source} holds a network for {found}, but the arguments ask for {named}: leave {says[-1]!r} out."
        )
    return named if found is None else found


def _source(arguments: Sequence[str], flags: Collection[str]) -> str | None:
    """Return the first argument that is neither an option nor the value of one, or `None`."""
    before = ""
    for argument in arguments:
        takes_it = before.startswith("--") and "=" not in before and before not in flags
        if not argument.startswith("-") and not takes_it:
            return argument
        before = argument
    return None


def option_values(name: str, arguments: Sequence[str]) -> list[str]:
    """Return the values of the option `--name` among the arguments, in their order; a missing value is left out."""
    option, found = f"--{name}", []
    for number, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            found.append(argument.partition("=")[2])
        elif argument == option and number + 1 < len(arguments):
            found.append(arguments[number + 1])
    return found
