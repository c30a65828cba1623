"""Checks of the settings of a run that need no data: opening these may take minutes."""

from __future__ import annotations

import torch

from widekernel.data import Preprocessing
from widekernel.data.seeding import MODEL_STREAM, scoped_seed
from widekernel.engine.autocast import make_autocast
from widekernel.tasks.assembly import check_model
from widekernel.tasks.checks import check_optimizer, check_start, require_weights
from widekernel.tasks.classification.config import TrainConfig


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
    check_optimizer(config.optimizer)
    Preprocessing.resolve(config.data, {}).train_transform(config.augment)
    if starts:
        check_start(config)
    require_weights("distillation.teacher.weights", config.distillation.teacher.weights)
