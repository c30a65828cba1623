"""Learning of 2:4 masks over the frozen weights of a trained network, as a separate run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from widekernel.data import AugmentConfig, DataConfig
from widekernel.engine import EmaConfig, LoopConfig, OptimizerConfig, Reporter, RunFolder, ScheduleConfig
from widekernel.engine.config import SparsityConfig
from widekernel.errors import ConfigError
from widekernel.sparsity import load_masks, semi_structured
from widekernel.sparsity.semi_structured.config import SEMI_STRUCTURED
from widekernel.sparsity.semi_structured.masks import mask_to_choices
from widekernel.sparsity.semi_structured.snapshot import semi_structured_snapshot
from widekernel.tasks.classification.config import ModelConfig, TrainConfig
from widekernel.tasks.classification.run import train
from widekernel.tasks.loading import load
from widekernel.tasks.model_source import ModelSource
from widekernel.tasks.saved import SavedModel, save_model
from widekernel.tasks.sparsify.config import MaskLearningConfig, SparsifyConfig
from widekernel.tasks.sparsify.magnitude import Sparsified, magnitudes, semi_structured_config, sparsified
from widekernel.tensor_files import read_tensors

_START = "start.safetensors"  # copy of the trained network in the run folder
_BEFORE_FIRST_STEP = {_START, ".lock"}  # files left by a run that was killed before its first step


def learn_masks(
    source: ModelSource, config: SparsifyConfig, learning: MaskLearningConfig, data: DataConfig, where: tuple[Path, Reporter]
) -> tuple[Sparsified, SavedModel]:
    """Train 2:4 masks for a network whose weights do not change, in a run folder from which it can be resumed.

    Args:
        source: the trained network.
        config: selection of the layers.
        learning: settings of the training.
        data: the images; settings that are not set are those of the network.
        where: the run folder, and a reporter of progress.

    Returns:
        the sparse network, and the description of the trained one.

    Raises:
        ConfigError: the network is folded, or the run folder contains something else.
    """
    folder, reporter = where
    model, saved = load(source)
    if saved.form != "training":
        raise ConfigError(
            f"{source.path} is folded; masks are learned before folding. Give the network from which it was folded."
        )
    _check_start(model, folder, source)
    settings = TrainConfig(
        seed=config.seed,
        output=str(folder),
        label_smoothing=0.0,
        model=ModelConfig(saved.name, saved.num_classes, dict(saved.model_args), weights=str(folder / _START)),
        data=_data_like(saved, data),
        augment=_augmentation_of(source),
        optimizer=OptimizerConfig(lr=learning.lr, weight_decay=0.0),
        schedule=ScheduleConfig(epochs=learning.epochs, warmup_epochs=0),
        ema=EmaConfig(decay=None),
        loop=LoopConfig(batch_size=learning.batch_size, device=learning.device),
        sparsity=SparsityConfig(SEMI_STRUCTURED, semi_structured=semi_structured_config(config)),
    )
    _train_from(model, saved, settings, reporter)
    return _with_learned_masks(model, folder, config), saved


def _train_from(model: nn.Module, saved: SavedModel, settings: TrainConfig, reporter: Reporter) -> None:
    """Save the network in the run folder, and train; remove the file again if the run did not begin."""
    assert settings.output is not None
    run = RunFolder(Path(settings.output))
    start = run.path / _START
    made = run.make_writable()
    is_new = not start.exists()
    if is_new:
        save_model(model, start, saved)
    try:
        train(settings, reporter)
    finally:
        if is_new and not run.has_begun():  # otherwise the file belongs to another process
            start.unlink()
            for each in reversed(made):
                with suppress(OSError):  # a folder that is not empty stays
                    each.rmdir()


def _with_learned_masks(model: nn.Module, folder: Path, config: SparsifyConfig) -> Sparsified:
    """Return the network of a finished run, with its choices attached so that it can be saved compressed."""
    learned, _ = load(ModelSource(folder))
    masks = load_masks(RunFolder(folder).masks, learned)
    # Magnitude masks apply to the same layers, and the other layers are excluded for the same reasons.
    by_magnitude = semi_structured_config(replace(config, method="magnitude"))
    trial = semi_structured.prepare(copy.deepcopy(model), by_magnitude)
    choices = {
        name: mask_to_choices(masks[name], known.axis, known.groups, name) for name, known in trial.manifest.weights.items()
    }
    semi_structured.prepare(learned, by_magnitude, choices=choices)
    plain = semi_structured.convert(learned)
    return sparsified(plain, masks, semi_structured_snapshot(plain, trial.report, masks), magnitudes(model))


def _check_start(model: nn.Module, folder: Path, source: ModelSource) -> None:
    """Raise unless the run folder is new, or belongs to a run that learns masks for exactly this network."""
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if found <= _BEFORE_FIRST_STEP and not RunFolder(folder).has_begun():
        return
    start = folder / _START
    if not start.is_file():
        if found:
            raise ConfigError(f"{folder}, where masks would be learned, holds something else. Choose another --output.")
        return
    started, own = read_tensors(start), model.state_dict()
    if started.keys() != own.keys() or any(not torch.equal(started[name], value.cpu()) for name, value in own.items()):
        raise ConfigError(
            f"{folder} learns masks of another network than {source.path}. Choose another --output, or remove that folder."
        )


def _data_like(saved: SavedModel, data: DataConfig) -> DataConfig:
    """Return the data settings, completed by the network's preprocessing."""
    known = saved.preprocessing
    keeps_crop = data.crop_pct is None and data.input_size in (None, known.input_size)
    return replace(
        data,
        input_size=data.input_size or known.input_size,
        mean=data.mean or _triple(known.mean),
        std=data.std or _triple(known.std),
        interpolation=data.interpolation or known.interpolation,
        crop_pct=data.crop_pct or known.crop_pct,
        test_crop=data.test_crop or (known.unusual_crop() if keeps_crop else None),
    )


def _augmentation_of(source: ModelSource) -> AugmentConfig:
    """Return the augmentation that the network was trained with, without mixing.

    If this is unknown, because the source is not in a run folder, images are only cropped, to most of their area.
    """
    run = source.run_folder()
    no_mixing: dict[str, Any] = {"mixup": 0.0, "cutmix": 0.0}
    if run is None:
        light: dict[str, Any] = {"hflip": 0.0, "color_jitter": 0.0, "auto_augment": None, "erase_prob": 0.0}
        return AugmentConfig(crop_scale=(0.7, 1.0), **light, **no_mixing)
    saved: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in (run.read_config().get("augment") or {}).items()
    }
    return AugmentConfig(**{**saved, **no_mixing})


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = values
    return float(first), float(second), float(third)
