"""Making a trained network sparse without training it, or by training nothing but its 2:4 masks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from widekernel.data import AugmentConfig, DataConfig
from widekernel.errors import ConfigError
from widekernel.sparsity import DynamicSparsity, DynamicSparsityConfig, SparsityReport, load_masks, semi_structured
from widekernel.sparsity.selection import Choice
from widekernel.tasks.classification import train
from widekernel.tasks.config import ModelConfig, TrainConfig
from widekernel.tasks.image_channels import input_channels
from widekernel.tasks.loading import load
from widekernel.tasks.model_source import ModelSource
from widekernel.tasks.saved import SavedModel, save_model
from widekernel.tasks.sparsify_config import LearningConfig, SparsifyConfig
from widekernel.tensor_files import read_tensors
from widekernel.training import EmaConfig, LoopConfig, OptimizerConfig, Reporter, RunFolder, ScheduleConfig
from widekernel.training.config import SparsityConfig


@dataclass(frozen=True)
class Sparsified:
    """A sparse network and what became of its layers.

    Attributes:
        model: plain network with zeros, in evaluation mode.
        masks: parameter name -> bool.
        report: per parameter or layer.
        kept: share of the summed magnitude of the masked weights that is left.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    report: SparsityReport
    kept: float


def sparsify(model: nn.Module, config: SparsifyConfig) -> Sparsified:
    """Mask a network by magnitude, after a permutation of its channels if asked for; changes the network.

    Raises:
        ArgumentError: nothing can be masked, or a setting is out of range.
        ConfigError: the method needs training: see `learn`.
    """
    if config.method == "learned":
        raise ConfigError("method learned needs images: give --data.root or --data.name.")
    before = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
    if config.block == "2:4":
        controller = semi_structured.prepare(model, _two_four(config))
        masks = controller.masks
        kept = {_weight(row): row.kept for row in controller.report if row.masked}
        weights = {name: float(before[name].sum()) for name in kept}
        share = sum(kept[name] * weight for name, weight in weights.items()) / max(1e-30, sum(weights.values()))
        plain = semi_structured.convert(model).eval()
        return Sparsified(plain, masks, SparsityReport.of(plain, _choices(controller.report), masks), share)
    settings = DynamicSparsityConfig(
        sparsity=config.sparsity,
        init="magnitude",
        growth="none",
        layers=_patterns(config.layers) or "all",
        exclude=_patterns(config.exclude),
        block=config.block,
        seed=config.seed,
    )
    # The masks need an optimizer to hold on to, which makes no step.
    pruned = DynamicSparsity(model, torch.optim.SGD(model.parameters(), 0.0), settings)
    pruned.remove()
    live = sum(float(before[name][mask].sum()) for name, mask in pruned.masks.items())
    total = sum(float(before[name].sum()) for name in pruned.masks)
    report = SparsityReport.of(model, pruned.choices, pruned.masks)
    return Sparsified(model.eval(), pruned.masks, report, live / max(1e-30, total))


def learn(
    source: ModelSource, config: SparsifyConfig, learning: LearningConfig, data: DataConfig, where: tuple[Path, Reporter]
) -> tuple[Sparsified, SavedModel]:
    """Train the 2:4 masks of a network whose weights stay as they are, in a run folder that can be resumed.

    Args:
        source: the trained network.
        config: which layers.
        learning: how.
        data: the images; what it leaves open follows the network.
        where: the run folder, and who is told about progress.
    """
    folder, reporter = where
    model, saved = load(source)
    if saved.form != "training":
        raise ConfigError(f"{source.path} is folded; masks are learned before folding. Give the network it was made from.")
    reference, run = folder / "start.safetensors", RunFolder(folder)
    _check_start(model, reference, source)
    made = run.make_writable()
    begins = not reference.exists()
    if begins:
        save_model(model, reference, saved)
    settings = TrainConfig(
        seed=config.seed,
        output=str(folder),
        label_smoothing=0.0,
        model=ModelConfig(saved.name, saved.num_classes, dict(saved.model_args), weights=str(reference)),
        data=_data_of(data, saved),
        augment=_augment_of(source),
        optimizer=OptimizerConfig(lr=learning.lr, weight_decay=0.0),
        schedule=ScheduleConfig(epochs=learning.epochs, warmup_epochs=0),
        ema=EmaConfig(decay=None),
        loop=LoopConfig(batch_size=learning.batch_size, device=learning.device),
        sparsity=SparsityConfig("2:4", semi_structured=_two_four(config)),
    )
    try:
        train(settings, reporter)
    finally:
        if begins and not run.has_begun():  # otherwise the file is that of another process
            reference.unlink()
            for each in reversed(made):
                with suppress(OSError):  # a folder that is not empty stays
                    each.rmdir()
    learned, _ = load(ModelSource(folder))
    masks = load_masks(RunFolder(folder).masks, learned)
    # The same layers are chosen by any method; this one finds the reasons against the others again.
    plain = _two_four(replace(config, method="magnitude"))
    dry = semi_structured.prepare(copy.deepcopy(model), plain)
    choices = {
        name: semi_structured.mask_to_choices(masks[name], known.axis, known.groups, name)
        for name, known in dry.manifest.weights.items()
    }
    semi_structured.prepare(learned, plain, choices=choices)
    learned = semi_structured.convert(learned).eval()  # which remembers its choices, so that it can be compressed
    before, after = dict(model.named_parameters()), dict(learned.named_parameters())
    live, total = (sum(float(weights[name].detach().abs().sum()) for name in masks) for weights in (after, before))
    return Sparsified(
        learned, masks, SparsityReport.of(learned, _choices(dry.report), masks), live / max(1e-30, total)
    ), saved


