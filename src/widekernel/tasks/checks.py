"""Checks of the settings that all tasks share, which need neither data nor the network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from widekernel.engine.loggers import require_packages
from widekernel.engine.optimization import create_optimizer
from widekernel.engine.optimization_config import OptimizerConfig
from widekernel.errors import ConfigError
from widekernel.tasks.config import RunConfig
from widekernel.weights.catalog import is_published


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise a `ConfigError` if there is no such optimizer, or it does not take a setting."""
    create_optimizer(nn.Linear(1, 1), replace(config, layer_decay=None, layer_groups="blocks"))


def check_start(config: RunConfig) -> None:
    """Raise a `ConfigError` if a package is missing, or a file that a run starts from; a resumed run does not read them."""
    require_packages(config.logging)
    require_weights("model.weights", config.model.weights)
    _require_file("sparsity.masks", config.sparsity.masks)


def require_weights(key: str, path: str | None) -> None:
    """Raise a `ConfigError` if the setting `key` names neither a file nor a published checkpoint; null names nothing."""
    if path is None or not is_published(path):
        _require_file(key, path)


def _require_file(key: str, path: str | None) -> None:
    if path is not None and not Path(path).exists():
        raise ConfigError(f"{key} is {path!r}, but there is no such file.")
