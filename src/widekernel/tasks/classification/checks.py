"""Checks of the settings of a run that need no data: opening these may take minutes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from widekernel.data import Preprocessing
from widekernel.data.seeding import MODEL_STREAM, scoped_seed
from widekernel.engine.autocast import make_autocast
from widekernel.engine.loggers import require_packages
from widekernel.engine.optimization import create_optimizer
from widekernel.errors import ConfigError
from widekernel.tasks.assembly import check_model
from widekernel.tasks.classification.config import TrainConfig
from widekernel.weights.catalog import is_published


def check_settings(config: TrainConfig, device: torch.device, starts: bool) -> None:
    """Check what can be checked before the data are opened.

    Args:
        config: settings of the run.
        device: device of the network.
        starts: whether the run starts now; if it is resumed, it does not read the files that it started from.

    Raises:
        ConfigError: a setting does not fit the model, the optimizer, the device or this machine.
    """
    make_autocast(config.loop.precision, device)
    with scoped_seed(MODEL_STREAM, config.seed):
        check_model(config.model.name, config.model.args, config.model.grad_checkpointing)
    create_optimizer(nn.Linear(1, 1), replace(config.optimizer, layer_decay=None, layer_groups="blocks"))
    Preprocessing.resolve(config.data, {}).train_transform(config.augment)
    if starts:
        require_packages(config.logging)
        if config.model.weights is None or not is_published(config.model.weights):
            _require_file("model.weights", config.model.weights)
        _require_file("sparsity.masks", config.sparsity.masks)
    teacher = config.distillation.teacher.weights
    if teacher is None or not is_published(teacher):
        _require_file("distillation.teacher.weights", teacher)


def _require_file(key: str, path: str | None) -> None:
    if path is not None and not Path(path).exists():
        raise ConfigError(f"{key} is {path!r}, but there is no such file.")
