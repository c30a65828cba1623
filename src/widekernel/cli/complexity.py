"""The command `widekernel complexity`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse
from rich.table import Table

from widekernel.cli.console import table_console
from widekernel.cli.parsing import new_parser, parse, typed
from widekernel.cli.source_arguments import add_source_arguments, load_source, source_from
from widekernel.settings import require

if TYPE_CHECKING:
    from torch import nn

_DESCRIPTION = (
    "Count parameters, multiply-accumulates and activations of a model: dense, without zero weights (as the papers "
    "count), folded, and realized (folded and compacted, as the network runs)."
)
_ROWS = (("parameters (M)", "params", 1e6), ("MACs (G)", "macs", 1e9), ("activations (M)", "activations", 1e6))
_FILES = (".safetensors", ".pth", ".pt")


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("complexity", _DESCRIPTION, "SOURCE")
    add_source_arguments(parser, "model name (`widekernel models`), run folder, or checkpoint file")
    parser.add_argument("--input_size", type=int | None, default=None, help="image size in pixels; default: the model's own")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: list[str]) -> int:
    """Print parameters, multiply-accumulates and activations of a model in several forms."""
    values = parse(make_parser(), arguments)
    size = values["input_size"]
    require(size is None or size > 0, "input_size", size, "positive")
    from widekernel.analysis.complexity import complexity

    model, own_size = _network(values)
    input_size = (own_size[0], size, size) if size else own_size
    counted = complexity(model, input_size=input_size)
    if values["json"]:
        sys.stdout.write(json.dumps(counted.to_dict()) + "\n")
        return 0
    columns = counted.columns()
    console = table_console()
    console.print(f"{values['source']} at {tuple(input_size)}", soft_wrap=True)
    table = Table("", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    if counted.published_macs != counted.training.macs:
        table.caption = f"the authors' code needs {counted.published_macs / 1e9:.4g} GMACs in training"
    for label, key, unit in _ROWS:
        table.add_row(label, *(f"{getattr(cost, key) / unit:.4g}" for cost in columns.values()))
    console.print(table)
    return 0


def _network(values: dict[str, Any]) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return the network that the arguments name, and the size (channels, height, width) of its images."""
    from widekernel.models import list_models
    from widekernel.tasks.assembly import build_model, pretrained_cfg
    from widekernel.tasks.image_channels import input_channels

    source = Path(values["source"])
    is_file = source.exists() or values["model"] is not None or source.suffix in _FILES or len(source.parts) > 1
    if values["source"] not in list_models() and is_file:
        model, saved = load_source(source_from(values))
        pixels = saved.preprocessing.input_size
        return model, (input_channels(model), pixels, pixels)
    useless = [f"--{key}" for key, default in (("weights", "model"), ("state", "last")) if values[key] != default]
    require(not useless, "source", values["source"], f"a run folder or a checkpoint file for {' and '.join(useless)}")
    model = build_model(values["source"], values["num_classes"], typed(values["model_args"] or {}))
    _, height, width = pretrained_cfg(model).get("input_size", (3, 224, 224))
    return model, (input_channels(model), height, width)
