"""``widekernel complexity``."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from widekernel.cli.console import results
from widekernel.cli.eval import source_from
from widekernel.cli.parsing import new_parser, parse, typed
from widekernel.data.config import require
from widekernel.tasks.assembly import build_model, pretrained_cfg
from widekernel.tasks.loading import Weights, load

_DESCRIPTION = (
    "Count parameters, multiply-accumulates and activations of a model: dense, without zero weights (the figures of the "
    "papers), folded, and realised (folded and without what is dead, which is what is computed)."
)
_ROWS = (("parameters (M)", "params", 1e6), ("MACs (G)", "macs", 1e9), ("activations (M)", "activations", 1e6))
_FILES = (".safetensors", ".pth", ".pt")


def run(arguments: list[str]) -> int:
    """Print parameters, multiply-accumulates and activations of a model in the columns dense, non-zero and realised."""
    parser = new_parser("complexity", _DESCRIPTION)
    parser.add_argument("source", type=str, help="model name (`widekernel models`), run folder, or checkpoint file")
    parser.add_argument("--weights", type=Weights, default="model", help="the weights, or their moving average")
    parser.add_argument("--state", choices=["last", "best"], default="last", help="which weights of a run folder")
    parser.add_argument("--model", type=str | None, default=None, help="model name, for a file that does not tell")
    parser.add_argument("--num_classes", type=int | None, default=None, help="outputs of the model")
    parser.add_argument("--model_args", type=dict[str, Any] | None, default=None, help="further arguments of the model")
    parser.add_argument("--input_size", type=int | None, default=None, help="pixels; default: the model's own")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    values = parse(parser, arguments)
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
    table = Table("", *columns, title=f"{values['source']} at {tuple(input_size)}")
    for column in table.columns[1:]:
        column.justify = "right"
    if counted.published_macs != counted.training.macs:
        table.caption = f"as the authors' code executes it, training takes {counted.published_macs / 1e9:.4g} GMACs"
    for label, key, unit in _ROWS:
        table.add_row(label, *(f"{getattr(cost, key) / unit:.4g}" for cost in columns.values()))
    results().print(table)
    return 0


def _network(values: dict[str, Any]) -> tuple[nn.Module, tuple[int, int, int]]:
    """Give the network that the arguments name, and the (channels, height, width) of its images."""
    from widekernel.models import list_models

    source = Path(values["source"])
    is_file = source.exists() or values["model"] is not None or source.suffix in _FILES or len(source.parts) > 1
    if values["source"] not in list_models() and is_file:
        model, saved = load(source_from(values))
        pixels = saved.preprocessing.input_size
        return model, (int(getattr(model, "in_chans", 3)), pixels, pixels)
    useless = [f"--{key}" for key, default in (("weights", "model"), ("state", "last")) if values[key] != default]
    require(not useless, "source", values["source"], f"a run folder or a checkpoint file for {' and '.join(useless)}")
    model = build_model(values["source"], values["num_classes"], typed(values["model_args"] or {}))
    return model, tuple(pretrained_cfg(model)["input_size"])  # type: ignore[return-value]
