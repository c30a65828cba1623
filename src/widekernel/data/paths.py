"""Expansion of `~` and variables in paths, because no shell expands `--flag=~/x` or a YAML file."""

import os
import re
from pathlib import Path

from widekernel.errors import ConfigError, DataError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expand_path(key: str, text: str, base: Path | None = None) -> str:
    """Expand `~`, `~user`, `$NAME` and `${NAME}` in a path, unless a file or folder of exactly that name exists.

    Args:
        key: the setting, for messages
        text: the path as it was written
        base: the folder that the path is relative to; `None` means the working folder

    Raises:
        ConfigError: a variable is not set, or the path is empty.
    """
    if not text.strip():
        raise ConfigError(f"{key} is {text!r}, but must be a path: give one, or leave it out.")
    if os.path.lexists(text if base is None else base / text):
        return text

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if name not in os.environ:
            raise ConfigError(
                f"{key} is {text!r}, but the variable {name} is not set. Set and export it, or write the full path."
            )
        return os.environ[name]

    return _VARIABLE.sub(value, os.path.expanduser(text))  # noqa: PTH111 - pathlib's form raises for an unknown user


def existing_folder(key: str, text: str | None, what: str) -> Path:
    """Return the folder that a setting names, with `~` and variables expanded.

    Args:
        key: the setting, for messages
        text: its value
        what: what the folder holds, for messages

    Raises:
        ConfigError: the setting is missing, or a variable is not set.
        DataError: there is no such folder.
    """
    if text is None:
        raise ConfigError(f"{key} is not set. Give the folder of {what} (--{key} DIR).")
    path = Path(expand_path(key, text))
    if not path.is_dir():
        found = "is a file" if path.is_file() else "does not exist"
        raise DataError(f"{key} is {str(path)!r}, which {found}. Give the folder of {what}.")
    return path
