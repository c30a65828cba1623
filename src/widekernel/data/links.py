"""Links between folders that would give images twice, or the wrong class."""

import os
from pathlib import Path

from widekernel.data.errors import DataError


def check_links(split: Path, names: list[str]) -> None:
    """Check the links below the class folders ``names`` of ``split``; links to places elsewhere are fine.

    Raises:
        DataError: a link leads to a folder that holds it, or into the folder of another class.
    """
    home = os.path.realpath(split)
    classes = [(name, os.path.join(home, name)) for name in names]  # noqa: PTH118 - compared as text
    for name, place in classes:
        others = [other for other_name, other in classes if other_name != name]
        link = split / name
        if link.is_symlink():
            place = _follow(link, [home], others)
        _check_below(link, [home, place], others)


def _check_below(folder: Path, above: list[str], others: list[str]) -> None:
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if entry.is_dir()]
    for entry in found:
        link = folder / entry.name
        place = _follow(link, above, others) if entry.is_symlink() else f"{above[-1]}{os.sep}{entry.name}"
        _check_below(link, [*above, place], others)


def _follow(link: Path, above: list[str], others: list[str]) -> str:
    target = os.path.realpath(link)
    if any(_holds(target, folder) for folder in above):
        raise DataError(f"{link} is a link to {target}, which holds the link itself. Remove it.")
    if any(_holds(other, target) for other in others):
        raise DataError(f"{link} is a link to {target}, which belongs to another class. Remove it.")
    return target


def _holds(folder: str, place: str) -> bool:
    return place == folder or place.startswith(folder.rstrip(os.sep) + os.sep)
