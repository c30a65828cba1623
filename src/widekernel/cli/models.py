"""The command `widekernel models`."""

import fnmatch

import jsonargparse
from rich.table import Table

from widekernel.cli.console import result_console
from widekernel.cli.parsing import new_parser, parse
from widekernel.errors import ConfigError, nearest


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "models", "List widekernel's models with parameters (in millions) and default input size.", "[PATTERN]"
    )
    parser.add_argument("pattern", type=str, nargs="?", default="*", help="list only names that match, such as slak*")
    parser.add_argument("--all", action="store_true", help="list timm's other models as well (names only)")
    return parser


def run(arguments: list[str]) -> int:
    """Print the models whose names match a pattern, with their sizes."""
    values = parse(make_parser(), arguments)
    import timm

    import widekernel.models  # noqa: F401 - registers the models

    known = timm.list_models() if values["all"] else list_own_models()
    pattern = values["pattern"]
    names = [name for name in known if fnmatch.fnmatch(name, pattern) or pattern in name]
    if not names:
        raise ConfigError(f"No model matches {pattern!r}.{nearest(pattern, known)} Use a pattern such as slak*.")
    if values["all"]:
        for name in names:
            result_console().print(name)
        return 0
    table = Table("model", "parameters (M)", "input")
    table.columns[1].justify = "right"
    for name in names:
        parameters, size = _describe(name)
        table.add_row(name, f"{parameters / 1e6:.2f}", f"{size}×{size}")
    result_console().print(table)
    return 0


def list_own_models() -> list[str]:
    """List the names of the models that widekernel registers with timm."""
    import timm

    import widekernel.models  # noqa: F401 - registers the models

    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("widekernel.")]


def _describe(name: str) -> tuple[int, int]:
    import timm
    import torch

    from widekernel.tasks.assembly import pretrained_cfg

    # On the meta device, nothing is allocated or initialized.
    with torch.device("meta"):
        model = timm.create_model(name)
    return sum(parameter.numel() for parameter in model.parameters()), int(pretrained_cfg(model)["input_size"][-1])
