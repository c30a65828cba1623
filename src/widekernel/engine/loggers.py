"""Choice of the logs of a run besides metrics.jsonl; their packages are imported only if they are wanted."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from widekernel.engine.logger import Logger
from widekernel.engine.logging_config import LoggingConfig
from widekernel.errors import ConfigError, in_short


def require_packages(config: LoggingConfig) -> None:
    """Import the packages that the loggers need; every process calls this, so that all stop before training.

    Raises:
        ConfigError: a package is missing or cannot be imported, or Weights & Biases lacks the key of an account.
    """
    if config.tensorboard:
        _require("torch.utils.tensorboard", "logging.tensorboard", "tensorboard")
    if config.uses_wandb:
        _require("wandb", "logging.wandb_project", "wandb")
        from widekernel.engine.wandb_logger import require_account

        if config.wandb_mode == "online":
            require_account()


def create_loggers(
    config: LoggingConfig, folder: Path, settings: Mapping[str, Any], message: Callable[[str], object] | None = None
) -> list[Logger]:
    """Return the configured loggers besides metrics.jsonl; they write nothing before `Logger.resume`.

    Args:
        config: settings of the logs.
        folder: run folder.
        settings: all settings of the run, which Weights & Biases shows.
        message: shows where a run can be seen.

    Raises:
        ConfigError: see `require_packages`.
    """
    require_packages(config)
    loggers: list[Logger] = []
    if config.tensorboard:
        from widekernel.engine.tensorboard_logger import TensorBoardLogger

        loggers.append(TensorBoardLogger(folder / "tensorboard"))
    if config.uses_wandb:
        from widekernel.engine.wandb_logger import WandbLogger

        loggers.append(WandbLogger(config, folder, settings, message))
    return loggers


def _require(module: str, key: str, extra: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation may raise anything
        raise ConfigError(
            f"{key} is set, but the package {extra} cannot be imported ({in_short(error)}). "
            f"Install it with `pip install 'widekernel[{extra}]'`, or leave {key} out."
        ) from error
