"""The command `widekernel recipes`."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import sys
from collections.abc import Callable
from typing import Any, Literal

import jsonargparse
import yaml
from rich.table import Table

from widekernel.cli import eval as evaluation
from widekernel.cli import sparsify
from widekernel.cli.console import result_console, table_console
from widekernel.cli.parsing import new_parser, parse
from widekernel.cli.train import parse_config
from widekernel.errors import ConfigError, nearest
from widekernel.recipes import Recipe, deviations, list_recipes, load_base, load_recipe
from widekernel.tasks.config import TASK
from widekernel.tasks.registry import task_entry

_DESCRIPTION = (
    "List the recipes, or show one: its settings, and where they differ from the defaults and from the base of its family. "
    "The results in the table are the published ones."
)

_METRICS = {"top1": "top-1", "mIoU_ss": "mIoU", "box_AP": "box AP", "mask_AP": "mask AP"}


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("recipes", _DESCRIPTION, "[NAME]")
    parser.add_argument(
        "name", type=str | None, nargs="?", default=None, help="recipe to show; with * or ?, a pattern of recipes to list"
    )
    parser.add_argument("--family", type=str | None, default=None, help="list only recipes of this family, such as slak")
    parser.add_argument(
        "--model", type=str | None, default=None, help="list only recipes for this model, or pattern of models"
    )
    parser.add_argument("--dataset", type=str | None, default=None, help="list only recipes for this data set")
    parser.add_argument("--task", type=str | None, default=None, help="list only recipes for this task")
    parser.add_argument(
        "--command",
        type=Literal["train", "eval", "sparsify"] | None,
        default=None,
        help="list only recipes for this command",
    )
    parser.add_argument("--verified", action="store_true", help="list only recipes that were run with this library")
    parser.add_argument("--json", action="store_true", help="print JSON: one object, or a list of them")
    return parser


def run(arguments: list[str]) -> int:
    """Print the recipes as a table, or one of them with its settings."""
    values = parse(make_parser(), arguments)
    name, as_json = values["name"], values["json"]
    if name is not None and not any(sign in name for sign in "*?["):
        recipe = load_recipe(name)
        if as_json:
            _print_json(_details(recipe))
        else:
            _print_recipe(recipe)
        return 0
    recipes = _chosen([load_recipe(each) for each in list_recipes()], values)
    if as_json:
        _print_json([_summary(recipe) for recipe in recipes])
    else:
        _print_table(recipes)
    return 0


def _chosen(recipes: list[Recipe], values: dict[str, Any]) -> list[Recipe]:
    """Return the recipes that the filters leave.

    Raises:
        ConfigError: they leave none.
    """
    filters: dict[str, Callable[[Recipe], str]] = {
        "name": lambda recipe: recipe.name,
        "family": lambda recipe: recipe.family,
        "model": lambda recipe: recipe.model,
        "dataset": lambda recipe: recipe.dataset,
        "task": lambda recipe: recipe.task,
        "command": lambda recipe: recipe.command,
    }
    for key, read in filters.items():
        wanted = values[key]
        if wanted is None:
            continue
        left = [recipe for recipe in recipes if fnmatch.fnmatch(read(recipe).lower(), wanted.lower())]
        if not left:
            known = sorted({read(recipe) for recipe in recipes})
            listed = f" They have {', '.join(known)}." if len(known) <= 12 else ""
            raise ConfigError(f"No recipe is left with {key} {wanted!r}.{nearest(wanted, known)}{listed}")
        recipes = left
    if values["verified"]:
        recipes = [recipe for recipe in recipes if recipe.verified != "none"]
        if not recipes:
            raise ConfigError("None of these recipes was run with this library: leave --verified out.")
    return recipes


def _summary(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe without its settings."""
    return {
        "name": recipe.name,
        "family": recipe.family,
        "description": recipe.description,
        "task": recipe.task,
        "command": recipe.command,
        "model": recipe.model,
        "dataset": recipe.dataset,
        "epochs": recipe.epochs,
        "steps": recipe.steps,
        "input_size": recipe.input_size,
        "published": recipe.published,
        "checkpoint": recipe.checkpoint,
        "total_batch": recipe.total_batch,
        "devices": None if recipe.devices is None else vars(recipe.devices),
        "source": None if recipe.source is None else vars(recipe.source),
        "verified": recipe.verified,
        "notes": list(recipe.notes),
    }


