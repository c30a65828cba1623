"""Validation of settings: each function raises a `ConfigError` that states the value, the rule and the fix."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from widekernel.errors import ConfigError, nearest


def require(ok: bool, name: str, value: object, rule: str) -> None:
    """Raise unless `ok`; `rule` completes the sentence "NAME is VALUE, but must be …"."""
    if not ok:
        raise ConfigError(f"{name} is {value!r}, but must be {rule}.")


def require_one_of(name: str, value: object, choices: Collection[str]) -> None:
    """Raise unless `value` is one of `choices`; the message suggests the most similar choice."""
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ConfigError(f"{name} {value!r} is unknown: it must be one of {allowed}.{nearest(str(value), choices)}")


def require_number(name: str, value: object) -> None:
    """Raise unless `value` is a real number and not a boolean."""
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool)
    require(ok, name, value, "a number, such as 0.5")


def require_whole(name: str, value: object, least: int) -> None:
    """Raise unless `value` is a whole number of at least `least`."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(ok, name, value, f"a whole number, at least {least}")


def require_within(name: str, value: Any, low: float, high: float) -> None:
    """Raise unless `value` is a number with `low` <= `value` < `high`."""
    require_number(name, value)
    require(low <= value < high, name, value, f"from {low} to below {high}")


def require_finite(settings: Any, section: str) -> None:
    """Raise if a number among the fields of the dataclass `settings` is infinite or NaN; names start with `section`."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        entries = value if isinstance(value, (tuple, list)) else (value,)
        ok = all(math.isfinite(entry) for entry in entries if isinstance(entry, float))
        require(ok, f"{section}.{field.name}", value, "finite")


def require_literals(settings: Any, section: str = "") -> None:
    """Raise unless each field that is annotated with a `Literal` holds one of its choices; names start with `section`."""
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        if value is None and type(None) in parts:
            continue
        choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        if choices:
            require_one_of(f"{section}.{name}" if section else name, value, choices)


def comma_separated(text: str) -> tuple[str, ...]:
    """Return the parts of a text between its commas, without spaces around them; empty parts do not count."""
    return tuple(part for part in (part.strip() for part in text.split(",")) if part)


def parse_names(option: str, text: str, known: Collection[str]) -> list[str]:
    """Read names separated by commas, and return them in the order of `known`.

    Raises:
        ConfigError: a name is unknown.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{option} has {name!r}.{nearest(name, known)} It takes {', '.join(known)}, separated by commas."
            )
    return [name for name in known if name in names]


def flatten(settings: Mapping[str, Any], whole: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to a dictionary with dotted keys, such as `optimizer.lr`.

    Args:
        settings: nested settings; an empty mapping is kept as a value, and tuples become lists.
        whole: dotted keys of mappings that are kept as values.
        prefix: prefix of all keys.
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key not in whole:
            flat.update(flatten(value, whole, f"{key}."))
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat
