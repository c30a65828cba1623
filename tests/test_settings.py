"""Validation of settings: accepted values, refused values and the messages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from widekernel.errors import ArgumentError, ConfigError
from widekernel.settings import (
    require_finite,
    require_literals,
    require_number,
    require_one_of,
    require_whole,
    require_within,
)


@dataclass
class Settings:
    rate: Any = 0.5
    pair: Any = (0.1, 1.0)
    mode: Literal["fast", "exact"] = "fast"


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: require_one_of("mode", "fats", ("fast", "exact")), r"mode 'fats' is unknown.*Did you mean 'fast'"),
        (lambda: require_number("rate", "0.4"), r"rate is '0\.4', but must be a number"),
        (lambda: require_number("rate", True), "rate is True, but must be a number"),
        (lambda: require_whole("steps", 1.0, 1), r"steps is 1\.0, but must be a whole number, at least 1"),
        (lambda: require_whole("steps", True, 0), "steps is True"),
        (lambda: require_whole("steps", 0, 1), "steps is 0"),
        (lambda: require_within("rate", 1, 0, 1), "rate is 1, but must be from 0 to below 1"),
        (lambda: require_within("rate", math.nan, 0, 1), "rate is nan"),
        (lambda: require_finite(Settings(rate=math.inf), "loop"), r"loop\.rate is inf, but must be finite"),
        (lambda: require_finite(Settings(pair=(0.1, math.nan)), "loop"), r"loop\.pair is \(0\.1, nan\)"),
        (lambda: require_literals(Settings(mode="slow")), "mode 'slow' is unknown"),  # type: ignore[arg-type]
    ],
)
def test_values_that_are_refused(check: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check()


def test_values_that_are_accepted() -> None:
    require_one_of("mode", "fast", ("fast", "exact"))
    require_number("rate", 1)
    require_whole("steps", 0, 0)
    require_within("rate", 0, 0, 1)
    require_finite(Settings(pair=("x", 1)), "loop")
    require_literals(Settings(mode="exact"))


def test_an_error_in_settings_is_an_error_in_an_argument() -> None:
    assert issubclass(ConfigError, ArgumentError)
    assert issubclass(ConfigError, ValueError)
