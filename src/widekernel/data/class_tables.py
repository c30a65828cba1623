"""Names and colors of classes: those of published data sets, and those that a file lists."""

import colorsys
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from widekernel.errors import DataError

Color = tuple[int, int, int]
"""Red, green and blue, from 0 to 255."""

_SAFE_COLORS: tuple[Color, ...] = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0), (86, 180, 233), (204, 121, 167), (240, 228, 66),
)  # fmt: skip
"""Colors that people with any kind of color vision tell apart (Okabe and Ito, Color Universal Design, 2008)."""

_HUE_STEP = 0.6180339887498949
"""Golden ratio: any number of hues that follow each other by this step are far apart."""

_VALUES = (0.95, 0.6, 0.8)
"""Brightness of colors that follow each other: those of similar hues differ in it."""


@dataclass(frozen=True)
class ClassTable:
    """Classes in the order of their indices.

    Args:
        names: name of each class
        colors: color of each class, for pictures
        label_ids: number of each class in label files of another convention (labelIds of Cityscapes); `None`: there is none
        category_ids: identifier of each class in annotation files (COCO); `None`: there is none
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    label_ids: tuple[int, ...] | None = None
    category_ids: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)


def published_classes(name: str) -> ClassTable:
    """Return the classes of ade20k, cityscapes or coco.

    Raises:
        KeyError: there is no such data set.
    """
    return _published()[name]


@cache
def _published() -> dict[str, ClassTable]:
    text = resources.files("widekernel.data").joinpath("class_tables.json").read_text(encoding="utf-8")
    return {name: _table(values) for name, values in json.loads(text).items()}


def _table(values: dict[str, Any]) -> ClassTable:
    ids, categories = values.get("label_ids"), values.get("category_ids")
    colors = tuple((int(red), int(green), int(blue)) for red, green, blue in values["colors"])
    return ClassTable(tuple(values["names"]), colors, None if ids is None else tuple(ids), categories and tuple(categories))


def colors_of(names: Sequence[str]) -> tuple[Color, ...]:
    """Return a color for each class: that of a published data set with the same names, or one chosen by position."""
    for table in _published().values():
        if tuple(names) == table.names:
            return table.colors
    return tuple(_color(index) for index in range(len(names)))


def _color(index: int) -> Color:
    if index < len(_SAFE_COLORS):
        return _SAFE_COLORS[index]
    further = index - len(_SAFE_COLORS)
    red, green, blue = colorsys.hsv_to_rgb(further * _HUE_STEP % 1, 0.75, _VALUES[further % len(_VALUES)])
    return round(255 * red), round(255 * green), round(255 * blue)


def read_class_table(path: Path) -> ClassTable:
    """Read names of classes, and their colors if the file has them.

    Args:
        path: a text file with a name in each line, or a JSON file: a list of names, or `{"classes": [...], "palette":
            [[red, green, blue], ...]}`.

    Raises:
        DataError: the file cannot be read, names no classes or names one twice, or has another number of colors.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        values: Any = json.loads(text) if path.suffix.lower() == ".json" else [line.strip() for line in text.splitlines()]
    except OSError as error:
        raise DataError(f"The file of classes {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # of JSON and of UTF-8
        raise DataError(f"The file of classes {path} cannot be read: {error}.") from error
    palette = None
    if isinstance(values, dict):
        values, palette = values.get("classes"), values.get("palette")
    if path.suffix.lower() != ".json":
        values = [line for line in values if line]
    if not isinstance(values, list) or not values or not all(isinstance(name, str) for name in values):
        raise DataError(
            f"The file of classes {path} must hold a name in each line, or, as JSON, a list of names or an object with a "
            "list `classes`."
        )
    twice = sorted({name for name in values if values.count(name) > 1})
    if twice:
        raise DataError(f"The file of classes {path} names {twice[0]!r} more than once; names must differ.")
    return ClassTable(tuple(values), colors_of(values) if palette is None else _palette(path, palette, len(values)))


def _palette(path: Path, palette: Any, count: int) -> tuple[Color, ...]:
    rule = f"a list of {count} colors, one for each class, each of three whole numbers from 0 to 255"
    if not isinstance(palette, list) or len(palette) != count:
        found = f"{len(palette)} entries" if isinstance(palette, list) else repr(palette)
        raise DataError(f"The palette in {path} is {found}, but must be {rule}.")
    for color in palette:
        values = color if isinstance(color, list) else []
        if len(values) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in values):
            raise DataError(f"The palette in {path} has the color {color!r}, but must be {rule}.")
    return tuple((red, green, blue) for red, green, blue in palette)
