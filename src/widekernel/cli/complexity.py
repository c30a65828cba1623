"""``widekernel complexity``."""

from rich.table import Table

from widekernel.cli.console import results
from widekernel.cli.parsing import new_parser, parse
from widekernel.data.config import require
from widekernel.tasks.assembly import build_model, pretrained_cfg


def run(arguments: list[str]) -> int:
    """Print parameters, multiply-accumulates and activations of a model, as trained and folded."""
    parser = new_parser("complexity", "Count parameters, multiply-accumulates and activations of a model.")
    parser.add_argument("model", type=str, help="model name; `widekernel models` lists them")
    parser.add_argument("--input_size", type=int | None, default=None, help="pixels; default: the model's own")
    values = parse(parser, arguments)
    size = values["input_size"]
    require(size is None or size > 0, "input_size", size, "positive")
    from widekernel.analysis.complexity import complexity

    model = build_model(values["model"], None, {})
    input_size = (3, size, size) if size else tuple(pretrained_cfg(model)["input_size"])
    table = Table("form", "parameters (M)", "MACs (G)", "activations (M)", title=f"{values['model']} at {input_size}")
    for column in table.columns[1:]:
        column.justify = "right"
    counted = complexity(model, input_size=input_size)
    if counted.published_macs != counted.training.macs:
        table.caption = f"as the authors' code executes it, training takes {counted.published_macs / 1e9:.4g} GMACs"
    for label, params, macs, activations in counted.rows():
        table.add_row(label, f"{params / 1e6:.4g}", f"{macs / 1e9:.4g}", f"{activations / 1e6:.4g}")
    results().print(table)
    return 0
