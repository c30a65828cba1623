"""Which settings are paths, in which ``~`` and variables are expanded."""

from __future__ import annotations

from typing import Any

from widekernel.data.paths import expanded

PATHS = frozenset(
    {
        "source", "output", "config", "model.weights", "data.root", "sparsity.masks", "csv", "markdown", "plot", "table",
    }
)  # fmt: skip
"""Dotted names of the settings of all commands that are files or folders of the user.

Splits are not among them: they are relative to ``data.root``, or names in a data set, and expanded where they are opened.
"""


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
