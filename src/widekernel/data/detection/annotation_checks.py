"""Checks of the content of a COCO file; each function yields a sentence for every mistake."""

import math
from collections.abc import Iterator
from typing import Any

LISTS = ("images", "annotations", "categories")

CORNERS = 3
"""Fewest corners of a polygon."""


def problems(content: Any, masks: bool) -> Iterator[str]:
    """Yield what is wrong with the content of a COCO file.

    Args:
        content: what the JSON file holds.
        masks: whether every object must have a mask.
    """
    if not isinstance(content, dict):
        yield f"the file must hold an object with the lists {', '.join(LISTS)}, not {type(content).__name__}"
        return
    for name in LISTS:
        if not isinstance(content.get(name), list):
            found = type(content[name]).__name__ if name in content else "nothing"
            yield f"`{name}` must be a list, but is {found}"
            return
    yield from _categories(content["categories"])
    yield from _images(content["images"])
    yield from _annotations(content, masks)


def _categories(categories: list[Any]) -> Iterator[str]:
    if not categories:
        yield "`categories` is empty, but must name one class or more"
    yield from _repeated("category", categories)
    names = set()
    for entry in categories:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            yield f"category {_id_of(entry)} has no name"
        elif name in names:
            yield f"category {_id_of(entry)} has the name {name!r} of another one"
        names.add(name)


def _images(images: list[Any]) -> Iterator[str]:
    if not images:
        yield "`images` is empty"
    yield from _repeated("image", images)
    for entry in images:
        if not isinstance(entry, dict):
            continue
        for key in ("height", "width"):
            value: Any = entry.get(key)
            if not _is_whole(value) or value < 1:
                yield f"image {_id_of(entry)} has the {key} {value!r}, which must be a positive whole number of pixels"
        if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
            yield f"image {_id_of(entry)} has the file name {entry.get('file_name')!r}"


def _repeated(what: str, entries: list[Any]) -> Iterator[str]:
    seen = set()
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            yield f"{what} at place {place} is {type(entry).__name__}, but must be an object"
        elif not _is_whole(entry.get("id")):
            yield f"{what} at place {place} has the id {entry.get('id')!r}, which must be a whole number"
        elif entry["id"] in seen:
            yield f"{what} {entry['id']} occurs more than once: ids must differ"
        else:
            seen.add(entry["id"])


def _annotations(content: dict[str, Any], masks: bool) -> Iterator[str]:
    yield from _repeated("annotation", content["annotations"])
    images = {_id_of(entry): entry for entry in content["images"] if isinstance(entry, dict)}
    categories = {_id_of(entry) for entry in content["categories"]}
    for entry in content["annotations"]:
        if not isinstance(entry, dict):
            continue
        who = f"annotation {_id_of(entry)}"
        image = images.get(_hashable(entry.get("image_id")))
        if image is None:
            yield f"{who} belongs to the image {entry.get('image_id')!r}, which `images` does not have"
        if _hashable(entry.get("category_id")) not in categories:
            yield f"{who} has the category {entry.get('category_id')!r}, which `categories` does not have"
        yield from (f"{who}: {text}" for text in _box(entry))
        if masks and image is not None:
            yield from (f"{who}: {text}" for text in _mask(entry, image))


def _box(entry: dict[str, Any]) -> Iterator[str]:
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not _all_finite(box):
        yield f"its bbox is {box!r}, but must be four finite numbers: x, y, width, height"
    elif box[2] < 0 or box[3] < 0:
        yield f"its bbox is {box!r}, but width and height must not be negative"
    area = entry.get("area", 0)
    if not _all_finite([area]) or area < 0:
        yield f"its area is {area!r}, but must be a finite number, 0 or more"
    if entry.get("iscrowd", 0) not in (0, 1):
        yield f"its iscrowd is {entry['iscrowd']!r}, but must be 0 or 1"


def _mask(entry: dict[str, Any], image: dict[str, Any]) -> Iterator[str]:
    form = entry.get("segmentation")
    if isinstance(form, dict):
        yield from _run_lengths(form, image)
    elif isinstance(form, list) and form:
        for polygon in form:
            if not isinstance(polygon, list) or not _all_finite(polygon):
                yield "a polygon of its segmentation is not a list of finite numbers"
            elif len(polygon) % 2:
                yield f"a polygon of its segmentation has {len(polygon)} numbers, but must have two for each corner"
            elif len(polygon) < 2 * CORNERS:
                yield f"a polygon of its segmentation has {len(polygon) // 2} corners, but must have {CORNERS} or more"
    elif not entry.get("iscrowd"):
        yield "it has no segmentation, from which its mask is made (data.masks false loads boxes only)"


def _run_lengths(form: dict[str, Any], image: dict[str, Any]) -> Iterator[str]:
    height: Any = image.get("height")
    width: Any = image.get("width")
    if not _is_whole(height) or not _is_whole(width):
        return  # said of the image already
    counts = form.get("counts")
    if isinstance(counts, str):
        counts = run_lengths(counts)
    if form.get("size") != [height, width]:
        yield f"its run lengths are of size {form.get('size')}, but its image has height and width {[height, width]}"
    elif not isinstance(counts, list):
        yield f"its run lengths are {type(counts).__name__}, but must be a list or the compressed form as text"
    elif not all(_is_whole(count) and count >= 0 for count in counts) or sum(counts) != height * width:
        yield f"its run lengths must be whole numbers, 0 or more, that add up to {height} × {width} pixels"


def run_lengths(text: str) -> list[int]:
    """Return the numbers that compressed run lengths stand for; what is malformed does not add up to the size of an image.

    Each number is written in groups of five bits, the last group first, a sixth bit marking that another one follows. From
    the fourth number on, what is written is the difference from the number two places before.
    """
    numbers: list[int] = []
    value = shift = 0
    for code in text.encode():
        group = code - 48
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
        value = shift = 0
    return [] if shift else numbers


def _all_finite(values: list[Any]) -> bool:
    """Return whether all values are finite numbers."""
    try:
        # The sum is finite only if every term is; this is many times faster than looking at each.
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _id_of(entry: Any) -> Any:
    return _hashable(entry.get("id")) if isinstance(entry, dict) else None


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (int, str)) else repr(value)
