"""Errors that widekernel raises on purpose; each message states the value, the rule and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

_LONGEST_IN_SHORT = 200


class WidekernelError(Exception):
    """Base class of these errors, which the command line prints without a traceback.

    Attributes:
        exit_code: exit code of a command that ends with the error.
    """

    exit_code: ClassVar[int] = 2


class ArgumentError(WidekernelError, ValueError):
    """Error for an argument whose value a layer, a network or an operator cannot take."""


class ConfigError(ArgumentError):
    """Error for a setting that is unknown, out of range or inconsistent with another one."""


class DataError(WidekernelError, ValueError):
    """Error for a data set that is missing, empty, inconsistent or unreadable."""


class UnknownArgumentError(WidekernelError, TypeError):
    """Error for an argument that a network does not have."""


class CheckpointError(WidekernelError, ValueError):
    """Error for a checkpoint file that cannot be read, or does not belong to the model."""


class FetchError(WidekernelError, OSError):
    """Error for a published file that cannot be fetched; the message says where it is and where to put it by hand."""


class ShapeError(WidekernelError, ValueError):
    """Error for a tensor or an image whose shape a layer or network cannot take."""


def in_short(error: BaseException) -> str:
    """Return the type and the first line of an error, shortened for a table or a message."""
    line = next(iter(str(error).strip().splitlines()), "")
    text = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return text if len(text) <= _LONGEST_IN_SHORT else f"{text[: _LONGEST_IN_SHORT - 1]}…"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return the sentence "Did you mean ...?" with the known name closest to `name`, or "" if none is close.

    Args:
        name: the name that was given.
        known: the names that exist.
        cutoff: required similarity, from 0 (any two names) to 1 (equal names).
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""
