"""Checks of the files that a command will write, made before any long computation."""

from __future__ import annotations

import os
from pathlib import Path

from widekernel.engine.run_folder import RunFolder
from widekernel.errors import ConfigError
from widekernel.files import explained


def check_output_file(
    path: Path, what: str, source: Path, overwrite: bool, beside: tuple[Path, ...] = (), suffix: str = ".safetensors"
) -> Path:
    """Check that a file can be written to `path` and that nothing is lost, and return `path`.

    Args:
        path: the file.
        what: kind of file, in the plural, for messages.
        source: the network that the file is made from.
        overwrite: whether existing files, except the source, may be replaced.
        beside: other files that will be written, too.
        suffix: suffix that the file must have.

    Raises:
        ConfigError: a file has another suffix, exists already or is the source, or its folder cannot be written.
    """
    if path.suffix != suffix:
        raise ConfigError(f"The output is {str(path)!r}, but {what} are {suffix} files.")
    for file in (path, *beside):
        if file.is_dir():
            raise ConfigError(f"The output is {str(file)!r}, which is a folder. Give --output a file.")
        if file.exists() and any(file.samefile(own) for own in _files_of(source)):
            raise ConfigError(f"The output {str(file)!r} is the source, which would be lost. Choose another --output.")
        if file.exists() and not overwrite:
            raise ConfigError(f"{file} exists. Choose another --output, or add --overwrite.")
    check_output_folder(path.parent, "--output")
    return path


def _files_of(source: Path) -> list[Path]:
    """Return the files that a network is read from: the file itself, or the results of the run in the folder."""
    run = RunFolder(source)
    return [path for path in (source, run.model, run.model_ema, run.masks) if path.is_file()]


def check_results_folder(folder: Path, results: str, overwrite: bool) -> None:
    """Raise a `ConfigError` if the folder cannot be written, or holds the file `results` and nothing may be replaced."""
    check_output_folder(folder, "--output")
    if (folder / results).exists() and not overwrite:
        raise ConfigError(f"{folder} holds earlier results ({results}). Choose another --output, or add --overwrite.")


def make_folder(folder: Path) -> None:
    """Create a folder unless it exists.

    Raises:
        WidekernelError: the system refuses.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)


def check_output_folder(folder: Path, option: str) -> None:
    """Raise a `ConfigError` unless files can be created in `folder`, which need not exist yet."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"{option} leads into {str(there)!r}, which is a file. Choose a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} leads into {str(there)!r}, which cannot be written. Choose another folder.")
