"""`export`: write a network in a format, check the file against PyTorch, and put it in its place."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import widekernel
from widekernel.bench.machine import cpu_model, installed_version
from widekernel.errors import ConfigError, WidekernelError, in_short
from widekernel.export.base import ExportError, Format, GraphInputs, Run
from widekernel.export.check import LATENCY_SECONDS, Comparison, compare, latencies, network_run, outputs
from widekernel.export.formats import format_named
from widekernel.export.images import CheckImages, noise
from widekernel.export.kernel_forms import Kernels, with_graph_kernels
from widekernel.files import explained, replace_atomically, write_file
from widekernel.layers.folding import is_folded
from widekernel.layers.training_modes import training_modes_restored
from widekernel.models.base import StagedConvNet
from widekernel.settings import require, require_one_of
from widekernel.tasks.image_channels import input_channels
from widekernel.tasks.saved import SavedModel
from widekernel.transforms.acceleration.fusion import unfused

LIMIT = 1e-4
"""Largest difference of outputs that is accepted, relative to the largest output of PyTorch."""
HALF_LIMIT = 0.05
"""The same for weights in float16."""
_PROBES = 3  # images in a batch that tests dynamic dimensions


@dataclass(frozen=True)
class ExportSettings:
    """What to export.

    Args:
        format: `onnx`, `openvino` or `torch-export`.
        fold: fold networks of this library first.
        dynamic_batch: the file takes any number of images.
        dynamic_size: the file takes images of any height and width.
        half: store the weights in float16.
        int8: quantize weights and activations to 8 bits.
        kernels: sums of rectangles as `strips`, as one `dense` kernel, or as what the format's engine computes faster.
        batch: number of images, if not dynamic; and for the latency.

    Raises:
        ConfigError: a value is unknown, or two contradict each other.
    """

    format: str
    fold: bool = True
    dynamic_batch: bool = False
    dynamic_size: bool = False
    half: bool = False
    int8: bool = False
    kernels: Kernels = "auto"
    batch: int = 1

    def __post_init__(self) -> None:
        format_named(self.format)
        require_one_of("kernels", self.kernels, ("auto", "strips", "dense"))
        require(self.batch > 0, "batch", self.batch, "positive")
        if self.half and self.int8:
            raise ConfigError("--half and --int8 are two precisions: give one of them.")

    @property
    def precision(self) -> str:
        """Precision of the weights."""
        return "int8" if self.int8 else "float16" if self.half else "float32"


@dataclass(frozen=True)
class ExportReport:
    """A finished export.

    Attributes:
        files: the files, the named one last.
        settings: what was exported.
        form: `training` or `folded`.
        kernels: number of large-kernel layers in each form.
        comparison: outputs of the file beside those of the network as it was given.
        source: where the images of the check are from.
        calibration_images: number of images that the quantization was calibrated with.
        shared_images: number of images that were used for calibration and for the check.
        probes: largest difference for other shapes of the input, which dynamic dimensions allow; by shape.
        milliseconds: shortest latency of a batch in widekernel and in the engine.
        machine: processor, threads and versions.
        description: texts in the file.
    """

    files: tuple[Path, ...]
    settings: ExportSettings
    form: str
    kernels: dict[str, int]
    comparison: Comparison
    source: str
    calibration_images: int
    shared_images: int
    probes: dict[str, float]
    milliseconds: dict[str, float]
    machine: dict[str, Any]
    description: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values for JSON."""
        values = asdict(self)
        values["files"] = {path.name: path.stat().st_size for path in self.files}
        return values