def _details(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe, all settings of its command, and the deviations."""
    from_base = {} if recipe.base is None else deviations(recipe.own_settings, load_base(recipe.base).get("settings") or {})
    settings, defaults = _resolved(recipe)
    return {
        **_summary(recipe),
        "base": recipe.base,
        "settings": settings,
        "deviations": {
            "from_defaults": _pairs(deviations(settings, defaults), "default"),
            "from_base": _pairs(from_base, "base"),
        },
    }


def _pairs(found: dict[str, tuple[Any, Any]], reference: str) -> dict[str, dict[str, Any]]:
    return {key: {"value": value, reference: other} for key, (value, other) in found.items()}


def _resolved(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all settings with which a recipe's command runs, and the defaults of the command."""
    if recipe.command == "train":
        defaults = dataclasses.asdict(task_entry(recipe.task).settings_class()())
        settings = parse_config(["--recipe", recipe.name]).to_dict()
        del settings["output"], defaults["output"]
        if TASK in settings:
            defaults[TASK] = recipe.task
        return settings, defaults
    command = evaluation if recipe.command == "eval" else sparsify
    return recipe.settings_for(recipe.command), command.make_parser().get_defaults().as_dict()


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _print_table(recipes: list[Recipe]) -> None:
    table = Table("recipe", "model", "data", "length", "size", "result (%)", "verified")
    for column in (3, 4, 5):
        table.columns[column].justify = "right"
    for recipe in recipes:
        table.add_row(
            recipe.name,
            recipe.model,
            recipe.dataset,
            _length(recipe),
            "–" if recipe.input_size is None else str(recipe.input_size),
            _results(recipe),
            "–" if recipe.verified == "none" else "yes",
        )
    table_console().print(table)


def _length(recipe: Recipe) -> str:
    """Return the length of a run as in names of recipes: 300e are epochs, and 160k are thousands of steps."""
    if recipe.steps is not None:
        return f"{recipe.steps / 1000:g}k"
    return "–" if recipe.epochs is None else f"{recipe.epochs}e"


def _results(recipe: Recipe) -> str:
    published = recipe.published or {}
    return ", ".join(f"{value} {_METRICS[key]}" for key, value in published.items() if key in _METRICS) or "–"


def _print_recipe(recipe: Recipe) -> None:
    details, console = _details(recipe), result_console()
    published = [f"{key} {value}" for key, value in (recipe.published or {}).items()]
    facts = {
        "what it does": recipe.description,
        "command": f"widekernel {recipe.command} {'' if recipe.command == 'train' else 'SOURCE '}--recipe {recipe.name}",
        "data": recipe.dataset,
        "source": recipe.source,
        "published": ", ".join(published) or "nothing",
        "weights": recipe.checkpoint,
        "batch": None if recipe.devices is None else f"{recipe.total_batch} images: {recipe.devices}",
        "verified": recipe.verified,
        "base": recipe.base,
    }
    for key, value in facts.items():
        if value is not None:
            console.print(f"{key:<13} {value}", soft_wrap=True)
    for note in recipe.notes:
        console.print(f"{'note':<13} {note}", soft_wrap=True)
    console.print("\nsettings", soft_wrap=True)
    text = yaml.dump(details["settings"], Dumper=_ListsInOneLine, sort_keys=False, allow_unicode=True)
    console.print("".join(f"  {line}\n" for line in text.splitlines()), end="", soft_wrap=True)
    for title, key, reference in (
        ("differs from the defaults", "from_defaults", "default"),
        (f"differs from the base {recipe.base}", "from_base", "base"),
    ):
        found = details["deviations"][key]
        if found:
            console.print(f"\n{title}", soft_wrap=True)
        for name, pair in found.items():
            value, other = (json.dumps(pair[each], ensure_ascii=False) for each in ("value", reference))
            console.print(f"  {name}: {value} ({reference}: {other})", soft_wrap=True)


class _ListsInOneLine(yaml.SafeDumper):
    """Writer of YAML with a line for each setting, including lists."""


_ListsInOneLine.add_representer(
    list, lambda dumper, values: dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)
)
