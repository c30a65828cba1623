"""Classes that a run does not see because none of their images can be read."""

from collections import Counter
from collections.abc import Collection

from widekernel.data import ImageSource
from widekernel.data.sources import targets_of


def missing_classes(source: ImageSource, unreadable: Collection[str]) -> list[str]:
    """Return a warning for every class of `source` whose images are all among `unreadable`, a collection of names."""
    targets = targets_of(source) if unreadable else None
    if targets is None:
        return []
    missed = Counter(targets[index] for index in range(len(source)) if source.sample_name(index) in unreadable)
    counts = Counter(targets)
    return [
        f"Warning: class {source.class_names[target]}: none of its {counts[target]} images can be read."
        for target in sorted(missed)
        if missed[target] == counts[target]
    ]
