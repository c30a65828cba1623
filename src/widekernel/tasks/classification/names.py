"""Names of the classes of a classifier, for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from timm.data import ImageNetInfo

from widekernel.tasks.saved import SavedModel

_IMAGENET_1K = "imagenet-1k"
_SYNSET = re.compile(r"n\d{8}$")


def class_names_of(saved: SavedModel) -> tuple[tuple[str, ...], str]:
    """Return a name for each output of a classifier, and a line for the user, or "".

    WordNet identifiers, such as n01440764, become the words that they stand for. The outputs of a classifier that does not
    name its classes are those of ImageNet-1K if there are 1000, and otherwise have numbers.
    """
    if saved.class_names:
        return _in_words(saved.class_names), ""
    info, count = ImageNetInfo(_IMAGENET_1K), saved.num_classes
    if count == info.num_classes():
        note = f"{saved.name} does not name its classes. Its {count} outputs are taken as those of ImageNet-1K."
        return _short(info.index_to_description(index) for index in range(count)), note
    return tuple(f"class {index}" for index in range(count)), f"{saved.name} does not name its {count} classes."


def _in_words(names: tuple[str, ...]) -> tuple[str, ...]:
    if not all(_SYNSET.match(name) for name in names):
        return names
    info = ImageNetInfo(_IMAGENET_1K)
    known = set(info.label_names())
    return _short(info.label_name_to_description(name) if name in known else name for name in names)


def _short(descriptions: Iterable[str]) -> tuple[str, ...]:
    """Return the first name of each synset, such as tench of `tench, Tinca tinca`; all of them where the first is shared."""
    whole = list(descriptions)
    first = [description.split(",")[0] for description in whole]
    counts = Counter(first)
    return tuple(name if counts[name] == 1 else description for name, description in zip(first, whole))
