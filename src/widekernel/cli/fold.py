"""The command `widekernel fold`."""

from dataclasses import replace
from pathlib import Path

import jsonargparse

from widekernel.cli.console import result_console
from widekernel.cli.output_files import check_output_file
from widekernel.cli.parsing import new_parser, parse
from widekernel.cli.source_arguments import add_source_arguments, load_source, source_from
from widekernel.errors import ConfigError
from widekernel.tasks.model_source import ModelSource


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("fold", "Merge branches and batch norms, verify that the outputs stay the same, and save.", "SOURCE")
    add_source_arguments(parser)
    parser.add_argument("--output", type=str | None, default=None, help="file to write; default: beside the source")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def run(arguments: list[str]) -> int:
    """Fold the network that `arguments` name, verify and save it, and print the largest error."""
    values = parse(make_parser(), arguments)
    source = source_from(values)
    wanted = Path(values["output"]) if values["output"] else _default_output(source)
    output = check_output_file(wanted, "folded checkpoints", source.path, bool(values["overwrite"]))
    from widekernel.tasks.folding import fold_and_check
    from widekernel.tasks.saved import save_model

    model, saved = load_source(source, task=None)
    if saved.form == "folded":
        raise ConfigError(f"{source.path} is already folded: it can be used as it is.")
    folded, check = fold_and_check(model, saved.preprocessing.input_size)
    save_model(folded, output, replace(saved, form="folded"))
    console = result_console()
    before, after = (sum(p.numel() for p in network.parameters()) for network in (model, folded))
    console.print(f"{output}", soft_wrap=True)
    console.print(f"parameters     {before:,} before, {after:,} after")
    console.print(
        f"largest error  {check.max_error:.3g} on {check.images} random images (outputs reach {check.max_output:.3g})"
    )
    return 0


def _default_output(source: ModelSource) -> Path:
    path = source.weights_path()
    parts = [
        path.stem,
        *(["best"] if source.state == "best" else []),
        *(["ema"] if source.weights == "ema" else []),
        "folded",
    ]
    return path.with_name(f"{'_'.join(parts)}.safetensors")
