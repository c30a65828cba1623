"""The errors that widekernel raises on purpose; each message states the value, the rule and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST_IN_SHORT = 200


class WidekernelError(Exception):
    """Base class: the command line prints these without a traceback."""


class ArgumentError(WidekernelError, ValueError):
    """An argument of a layer, a network or an operator that it cannot take."""


class ConfigError(ArgumentError):
    """A setting that is unknown, out of range or at odds with another one."""


class DataError(WidekernelError, ValueError):
    """A data set that cannot be used: missing, empty, inconsistent or unreadable."""


class UnknownArgumentError(WidekernelError, TypeError):
    """An argument that a network does not have."""


class CheckpointError(WidekernelError, ValueError):
    """A checkpoint file that cannot be read, or that does not belong to the model."""


class ShapeError(WidekernelError, ValueError):
    """A tensor or an image of a shape that the layer or network cannot take."""


def in_short(error: BaseException) -> str:
    """Give the kind and the first line of an error, for a table."""
    line = next(iter(str(error).strip().splitlines()), "")
    text = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return text if len(text) <= _LONGEST_IN_SHORT else f"{text[: _LONGEST_IN_SHORT - 1]}…"


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that is closest to `name`, as the tail of an error message ('' if none is close)."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