_NOT_YET = {"start.safetensors", ".lock"}
"""What a run that was killed before its first step leaves."""


def _check_start(model: nn.Module, reference: Path, source: ModelSource) -> None:
    """Raise unless the run folder is new, or learns the masks of just this network."""
    folder = reference.parent
    if not folder.exists() or ({path.name for path in folder.iterdir()} <= _NOT_YET and not RunFolder(folder).has_begun()):
        return
    if not reference.is_file():
        if any(folder.iterdir()):
            raise ConfigError(f"{folder}, where masks would be learned, holds something else. Choose another --output.")
        return
    started, own = read_tensors(reference), model.state_dict()
    if started.keys() != own.keys() or any(not torch.equal(started[name], value.cpu()) for name, value in own.items()):
        raise ConfigError(
            f"{folder} learns masks of another network than {source.path}. Choose another --output, or remove that folder."
        )


def _choices(rows: Sequence[semi_structured.LayerReport]) -> list[Choice]:
    """Tell of 2:4 layers as of other masked parameters."""
    return [Choice(_weight(row), tuple(row.shape), "" if row.masked else row.reason) for row in rows]


def _weight(row: semi_structured.LayerReport) -> str:
    return f"{row.name}.weight".lstrip(".")


def agreement(model: nn.Module, other: nn.Module, input_size: int, images: int = 16) -> float:
    """Share of random images on which two networks have the same first class."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(images, input_channels(model), input_size, input_size, generator=generator)
    with torch.inference_mode():
        same = model.eval()(inputs).argmax(1) == other.eval()(inputs).argmax(1)
    return float(same.float().mean())


def _two_four(config: SparsifyConfig) -> semi_structured.SemiStructuredConfig:
    layers: Literal["all"] | tuple[str, ...] = _patterns(config.layers) or "all"
    return semi_structured.SemiStructuredConfig(
        method=config.method, axis=config.axis, layers=layers, exclude=_patterns(config.exclude), seed=config.seed
    )


def _patterns(text: str | None) -> tuple[str, ...]:
    return tuple(pattern.strip() for pattern in (text or "").split(",") if pattern.strip())


def _data_of(data: DataConfig, saved: SavedModel) -> DataConfig:
    known = saved.preprocessing
    return replace(
        data,
        input_size=data.input_size or known.input_size,
        mean=data.mean or _triple(known.mean),
        std=data.std or _triple(known.std),
        interpolation=data.interpolation or known.interpolation,
        crop_pct=data.crop_pct or known.crop_pct,
    )


def _augment_of(source: ModelSource) -> AugmentConfig:
    """What the network was trained with, without mixing; for a file of unknown history, crops of most of the image."""
    run = source.run_folder()
    plain: dict[str, Any] = {"mixup": 0.0, "cutmix": 0.0}
    if run is None:
        light: dict[str, Any] = {"hflip": 0.0, "color_jitter": 0.0, "auto_augment": None, "erase_prob": 0.0}
        return AugmentConfig(crop_scale=(0.7, 1.0), **light, **plain)
    saved: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in (run.read_config().get("augment") or {}).items()
    }
    return AugmentConfig(**{**saved, **plain})


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = values
    return float(first), float(second), float(third)
