"""Checks that class folders really stand for classes."""

from widekernel.data.formats import brief, printable
from widekernel.data.listing import Listing, near_duplicates
from widekernel.errors import DataError

SPLITS = frozenset({"train", "training", "trainval", "val", "valid", "validation", "dev", "test", "testing"})
"""Usual names of splits, in lower case."""

_PARTS = SPLITS | {"images", "image", "imgs", "img", "jpegimages", "annotations", "masks", "labels", "data"}


def check_class_names(label: str, listing: Listing, fix: str) -> tuple[str, ...]:
    """Return notes on class folders that are probably not intended as such.

    Args:
        label: name of the split in messages.
        listing: the images of the split.
        fix: sentence that says how to choose another folder.

    Raises:
        DataError: all class folders are named like splits or other parts of a data set.
    """
    names = listing.class_names
    parts = [name for name in names if name.lower() in _PARTS]
    if len(parts) == len(names):
        few = "one class" if len(names) == 1 else f"{len(names)} classes"
        raise DataError(
            f"{label} would have {few}, {brief(names)}: the name of a part of a data set, not of a class. {fix} If it "
            "really is a class, rename the folder."
        )
    notes = []
    if parts:
        notes.append(f"{label}: among the {len(names)} classes is {brief(parts)}, the name of a part of a data set. {fix}")
    alike = near_duplicates(names)
    if alike:
        notes.append(f"{label}: classes differ only in case or spaces: {brief(alike)}. Merge them if they are the same.")
    inside = listing.common_subfolders()
    if len(names) > 1 and len(inside) > 1:
        notes.append(
            f"{label}: the classes are {brief(names)}, and each holds the same folders {brief(inside)}. If those are the "
            f"classes, put the images of each into one folder directly below {label}."
        )
    return tuple(notes)


def refuse_one_class(label: str, names: tuple[str, ...], fix: str) -> None:
    """Raise a `DataError` if the training images have only one class."""
    if len(names) == 1:
        raise DataError(f"{label} has only one class, {printable(names[0])!r}, so there is nothing to learn. {fix}")
