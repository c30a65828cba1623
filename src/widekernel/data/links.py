"""Detection of links between folders that would yield images twice, or with the wrong class."""

import os
from pathlib import Path

from widekernel.errors import DataError


class Links:
    """Checks of the links below the class folders `names` of `split`; links out of the split are fine."""

    def __init__(self, split: Path, names: list[str]) -> None:
        self.split = split
        self.home = os.path.realpath(split)
        self.classes = {name: self.home + os.sep + name for name in names}

    def enter(self, folder: str) -> tuple[str, ...]:
        """Return the real paths of the split and of the class folder `folder`, which may be a link.

        Raises:
            DataError: as for `follow`.
        """
        if (self.split / folder).is_symlink():
            return (self.home, self.follow(folder, (self.home,)))
        return (self.home, self.classes[folder])

    def follow(self, link: str, above: tuple[str, ...]) -> str:
        """Return the real path that `link`, a path below the split, leads to; `above` holds the real paths around it.

        Raises:
            DataError: the link leads to a folder that contains it, or into the folder of another class.
        """
        path = self.split / link
        target = os.path.realpath(path)
        if any(_holds(target, place) for place in above):
            raise DataError(f"{path} is a link to {target}, which contains the link itself. Remove it.")
        own = link.partition("/")[0]
        if any(_holds(place, target) for name, place in self.classes.items() if name != own):
            raise DataError(f"{path} is a link to {target}, which belongs to another class. Remove it.")
        return target


def _holds(folder: str, place: str) -> bool:
    return place == folder or place.startswith(folder.rstrip(os.sep) + os.sep)
