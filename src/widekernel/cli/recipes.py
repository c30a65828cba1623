"""The command `widekernel recipes`."""

import jsonargparse
from rich.table import Table

from widekernel.cli.console import result_console
from widekernel.cli.parsing import new_parser, parse
from widekernel.recipes import list_recipes, load_recipe


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    return new_parser("recipes", "List the training recipes.")


def run(arguments: list[str]) -> int:
    """Print the recipes as a table."""
    parse(make_parser(), arguments)
    table = Table("recipe", "model", "data", "what it does")
    for name in list_recipes():
        recipe = load_recipe(name)
        settings = recipe.settings
        table.add_row(name, settings["model"]["name"], settings["data"]["name"], recipe.description)
    result_console().print(table)
    return 0
