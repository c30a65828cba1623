"""The errors that widekernel raises on purpose; each message states the value, the rule and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST_IN_SHORT = 200


class WidekernelError(Exception):
    """Base class: the command line prints these without a traceback."""


class ArgumentError(WidekernelError, ValueError):
    """A layer, a network or an operator cannot take the value of an argument."""


class ConfigError(ArgumentError):
    """A setting is unknown, out of range or at odds with another one."""


class DataError(WidekernelError, ValueError):
    """A data set cannot be used: it is missing, empty, inconsistent or unreadable."""


class UnknownArgumentError(WidekernelError, TypeError):
    """A network does not have an argument."""


class CheckpointError(WidekernelError, ValueError):
    """A checkpoint file cannot be read, or does not belong to the model."""


class ShapeError(WidekernelError, ValueError):
    """A layer or network cannot take the shape of a tensor or an image."""


def in_short(error: BaseException) -> str:
    """Return the type and the first line of an error, shortened for a table or a message."""
    line = next(iter(str(error).strip().splitlines()), "")
    text = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return text if len(text) <= _LONGEST_IN_SHORT else f"{text[: _LONGEST_IN_SHORT - 1]}…"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return a suggestion of the known name closest to `name`, to append to an error message, or "" if none is close.

    Args:
        name: what was given.
        known: the names that exist.
        cutoff: how similar the two must be: 1 for equal, 0 for any two.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""
