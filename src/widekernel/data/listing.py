"""Contents of a split, in a folder or an archive: images, classes and the files that were skipped."""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from widekernel.data.formats import brief, ending_of, printable, usual_endings
from widekernel.data.names import Names, normalize_name
from widekernel.errors import DataError


@dataclass
class SkippedFiles:
    """Files below a split that are not among its images; clutter of operating systems is not counted.

    Attributes:
        endings: number of files without the extension of an image, by extension.
        example: one of them.
        outside: number of images that lie in no class folder.
        example_outside: one of them.
        lost: number of links in an archive that lead nowhere and do not have the extension of an image.
        example_lost: one of them.
    """

    endings: Counter[str] = field(default_factory=Counter)
    example: str = ""
    outside: int = 0
    example_outside: str = ""
    lost: int = 0
    example_lost: str = ""

    def add(self, path: str) -> None:
        """Count a file that has no extension of an image, or has one but is not a file or a link to one."""
        self.endings[ending_of(path.rpartition("/")[2])] += 1
        self.example = self.example or path

    def add_outside(self, path: str) -> None:
        """Count an image that lies in no class folder."""
        self.outside += 1
        self.example_outside = self.example_outside or path

    def add_lost(self, path: str) -> None:
        """Count a link that leads nowhere in the archive (perhaps to a folder elsewhere) and is not named like an image."""
        self.lost += 1
        self.example_lost = self.example_lost or path

    def notes(self, label: str) -> tuple[str, ...]:
        """Return one line for the user per kind of skipped file; `label` names the split."""
        notes = []
        if self.endings:
            kinds = [f"{count:,} {ending or 'without an extension'}" for ending, count in self.endings.most_common()]
            notes.append(
                f"{label}: {self.endings.total():,} file(s) left out, which do not have the extension of an image "
                f"({brief(kinds)}), such as {printable(self.example)}."
            )
        if self.outside:
            notes.append(
                f"{label}: {self.outside:,} image(s) left out, which lie outside the class folders, "
                f"such as {printable(self.example_outside)}."
            )
        if self.lost:
            notes.append(
                f"{label}: {self.lost:,} of these are links that lead out of the archive or nowhere, such as "
                f"{printable(self.example_lost)}. If they stand for folders, create it with tar --dereference."
            )
        return tuple(notes)


@dataclass
class Listing:
    """The images of a split.

    Args:
        class_names: normalized names in the order of the class indices
        names: paths of the images below the split, in order
        targets: class index of every image
        skipped: the other files
        image_folders: for each class, the folders inside its folder that contain images; "" is the class folder itself
        numbers: other numbers about the images or where they are, by what they say
    """

    class_names: tuple[str, ...]
    names: Names = field(default_factory=Names)
    targets: "array[int]" = field(default_factory=lambda: array("i"))
    skipped: SkippedFiles = field(default_factory=SkippedFiles)
    image_folders: list[set[str]] = field(default_factory=list)
    numbers: "dict[str, array[int]]" = field(default_factory=dict)

    def check(self, label: str) -> None:
        """Raise a `DataError` if there are no images, or classes without images."""
        empty = [name for name, folders in zip(self.class_names, self.image_folders, strict=True) if not folders]
        kinds = usual_endings()
        if len(empty) == len(self.class_names):
            raise DataError(f"{label} holds no images: none of its {len(empty)} class folders has a file of {kinds}.")
        if empty:
            raise DataError(
                f"{label} has {len(empty)} class folder(s) without images: {brief(empty)}. Add images ({kinds}) or remove "
                "the folder."
            )

    def common_subfolders(self) -> tuple[str, ...]:
        """Return the folders directly inside the class folders if they are the same in all classes, or else ()."""
        tops = [{folder.partition("/")[0] for folder in folders} for folders in self.image_folders]
        alike = bool(tops) and all(top == tops[0] for top in tops) and "" not in tops[0]
        return tuple(sorted(tops[0])) if alike else ()


def sorted_classes(label: str, folders: Iterable[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return class folders in the order of their classes, and the names of the classes.

    Raises:
        DataError: two folders have the same name after Unicode normalization.
    """
    ordered = sorted(folders, key=lambda name: (normalize_name(name), name))
    names = tuple(normalize_name(name) for name in ordered)
    for first, second in pairwise(names):
        if first == second:
            raise DataError(
                f"{label} has two class folders named {printable(first)!r}, which differ only in their Unicode form. "
                "Merge or rename them."
            )
    return ordered, names


def near_duplicates(names: Sequence[str]) -> list[str]:
    """Return the names that differ from another one only in case or in surrounding spaces."""
    count = Counter(name.strip().casefold() for name in names)
    return [name for name in names if count[name.strip().casefold()] > 1]
