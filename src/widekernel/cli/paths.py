"""Settings that are paths, in which `~` and variables are expanded."""

from __future__ import annotations

from typing import Any

from widekernel.data.paths import expand_path

PATHS = frozenset(
    {
        "source", "output", "config", "model.weights", "data.root", "data.class_map", "sparsity.masks",
        "distillation.teacher.weights", "csv", "json", "markdown", "plot", "table",
        "model", "models", "data", "stimuli", "observers", "compare",
    }
)  # fmt: skip
"""Dotted names of the settings, in all commands, that are files or folders of the user.

Splits are not among them: they are relative to `data.root`, or names in a data set, and are expanded where they are opened.
"""


def expand_paths(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings in which all paths are expanded.

    Raises:
        ConfigError: a variable in a path is not set, or a path is empty.
    """
    done: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            done[key] = expand_paths(value, f"{name}.")
        elif name in PATHS and isinstance(value, list):
            done[key] = [expand_path(name, path) for path in value]
        else:
            done[key] = expand_path(name, value) if name in PATHS and isinstance(value, str) else value
    return done
