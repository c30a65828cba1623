"""Files that a command writes, checked before anything takes time."""

from __future__ import annotations

import os
from pathlib import Path

from widekernel.errors import ConfigError
from widekernel.training.run_folder import RunFolder


def output_file(path: Path, what: str, source: Path, overwrite: bool, beside: tuple[Path, ...] = ()) -> Path:
    """Give back the .safetensors file to write, having made sure that it can be and that nothing is lost.

    Args:
        path: the file.
        what: kind of file it will be, in the plural.
        source: what it is made from.
        overwrite: whether existing files may be replaced; never the source.
        beside: other files that will be written.

    Raises:
        ConfigError: it has another suffix, it exists, it is the source, or its folder cannot be written.
    """
    if path.suffix != ".safetensors":
        raise ConfigError(f"The output is {str(path)!r}, but {what} are .safetensors files.")
    for file in (path, *beside):
        if file.is_dir():
            raise ConfigError(f"The output is {str(file)!r}, which is a folder. Give --output a file.")
        if file.exists() and any(file.samefile(own) for own in _not_to_be_lost(source)):
            raise ConfigError(f"The output {str(file)!r} is the source, which would be lost. Choose another --output.")
        if file.exists() and not overwrite:
            raise ConfigError(f"{file} exists. Choose another --output, or add --overwrite.")
    check_folder(path.parent, "--output")
    return path


def _not_to_be_lost(source: Path) -> list[Path]:
    """What a network is read from: the file, or the results of the run in the folder."""
    run = RunFolder(source)
    return [path for path in (source, run.model, run.model_ema, run.masks) if path.is_file()]


def check_folder(folder: Path, option: str) -> None:
    """Raise a `ConfigError` unless files can be made in `folder`, or in what would be created for it."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"{option} leads into {str(there)!r}, which is a file. Choose a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} leads into {str(there)!r}, which cannot be written. Choose another folder.")
