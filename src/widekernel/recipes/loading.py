"""Reading of recipes and their bases from the YAML files of this package."""

from __future__ import annotations

import dataclasses
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from widekernel.errors import ConfigError, nearest
from widekernel.recipes.recipe import Devices, Recipe, Source

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

BASES = "bases"
_SUFFIX = ".yaml"
# PyYAML has it if it was built with libyaml; reading all recipes then takes a tenth of the time.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FIELDS = {field.name for field in dataclasses.fields(Recipe)} - {"name", "family", "own_settings"}


def list_recipes() -> list[str]:
    """List the names of all recipes, sorted by family and name."""
    return list(_files())


def load_recipe(name: str) -> Recipe:
    """Load the recipe called `name`, with the settings of its base.

    Raises:
        ConfigError: there is no such recipe.
    """
    files = _files()
    if name not in files:
        raise ConfigError(f"There is no recipe {name!r}.{nearest(name, files)} `widekernel recipes` lists them.")
    family, file = files[name]
    own = _read(file)
    content = _merged(load_base(own["base"]), own) if "base" in own else own
    source, devices = content.pop("source", None), content.pop("devices", None)
    return Recipe(
        name=name,
        family=family,
        own_settings=own["settings"],
        source=None if source is None else Source(**source),
        devices=None if devices is None else Devices(**devices),
        notes=tuple(content.pop("notes", ())),
        **content,
    )


def recipe_of_checkpoint(checkpoint: str) -> Recipe | None:
    """Return the recipe of the run that made published weights, or `None` if there is none.

    Args:
        checkpoint: name of the weights, as in `widekernel weights`.
    """
    name = _by_checkpoint().get(checkpoint)
    return None if name is None else load_recipe(name)


@cache
def _by_checkpoint() -> dict[str, str]:
    """Return the name of the recipe of each published checkpoint that a recipe names."""
    contents = {name: _read(file) for name, (_, file) in _files().items()}
    return {content["checkpoint"]: name for name, content in contents.items() if "checkpoint" in content}


@cache
def _files() -> dict[str, tuple[str, Traversable]]:
    """Return the family and the file of each recipe, by name."""
    found = {}
    for folder in sorted(resources.files(__package__).iterdir(), key=lambda each: each.name):
        if not folder.is_dir() or folder.name == BASES:
            continue
        for file in sorted(folder.iterdir(), key=lambda each: each.name):
            if file.name.endswith(_SUFFIX):
                found[file.name.removesuffix(_SUFFIX)] = folder.name, file
    return found


def load_base(name: str) -> dict[str, Any]:
    """Return the fields of the base called `name`, with those of its own base.

    Raises:
        ConfigError: there is no such base.
    """
    file = resources.files(__package__) / BASES / f"{name}{_SUFFIX}"
    if not file.is_file():
        raise ConfigError(f"There is no base {name!r} among the recipes.")
    own = _read(file)
    return _merged(load_base(own["base"]), own) if "base" in own else own


def _read(file: Traversable) -> dict[str, Any]:
    content: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER)
    for key in content:
        if key not in _FIELDS:
            raise ConfigError(f"The recipe file {file.name} has the unknown field {key!r}.{nearest(key, _FIELDS)}")
    return content


def _merged(base: dict[str, Any], own: dict[str, Any], key: str = "") -> dict[str, Any]:
    """Return `base`, overridden by `own`: mappings are merged, and notes follow those of the base."""
    merged = dict(base)
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            merged[name] = _merged(base[name], value, name)
        elif not key and name == "notes":
            merged[name] = [*base.get("notes", ()), *value]
        else:
            merged[name] = value
    return merged
