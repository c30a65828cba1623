"""The command `widekernel sparsify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import jsonargparse

from widekernel.cli.console import ConsoleReporter, result_console
from widekernel.cli.options import EvalOptions, add_recipe_argument, parse_with_data_of_the_run
from widekernel.cli.output_files import check_output_file
from widekernel.cli.parsing import build, new_parser
from widekernel.cli.source_arguments import add_source_arguments, load_source, source_from
from widekernel.data.config import DataConfig
from widekernel.errors import ConfigError
from widekernel.sparsity.semi_structured.config import SEMI_STRUCTURED
from widekernel.tasks.model_source import ModelSource
from widekernel.tasks.sparsify.config import MaskLearningConfig, SparsifyConfig

if TYPE_CHECKING:
    from widekernel.tasks.sparsify.magnitude import Sparsified

_DESCRIPTION = (
    "Make a trained network sparse, 2:4 or in other blocks: by magnitude, by magnitude after a permutation of channels, or "
    "with masks learned on images (--method learned --data.root FOLDER). With data, the command also measures the accuracy "
    "before and after. It writes the network with zeros, its masks, and a report as JSON and as a plot."
)


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("sparsify", _DESCRIPTION, "SOURCE")
    add_source_arguments(parser)
    add_recipe_argument(parser)
    parser.add_class_arguments(SparsifyConfig, as_group=False)
    parser.add_class_arguments(MaskLearningConfig, as_group=False)
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument("--output", type=str | None, default=None, help="file to write; default: beside the source")
    parser.add_argument(
        "--compressed",
        action="store_true",
        help="2:4 only: store just the kept half of the values and their positions (smaller output)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    return parser


def run(arguments: list[str]) -> int:
    """Sparsify the network that `arguments` name, save it and print a summary."""
    values, has_data = parse_with_data_of_the_run(make_parser(), arguments, "sparsify")
    source = source_from(values)
    config, learning = build(SparsifyConfig, values), build(MaskLearningConfig, values)
    data = build(DataConfig, values["data"])
    if data != DataConfig() and not has_data:
        raise ConfigError("data settings are given, but no data set: name one with --data.root or --data.name.")
    if values["compressed"] and config.block != SEMI_STRUCTURED:
        raise ConfigError(f"--compressed is for 2:4 networks, but block is {config.block!r}: leave it out.")
    if config.method == "learned" and not has_data:
        raise ConfigError("method learned needs images, but no data set is given: name one with --data.root or --data.name.")
    wanted = Path(values["output"]) if values["output"] else _default_output(source, config)
    output = check_output_file(wanted, "sparse networks", source.path, bool(values["overwrite"]), _beside(wanted))
    _sparsify(source, config, learning, data if has_data else None, (output, bool(values["compressed"])))
    return 0


def _sparsify(
    source: ModelSource, config: SparsifyConfig, learning: MaskLearningConfig, data: DataConfig | None, to: tuple[Path, bool]
) -> None:
    import copy

    from widekernel.cli.evaluation import evaluate_on
    from widekernel.sparsity import semi_structured
    from widekernel.tasks.saved import save_model
    from widekernel.tasks.sparsify.magnitude import agreement, sparsify
    from widekernel.tasks.sparsify.mask_learning import learn_masks

    output, compressed = to
    model, saved = load_source(source)
    options = EvalOptions(learning.batch_size, learning.device)
    # Evaluate first, so that unusable data end the command before anything is written.
    before = None if data is None else evaluate_on(model, saved, data, options, source.run_folder())
    if config.method == "learned":
        assert data is not None
        with ConsoleReporter() as reporter:
            sparse, saved = learn_masks(source, config, learning, data, (output.with_suffix(""), reporter))
    else:
        sparse = sparsify(copy.deepcopy(model).cpu(), config)
    if compressed:
        semi_structured.save_sparse(sparse.model, output, saved.to_dict())
    else:
        save_model(sparse.model, output, saved)
    _write_beside(output, sparse)
    console = result_console()
    console.print(f"{output}", soft_wrap=True)
    console.print(sparse.report.summary(), soft_wrap=True)
    console.print(f"kept magnitude  {100 * sparse.kept:.2f} %")
    if data is not None and before is not None:
        after = evaluate_on(sparse.model, saved, data, options)
        console.print(f"top-1           {before.top1:.2f} % before, {after.top1:.2f} % after ({after.images} images)")
    else:
        same = agreement(model, sparse.model, saved.preprocessing.input_size)
        console.print(f"same class      on {100 * same:.0f} % of 16 random images (no data was given)")


def _default_output(source: ModelSource, config: SparsifyConfig) -> Path:
    path = source.weights_path()
    output = path.with_name(f"{path.stem}_{config.block}_{config.method}.safetensors")
    # Version 0.4 wrote "2to4" in this name. A mask training that it left unfinished must not start over unnoticed.
    started = path.with_name(f"{path.stem}_2to4_learned")
    finished = started.with_name(f"{started.name}.safetensors")
    if config.method == "learned" and started.is_dir() and not finished.exists() and not output.with_suffix("").exists():
        raise ConfigError(
            f"{started} is a mask training that version 0.4 began: continue it with --output {finished}, "
            f"or start over with --output {output}."
        )
    return output


def _beside(output: Path) -> tuple[Path, Path, Path]:
    return tuple(  # type: ignore[return-value]
        output.with_name(f"{output.stem}_{rest}") for rest in ("masks.safetensors", "sparsity.json", "sparsity.png")
    )


def _write_beside(output: Path, sparse: Sparsified) -> None:
    from widekernel.files import write_file
    from widekernel.sparsity import save_masks

    masks, report, picture = _beside(output)
    save_masks(sparse.masks, masks)
    write_file(report, json.dumps(sparse.report.to_dict(), indent=1).encode())
    write_file(picture, sparse.report.picture())