@torch.no_grad()
def export(model: nn.Module, path: Path, settings: ExportSettings, saved: SavedModel, images: CheckImages) -> ExportReport:
    """Export `model` to `path` with its report beside it, as `path` with `.json` appended.

    The file is checked before it takes its place: a failed export writes nothing, and replaces nothing.

    Args:
        model: the network, on the CPU; it is not changed.
        path: the file.
        settings: what to export.
        saved: description of the network, which is stored in the file: classes and preprocessing.
        images: images for the check, and for calibration.

    Raises:
        ConfigError: packages are missing, or a setting does not suit the format.
        ExportError: the format cannot represent the network, or the file does not compute the same.
        WidekernelError: the file cannot be written.
    """
    form = format_named(settings.format)
    form.require_packages(settings.int8)
    if path.suffix != form.suffix:
        raise ConfigError(f"The output is {str(path)!r}, but {form.name} exports are {form.suffix} files.")
    if settings.int8 and not len(images.calibration):
        raise ConfigError("Quantization to 8 bits needs images to calibrate with. Give a folder or a .tar archive (--data).")
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if devices - {"cpu"}:
        raise ConfigError(f"The network is on {', '.join(sorted(devices))}, but it must be on the CPU: call model.cpu().")
    with training_modes_restored(model):
        return _export(model.eval(), path, form, settings, saved, images)


def _export(
    model: nn.Module, path: Path, form: Format, settings: ExportSettings, saved: SavedModel, images: CheckImages
) -> ExportReport:
    exported = _folded(model) if settings.fold else model
    # The file has the graph of the code of every block, and native calls in bfloat16 round more than the limit allows.
    original = unfused(model)
    wanted = outputs(_checked_run(original), images.check, settings.batch)
    inputs = _inputs(model, settings, images, saved)
    network, kernels = with_graph_kernels(exported, form.rule, settings.kernels)
    description = describe(saved, exported)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    with temporary as folder:
        draft = Path(folder) / path.name
        _write(form, network, inputs, draft, description, settings, images)
        run = _explained(form, draft)
        got = outputs(run, images.check, settings.batch)
        comparison = compare(wanted, got, saved.num_classes > 0, images.labels(saved.class_names))
        probes = _probe(run, original, inputs)
        _require_equal(comparison, probes, settings)
        sample, ours = images.check[:1].repeat(settings.batch, 1, 1, 1), network_run(exported)
        milliseconds = latencies({"widekernel": lambda: ours(sample), form.engine: lambda: run(sample)}, LATENCY_SECONDS)
        for source, target in zip(form.files(draft), form.files(path)):
            _put(source, target)
    report = ExportReport(
        form.files(path),
        settings,
        _form_of(exported),
        kernels,
        comparison,
        images.source,
        len(images.calibration),
        images.shared,
        probes,
        milliseconds,
        _machine(form),
        description,
    )
    write_file(report_file(path), (json.dumps(report.to_dict(), indent=1, default=str) + "\n").encode())
    return report


def report_file(path: Path) -> Path:
    """Return the file of the report on an export to `path`."""
    return path.with_name(f"{path.name}.json")


def describe(saved: SavedModel, network: nn.Module) -> dict[str, str]:
    """Return the texts that are stored in a file: the model, its classes, and the preprocessing of its images."""
    values = saved.to_dict()
    return {
        "model": saved.name,
        "form": _form_of(network),
        "class_names": json.dumps(values["class_names"]),
        "preprocessing": json.dumps(values["data"]),
        "producer": f"widekernel {widekernel.__version__}",
    }


def _folded(model: nn.Module) -> nn.Module:
    return widekernel.fold(model) if isinstance(model, StagedConvNet) and not is_folded(model) else model


def _form_of(network: nn.Module) -> str:
    return "folded" if is_folded(network) else "training"


def _inputs(model: nn.Module, settings: ExportSettings, images: CheckImages, saved: SavedModel) -> GraphInputs:
    info = getattr(model, "feature_info", None)
    # Maps of one pixel would become constants of a graph for any size.
    least = 2 * max((int(entry["reduction"]) for entry in info), default=1) if isinstance(info, list) else 64
    return GraphInputs(
        channels=input_channels(model),
        size=images.check.shape[-1],
        batch=settings.batch,
        dynamic_batch=settings.dynamic_batch,
        dynamic_size=settings.dynamic_size,
        least_size=least,
        output="logits" if saved.num_classes else "features",
    )


