"""Shape bias: whether a classifier goes by shape or by texture where the two disagree.

Stimuli, categories, decisions and files are those of Geirhos et al. (ImageNet-trained CNNs are biased towards texture, 2019;
Partial success in closing the gap between human and machine vision, 2021).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from widekernel.errors import ArgumentError, DataError

COLUMNS = ("subj", "session", "trial", "rt", "object_response", "category", "condition", "imagename")
"""Columns of a file of decisions, by which the original plotting tools read it."""

NUM_CLASSES = 1000


def _ranges(text: str) -> tuple[int, ...]:
    """Return the numbers of a text such as "8, 10-16"."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


CATEGORIES = {
    "airplane": _ranges("404"),
    "bear": _ranges("294-297"),
    "bicycle": _ranges("444, 671"),
    "bird": _ranges("8, 10-16, 18-20, 22-24, 80-83, 87-96, 98-100, 127-133, 135-145"),
    "boat": _ranges("472, 554, 625, 814, 914"),
    "bottle": _ranges("440, 720, 737, 898, 899, 901, 907"),
    "car": _ranges("436, 511, 817"),
    "cat": _ranges("281-286"),
    "chair": _ranges("423, 559, 765, 857"),
    "clock": _ranges("409, 530, 892"),
    "dog": _ranges("152-191, 193-203, 205-226, 228-241, 243-250, 252-257, 259, 261-263, 265-268"),
    "elephant": _ranges("385, 386"),
    "keyboard": _ranges("508, 878"),
    "knife": _ranges("499"),
    "oven": _ranges("766"),
    "truck": _ranges("555, 569, 656, 675, 717, 734, 864, 867"),
}
"""The 16 categories, each with its classes among the 1,000 of ImageNet."""

# airplane1-bicycle2.png, or in files of decisions 0001_s5n_dnn_0_airplane_00_airplane1-bicycle2.png
_NAME = re.compile(r"(?:^|_)([a-z]+)\d*-([a-z]+)\d*\.[A-Za-z]+$")


@dataclass(frozen=True)
class Stimulus:
    """An image whose shape and texture belong to two categories.

    Attributes:
        name: name of the file.
        shape: category of the shape.
        texture: category of the texture.
    """

    name: str
    shape: str
    texture: str

    @property
    def is_conflict(self) -> bool:
        """Whether the two categories differ; only such images count."""
        return self.shape != self.texture


@dataclass(frozen=True)
class Decision:
    """The category that an observer chose for a stimulus."""

    stimulus: Stimulus
    response: str


@dataclass(frozen=True)
class Counts:
    """Decisions on stimuli whose shape and texture differ.

    Attributes:
        trials: number of such stimuli.
        shape: decisions for the category of the shape.
        texture: decisions for the category of the texture.
    """

    trials: int
    shape: int
    texture: int

    @property
    def bias(self) -> float:
        """Share of the decisions for the shape among those for shape or texture; NaN if there are none."""
        decided = self.shape + self.texture
        return self.shape / decided if decided else float("nan")


@dataclass(frozen=True)
class ShapeBias:
    """The shape bias of one observer.

    Attributes:
        observer: a person or a network.
        overall: counts over all stimuli.
        by_category: counts by the category of the shape.
    """

    observer: str
    overall: Counts
    by_category: dict[str, Counts]


def parse_name(name: str) -> Stimulus:
    """Read shape and texture from the name of a stimulus, such as airplane1-bicycle2.png.

    Raises:
        DataError: the name has another form, or names an unknown category.
    """
    found = _NAME.search(PurePosixPath(name).name)
    if found is None:
        raise DataError(
            f"{name} is not the name of a stimulus: the form is SHAPE1-TEXTURE2.png, such as airplane1-bicycle2.png."
        )
    for category in found.groups():
        if category not in CATEGORIES:
            raise DataError(f"{name} names the category {category!r}. Categories are {', '.join(CATEGORIES)}.")
    return Stimulus(PurePosixPath(name).name, found[1], found[2])


def decide(logits: Tensor) -> list[str]:
    """Return the category that has the largest mean probability over its classes.

    Args:
        logits: outputs (N, 1000) of a classifier of the ImageNet classes.

    Returns:
        a category for each image.

    Raises:
        ArgumentError: there are other numbers of outputs.
    """
    if logits.ndim != 2 or logits.shape[1] != NUM_CLASSES:
        raise ArgumentError(
            f"the outputs have shape {tuple(logits.shape)}, but the categories are made of {NUM_CLASSES} ImageNet classes: "
            f"give (N, {NUM_CLASSES})"
        )
    probabilities = logits.double().softmax(dim=1)
    means = torch.stack([probabilities[:, list(classes)].mean(dim=1) for classes in CATEGORIES.values()], dim=1)
    names = list(CATEGORIES)
    return [names[index] for index in means.argmax(dim=1).tolist()]


def shape_bias(observer: str, decisions: Iterable[Decision]) -> ShapeBias:
    """Count the decisions of an observer on stimuli whose shape and texture differ.

    Raises:
        DataError: there is no such stimulus.
    """
    by_category: dict[str, list[Decision]] = {}
    for decision in decisions:
        if decision.stimulus.is_conflict:
            by_category.setdefault(decision.stimulus.shape, []).append(decision)
    if not by_category:
        raise DataError(f"{observer}: no stimulus has a shape and a texture of different categories.")
    counts = {name: _count(by_category[name]) for name in CATEGORIES if name in by_category}
    return ShapeBias(observer, _count([one for some in by_category.values() for one in some]), counts)


def _count(decisions: Sequence[Decision]) -> Counts:
    return Counts(
        trials=len(decisions),
        shape=sum(one.response == one.stimulus.shape for one in decisions),
        texture=sum(one.response == one.stimulus.texture for one in decisions),
    )


def read_decisions(path: Path) -> tuple[str, list[Decision]]:
    """Read a file of decisions; return the observer and the decisions.

    Raises:
        DataError: the file cannot be read, or lacks columns.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in ("subj", "object_response", "imagename") if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path} has no column {', '.join(missing)}. Columns are {', '.join(COLUMNS)}.")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a file of decisions: {error}.") from error
    if not rows:
        raise DataError(f"{path} holds no decisions.")
    decisions = [Decision(parse_name(row["imagename"]), (row["object_response"] or "").strip()) for row in rows]
    return rows[0]["subj"], decisions


def decisions_file(observer: str, decisions: Iterable[Decision]) -> bytes:
    """Return the contents of a file of decisions, in the columns of the original experiments."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for number, decision in enumerate(decisions, 1):
        stimulus = decision.stimulus
        writer.writerow([observer, 1, number, "NaN", decision.response, stimulus.shape, 0, stimulus.name])
    return text.getvalue().encode()


def is_person(observer: str) -> bool:
    """Return whether an observer is a person, by the naming of the published files: subject-01, subject-02 and so on."""
    return observer.startswith("subject")
