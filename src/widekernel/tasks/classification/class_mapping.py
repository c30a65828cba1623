"""Mapping from the classes of the data to the outputs of a network."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from timm.data import ImageNetInfo
from timm.utils.misc import natural_key

from widekernel.data.formats import brief, printable
from widekernel.data.names import normalize_name
from widekernel.errors import CheckpointError, DataError
from widekernel.tasks.saved import SavedModel, read_saved


def class_mapping(saved: SavedModel, names: tuple[str, ...]) -> tuple[int, ...] | None:
    """Return the model's output for every class of the data, or `None` if both are in the same order.

    A model with class names may be evaluated on data that contain only some of its classes; names are compared after
    Unicode normalization. For a model without class names, numbered classes are matched in numerical order, and WordNet
    identifiers in ImageNet's order if the model has 1,000 outputs; `mapping_note` says what was assumed.

    Raises:
        DataError: the data contain classes that the model does not know, or have another number of classes.
    """
    names = tuple(normalize_name(name) for name in names)
    if not saved.class_names:
        return _without_names(saved, names)
    known = {normalize_name(name): output for output, name in enumerate(saved.class_names)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(
            f"The data has {len(unknown)} classes that the model was not trained on, such as {printable(unknown[0])!r}; "
            f"its {saved.num_classes} classes are {brief(saved.class_names, 10)}."
        )
    return _unless_trivial(tuple(known[name] for name in names), saved.num_classes)


def mapping_note(saved: SavedModel, names: tuple[str, ...]) -> str:
    """Return a line for the user on what `class_mapping` assumes, or "" if it assumes nothing.

    Args:
        saved: the model
        names: the classes of the data, which `class_mapping` has accepted
    """
    imagenet = _imagenet()
    if saved.class_names or (saved.num_classes == len(imagenet) and set(names) <= imagenet.keys()):
        return ""
    if _are_numbers(names):
        ordered = _by_number(names)
        if ordered == list(names) and int(ordered[0]) == 0 and int(ordered[-1]) == len(names) - 1:
            return ""
        return (
            f"{saved.name} has no class names, so the numbered classes are matched to its outputs by number: "
            f"{_pairs(ordered)}. Weights that were trained on the same folders in alphabetical order need class names."
        )
    text = f"{saved.name} has no class names, so its outputs are taken in alphabetical order: {_pairs(names)}."
    counted = sorted(names, key=natural_key)
    return text if counted == list(names) else f"{text} Ordered by the numbers in them they would be {brief(counted, 3)}."


def inheritance_note(weights: Path, names: tuple[str, ...]) -> str:
    """Return a line for the user on what training assumes about the classifier in `weights`, or "" if nothing.

    If the number of classes fits, training keeps the outputs of the classifier by position.

    Args:
        weights: the checkpoint that training starts from
        names: the classes of the data
    """
    try:
        saved = read_saved(weights)
    except CheckpointError:  # a file of another kind, which does not name its classes
        known: tuple[str, ...] = ()
    else:
        known = tuple(normalize_name(name) for name in saved.class_names)
        if saved.num_classes != len(names) or known == names:
            return ""
    if known:
        return (
            f"The classifier in {weights} was trained on {brief(known, 3)}, and the classes here are {brief(names, 3)}: "
            "its outputs are kept by position and have to be learned again."
        )
    if not _are_numbers(names) or _by_number(names) == list(names):
        return ""
    return (
        f"{weights} does not name its classes. If it has a classifier for {len(names)} of them, its outputs are kept "
        f"in alphabetical order: {_pairs(names)}. Numbers of equal length (00, 01, ...) keep their order."
    )


def _without_names(saved: SavedModel, names: tuple[str, ...]) -> tuple[int, ...] | None:
    imagenet = _imagenet()
    if saved.num_classes == len(imagenet) and set(names) <= imagenet.keys():
        return _unless_trivial(tuple(imagenet[name] for name in names), saved.num_classes)
    if len(names) != saved.num_classes:
        raise DataError(
            f"The data has {len(names)} classes, but {saved.name} has {saved.num_classes} outputs and no class "
            "names to match them by. Check the data set, or give --num_classes, or choose outputs with --data.class_map."
        )
    if not _are_numbers(names):
        return None
    output = {name: number for number, name in enumerate(_by_number(names))}
    return _unless_trivial(tuple(output[name] for name in names), saved.num_classes)


def _unless_trivial(order: tuple[int, ...], outputs: int) -> tuple[int, ...] | None:
    return None if order == tuple(range(outputs)) else order


def _are_numbers(names: Sequence[str]) -> bool:
    return all(name.isascii() and name.isdigit() for name in names) and len({int(name) for name in names}) == len(names)


def _by_number(names: Sequence[str]) -> list[str]:
    return sorted(names, key=int)


def _pairs(names: Sequence[str]) -> str:
    return brief([f"{printable(name)!r} is output {number}" for number, name in enumerate(names)], 3)


@lru_cache(maxsize=1)
def _imagenet() -> dict[str, int]:
    """Return the output of an ImageNet-1k network for each WordNet identifier."""
    return {name: output for output, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