def _checked_run(model: nn.Module) -> Run:
    """Return the function that runs a network, and raises if it does not return one tensor with a row per image."""

    def run(images: Tensor) -> Tensor:
        try:
            with torch.inference_mode():
                found = model(images)
        except WidekernelError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            height, width = images.shape[-2:]
            raise ExportError(
                f"The network fails on images of {height}×{width} pixels ({in_short(error).rstrip('.')}). Choose another "
                "--input_size."
            ) from error
        if not isinstance(found, Tensor):
            raise ExportError(
                f"The network returns a {type(found).__name__}, but only networks with one output are exported."
            )
        return found.clone()

    return run


def _write(
    form: Format,
    network: nn.Module,
    inputs: GraphInputs,
    draft: Path,
    description: Mapping[str, str],
    settings: ExportSettings,
    images: CheckImages,
) -> None:
    """Write the file, through a file in full precision if it is to be quantized."""
    full = draft.with_name(f"full{draft.suffix}") if settings.int8 else draft
    try:
        form.write(network, inputs, full, description, settings.half)
        if settings.int8:
            form.quantize(full, draft, _batches(images.calibration, settings.batch))
    except WidekernelError:
        raise
    except Exception as error:
        hint = " Try without --dynamic_size." if settings.dynamic_size else ""
        raise ExportError(
            f"The network cannot be written as {form.name} ({in_short(error).rstrip('.')}).{hint} "
            "For a graph of plain PyTorch layers, which other converters may take, call `widekernel.to_torch(model)`."
        ) from error


def _put(source: Path, target: Path) -> None:
    """Copy a file to its place, atomically."""
    with explained(target):
        replace_atomically(target, lambda place: shutil.copyfile(source, place))


def _batches(images: Tensor, batch: int) -> list[Tensor]:
    return [part.contiguous() for part in images.split(batch) if len(part) == batch]


def _explained(form: Format, draft: Path) -> Run:
    """Return the function that runs a file; what the engine raises becomes an `ExportError`."""
    try:
        plain = form.load(draft, torch.get_num_threads())
    except Exception as error:
        raise ExportError(
            f"{form.engine} cannot load the file ({in_short(error).rstrip('.')}). Nothing was saved."
        ) from error

    def run(images: Tensor) -> Tensor:
        try:
            return plain(images)
        except Exception as error:
            raise ExportError(
                f"{form.engine} cannot run the file on images of the shape {tuple(images.shape)} "
                f"({in_short(error).rstrip('.')}). Nothing was saved."
            ) from error

    return run


def _probe(run: Run, model: nn.Module, inputs: GraphInputs) -> dict[str, float]:
    """Compare outputs for inputs of other shapes than that of the example, if dimensions are dynamic."""
    batch = _PROBES if inputs.dynamic_batch else inputs.batch
    shapes = [(batch, inputs.size, inputs.size)] if inputs.dynamic_batch else []
    if inputs.dynamic_size:
        shapes.append((batch, inputs.least_size, inputs.size + inputs.least_size))
    found = {}
    for count, height, width in shapes:
        images = noise(count, inputs.channels, height, width)
        try:
            wanted = network_run(model)(images)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ExportError(
                f"The network fails on images of {height}×{width} pixels ({in_short(error).rstrip('.')}), so no file of it "
                "takes images of any size. Try without --dynamic_size. Nothing was saved."
            ) from error
        found[f"{count}×{inputs.channels}×{height}×{width}"] = compare(wanted, run(images), classes=False).max_difference
    return found


def _require_equal(comparison: Comparison, probes: Mapping[str, float], settings: ExportSettings) -> None:
    if settings.int8:
        return
    limit = HALF_LIMIT if settings.half else LIMIT
    largest = max(comparison.max_difference, *probes.values(), 0.0)
    if not largest <= limit:
        raise ExportError(
            f"Outputs of the file differ from those of PyTorch by up to {largest:.3g} of the largest output, but at most "
            f"{limit:g} is accepted. Nothing was saved."
        )


def _machine(form: Format) -> dict[str, Any]:
    packages = ("torch", *form.packages.values(), *(form.int8_packages or {}).values())
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "versions": {"widekernel": widekernel.__version__, **{name: installed_version(name, "-") for name in packages}},
    }
