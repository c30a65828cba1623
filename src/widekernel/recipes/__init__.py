"""Training recipes: each is a YAML file of training settings with a name and a description."""

from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from widekernel.errors import ConfigError, nearest


@dataclass(frozen=True)
class Recipe:
    """A named set of settings.

    Args:
        name: the recipe's name
        description: what it trains, in one sentence
        settings: nested settings of the training configuration
    """

    name: str
    description: str
    settings: dict[str, Any]


def list_recipes() -> list[str]:
    """List the names of all recipes, sorted."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(name: str) -> Recipe:
    """Load the recipe called `name`.

    Raises:
        ConfigError: there is no such recipe.
    """
    known = list_recipes()
    if name not in known:
        raise ConfigError(f"There is no recipe {name!r}.{nearest(name, known)} Known recipes: {', '.join(known)}.")
    content = yaml.safe_load(resources.files(__name__).joinpath(f"{name}.yaml").read_text())
    return Recipe(name, content["description"], content["settings"])
