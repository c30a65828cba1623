"""Validation of the settings that several families share; each function raises a `ConfigError`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from widekernel.errors import ConfigError
from widekernel.settings import require


def require_one_per_stage(**settings: Sequence[Any]) -> None:
    """Raise unless all settings are sequences of the same length: one entry per stage."""
    for name, values in settings.items():
        if not isinstance(values, Sequence):
            raise ConfigError(f"{name} must be a sequence with one entry per stage, not {values!r}")
        if name == "depths" and not all(isinstance(value, int) and value >= 0 for value in values):
            raise ConfigError(f"depths are {tuple(values)}: every stage needs a whole number of blocks, 0 or more")
    lengths = {name: len(values) for name, values in settings.items()}
    if len(set(lengths.values())) != 1:
        raise ConfigError(f"these settings need one entry per stage, so their lengths must agree, but they are {lengths}")


def require_channels(**widths: Sequence[int]) -> None:
    """Raise unless every stage has at least one channel; the values may be computed from other settings."""
    for name, values in widths.items():
        if min(values) < 1:
            raise ConfigError(f"{name} are {tuple(values)}: every stage needs at least one channel")


def require_drop_rates(**rates: float | None) -> None:
    """Raise unless every rate is None or a number from 0 to below 1."""
    for name, rate in rates.items():
        ok = rate is None or (not isinstance(rate, bool) and isinstance(rate, (int, float)) and 0 <= rate < 1)
        require(ok, name, rate, "a number from 0 to below 1")
