"""Training recipes as data: published runs, and those of this project.

Each recipe is a YAML file in a folder of its family. It may name a base in `bases/`, whose fields and settings it overrides.
"""

from widekernel.recipes.loading import list_recipes, load_base, load_recipe, recipe_of_checkpoint
from widekernel.recipes.recipe import Command, Devices, Recipe, Source, deviations

__all__ = [
    "Command",
    "Devices",
    "Recipe",
    "Source",
    "deviations",
    "list_recipes",
    "load_base",
    "load_recipe",
    "recipe_of_checkpoint",
]
