"""``widekernel fold``."""

from dataclasses import replace
from pathlib import Path

from widekernel.cli.console import results
from widekernel.cli.eval import add_source_arguments, source_from
from widekernel.cli.parsing import new_parser, parse
from widekernel.data.errors import ConfigError
from widekernel.tasks.folding import fold_and_check
from widekernel.tasks.loading import Source, load
from widekernel.tasks.saved import save_model


def run(arguments: list[str]) -> int:
    """Fold what ``arguments`` name, verify it, save it, and print the error."""
    parser = new_parser("fold", "Merge branches and batch norms, verify that the outputs are the same, and save.")
    add_source_arguments(parser)
    parser.add_argument("--output", type=str | None, default=None, help="file to write; default: beside the source")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    values = parse(parser, arguments)
    source = source_from(values)
    output = Path(values["output"]) if values["output"] else _default_output(source)
    if output.suffix != ".safetensors":
        raise ConfigError(f"The output is {str(output)!r}, but folded checkpoints are .safetensors files.")
    if output.exists() and not values["overwrite"]:
        raise ConfigError(f"{output} exists. Choose another --output, or add --overwrite.")
    model, saved = load(source)
    if saved.form == "folded":
        raise ConfigError(f"{source.path} is folded already.")
    folded, check = fold_and_check(model, saved.preprocessing.input_size)
    save_model(folded, output, replace(saved, form="folded"))
    console = results()
    before, after = (sum(p.numel() for p in network.parameters()) for network in (model, folded))
    console.print(f"{output}", markup=False, soft_wrap=True)
    console.print(f"parameters     {before:,} before, {after:,} after")
    console.print(
        f"largest error  {check.max_error:.3g} on {check.images} random images (outputs reach {check.max_output:.3g})"
    )
    return 0


def _default_output(source: Source) -> Path:
    path = source.path / "model" if source.path.is_dir() else source.path
    parts = [
        path.stem,
        *(["best"] if source.state == "best" else []),
        *(["ema"] if source.weights == "ema" else []),
        "folded",
    ]
    return path.with_name(f"{'_'.join(parts)}.safetensors")
