"""Paths as people write them: with ``~`` and variables, which no shell expands in ``--flag=~/x`` or in a YAML file."""

from __future__ import annotations

import os
import re
from typing import Any

from widekernel.data.errors import ConfigError
from widekernel.errors import nearest

PATHS = frozenset(
    {
        "source", "output", "config", "model.weights", "data.root", "sparsity.masks", "csv", "markdown", "plot", "table",
    }
)  # fmt: skip
"""Dotted names of the settings of all commands that are files or folders of the user."""

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expanded(key: str, text: str) -> str:
    """Expand ``~``, ``~user``, ``$NAME`` and ``${NAME}`` in a path, unless there is one of just that name.

    Args:
        key: the setting, for messages.
        text: the path as it was written.

    Raises:
        ConfigError: a variable is not set, or nothing is left.
    """
    if not text.strip():
        raise ConfigError(f"{key} is {text!r}, but must be a path: give one, or leave it out.")
    if os.path.lexists(text):
        return text

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if name not in os.environ:
            raise ConfigError(
                f"{key} is {text!r}, but the variable {name} is not set.{nearest(name, os.environ)} "
                "Set and export it, or write the path out."
            )
        return os.environ[name]

    return _VARIABLE.sub(value, os.path.expanduser(text))  # noqa: PTH111 - of pathlib's form an unknown user is an error


def with_paths_expanded(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Expand every path among nested settings."""
    done: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            done[key] = with_paths_expanded(value, f"{name}.")
        else:
            done[key] = expanded(name, value) if name in PATHS and isinstance(value, str) else value
    return done
