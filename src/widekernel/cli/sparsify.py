"""``widekernel sparsify``."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from widekernel.cli.console import ConsoleReporter, results
from widekernel.cli.eval import EvalOptions, add_source_arguments, evaluate_on, source_from
from widekernel.cli.parsing import build, known_keys, new_parser, parse, settings_by_key
from widekernel.data import DataConfig
from widekernel.data.errors import ConfigError
from widekernel.sparsity import save_masks, semi_structured
from widekernel.tasks.loading import Source, load
from widekernel.tasks.saved import save_model
from widekernel.tasks.sparsifying import LearningConfig, Sparsified, SparsifyConfig, agreement, learn, sparsify
from widekernel.training.interrupts import Interrupted

_DESCRIPTION = (
    "Make a trained network sparse: 2:4 or in other blocks, by magnitude, by magnitude after a permutation of channels, or "
    "by training the masks on images (--method learned --data.root FOLDER). With data, the accuracy before and after is "
    "measured. Writes the network with zeros, its masks, and a report as JSON and as a picture."
)


def run(arguments: list[str]) -> int:
    """Sparsify what ``arguments`` name, save it and print what became of it."""
    parser = new_parser("sparsify", _DESCRIPTION)
    add_source_arguments(parser)
    parser.add_class_arguments(SparsifyConfig, as_group=False)
    parser.add_class_arguments(LearningConfig, as_group=False)
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument("--output", type=str | None, default=None, help="file to write; default: beside the source")
    parser.add_argument("--compressed", action="store_true", help="2:4: keep half of the values, and which (smaller file)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    values = parse(parser, arguments)
    source = source_from(values)
    folder, has_data = source.run_folder(), values["data"]["root"] is not None
    if folder is not None:
        settings = {"data": folder.read_config().get("data") or {}}
        parser.set_defaults(settings_by_key(settings, known_keys(parser)))
        values = parse(parser, arguments)
    config, learning = build(SparsifyConfig, values), build(LearningConfig, values)
    data = build(DataConfig, values["data"])
    has_data = has_data or folder is not None
    output = Path(values["output"]) if values["output"] else _default_output(source, config)
    if values["compressed"] and config.block != "2:4":
        raise ConfigError(f"--compressed is for 2:4 networks, but block is {config.block!r}: leave it out.")
    _check_output(output, bool(values["overwrite"]))
    model, saved = load(source)
    if config.method == "learned":
        if not has_data:
            raise ConfigError("method learned trains masks on images: give them with --data.root.")
        try:
            with ConsoleReporter() as reporter:
                done, saved = learn(source, config, learning, data, (output.with_suffix(""), reporter))
        except Interrupted as interruption:
            return 128 + interruption.signal_number
    else:
        done = sparsify(copy.deepcopy(model), config)
    if values["compressed"]:
        semi_structured.save_sparse(done.model, output, saved.to_dict())
    else:
        save_model(done.model, output, saved)
    _write_beside(output, done)
    console = results()
    console.print(f"{output}", markup=False, soft_wrap=True)
    console.print(done.report.summary(), markup=False, soft_wrap=True)
    console.print(f"kept magnitude  {100 * done.kept:.2f} %")
    if has_data:
        options = EvalOptions(learning.batch_size, learning.device)
        before, after = (evaluate_on(network, saved, data, options) for network in (model, done.model))
        console.print(f"top-1           {before.top1:.2f} % before, {after.top1:.2f} % after ({after.images} images)")
    else:
        same = agreement(model, done.model, saved.preprocessing.input_size)
        console.print(f"same class      on {100 * same:.0f} % of 16 random images (no data was given)")
    return 0


def _default_output(source: Source, config: SparsifyConfig) -> Path:
    path = source.path / "model" if source.path.is_dir() else source.path
    block = config.block.replace(":", "to")
    return path.with_name(f"{path.stem}_{block}_{config.method}.safetensors")


def _beside(output: Path) -> tuple[Path, Path, Path]:
    return tuple(  # type: ignore[return-value]
        output.with_name(f"{output.stem}_{rest}") for rest in ("masks.safetensors", "sparsity.json", "sparsity.png")
    )


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix != ".safetensors":
        raise ConfigError(f"The output is {str(output)!r}, but sparse networks are .safetensors files.")
    for path in (output, *_beside(output)):
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists. Choose another --output, or add --overwrite.")


def _write_beside(output: Path, done: Sparsified) -> None:
    masks, report, picture = _beside(output)
    save_masks(done.masks, masks)
    report.write_text(json.dumps(done.report.to_dict(), indent=1))
    picture.write_bytes(done.report.picture())
