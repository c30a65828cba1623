"""Pictures of what networks see in images: classes of pixels, objects, and the likeliest classes of whole images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

Color = tuple[int, int, int]
"""Red, green and blue, from 0 to 255."""

LEAST_SIDE = 480
"""Long side, in pixels, to which smaller images are enlarged, so that lines and texts are legible."""

_FONT_SIZE = 14
_WHITE, _INK, _FAINT = (255, 255, 255), (25, 25, 25), (200, 200, 200)
_GAP = 8


@cache
def _font(size: int = _FONT_SIZE) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def enlargement(image: Image.Image, least: int = LEAST_SIDE) -> int:
    """Return the whole number by which both sides of an image are multiplied for a legible picture; 1 for a large one."""
    return max(1, -(-least // max(image.size)))


def palette_image(classes: np.ndarray, colors: Sequence[Color]) -> Image.Image:
    """Return class indices `(height, width)` as a picture with a palette, whose pixels hold the indices.

    Args:
        classes: indices from 0 to 255.
        colors: color of each class.
    """
    picture = Image.fromarray(classes.astype(np.uint8))
    picture.putpalette([value for color in colors for value in color])
    return picture


def class_overlay(
    image: Image.Image, classes: np.ndarray, names: Sequence[str], colors: Sequence[Color], opacity: float = 0.65
) -> Image.Image:
    """Lay the colors of classes over an image, with lines where they meet and a legend of the classes that occur.

    Args:
        image: RGB image.
        classes: class index of each of its pixels `(height, width)`.
        names: name of each class.
        colors: color of each class.
        opacity: share of the colors, from 0 to 1.

    Returns:
        the picture, with the legend below, ordered by area.
    """
    import torch
    from torchvision.utils import draw_segmentation_masks

    factor = enlargement(image)
    large = _pixels(_resized(image, factor))
    shown = classes.repeat(factor, axis=0).repeat(factor, axis=1)
    present, counts = np.unique(classes, return_counts=True)
    masks = torch.stack([torch.from_numpy(shown == index) for index in present])
    drawn = draw_segmentation_masks(large, masks, alpha=opacity, colors=[tuple(colors[index]) for index in present])
    pixels = drawn.permute(1, 2, 0).numpy().copy()
    pixels[_borders(shown)] = _WHITE
    order = np.argsort(-counts, kind="stable")
    entries = [(f"{names[present[k]]} {percent(counts[k] / counts.sum())}", colors[present[k]]) for k in order]
    return _with_legend(Image.fromarray(pixels), entries)


def object_overlay(
    image: Image.Image,
    boxes: np.ndarray,
    texts: Sequence[str],
    colors: Sequence[Color],
    masks: np.ndarray | None = None,
    legend: Sequence[tuple[str, Color]] = (),
) -> Image.Image:
    """Draw objects on an image: masks, boxes, and a text at each box.

    Args:
        image: RGB image.
        boxes: x1, y1, x2, y2 of each object in pixels `(n, 4)`; the first one is drawn on top.
        texts: text of each object.
        colors: color of each object.
        masks: pixels of each object `(n, height, width)`, boolean; `None` for boxes only.
        legend: entries of the legend below the picture.

    Returns:
        the picture.
    """
    import torch
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    factor = enlargement(image)
    large = _resized(image, factor)
    last_to_first = range(len(boxes) - 1, -1, -1)
    if len(boxes):
        pixels = _pixels(large)
        reversed_colors = [tuple(colors[index]) for index in last_to_first]
        if masks is not None:
            for index in last_to_first:  # one after another: where masks overlap, the first one is on top
                mask = torch.from_numpy(masks[index].repeat(factor, axis=0).repeat(factor, axis=1))
                pixels = draw_segmentation_masks(pixels, mask, alpha=0.5, colors=[tuple(colors[index])])
        drawn = torch.from_numpy(np.ascontiguousarray(boxes[::-1])).float() * factor
        drawn[:, 0::2].clamp_(0, large.width - 1)
        drawn[:, 1::2].clamp_(0, large.height - 1)
        pixels = draw_bounding_boxes(pixels, drawn, colors=reversed_colors, width=max(2, min(large.size) // 250))
        large = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        draw = ImageDraw.Draw(large)
        for box, index in zip(drawn.tolist(), last_to_first):
            _tag(draw, large.size, (box[0], box[1]), texts[index], colors[index])
    return _with_legend(large, legend)


def contact_sheet(tiles: Sequence[tuple[Image.Image, Sequence[str]]], side: int = 180, columns: int = 6) -> Image.Image:
    """Return small versions of images in rows, with lines of text below each.

    Args:
        tiles: images, and the texts below them; those that are too long are cut.
        side: long side of the small versions, in pixels.
        columns: largest number of images in a row.
    """
    lines = max(len(texts) for _, texts in tiles)
    font, height = _font(12), 16
    columns = min(columns, len(tiles))
    cell = side + _GAP, side + lines * height + 2 * _GAP
    sheet = Image.new("RGB", (columns * cell[0] + _GAP, -(-len(tiles) // columns) * cell[1] + _GAP), _WHITE)
    draw = ImageDraw.Draw(sheet)
    for number, (image, texts) in enumerate(tiles):
        left, top = _GAP + number % columns * cell[0], _GAP + number // columns * cell[1]
        scale = side / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        small = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
        sheet.paste(small, (left + (side - small.width) // 2, top + (side - small.height) // 2))
        for line, text in enumerate(texts):
            draw.text((left, top + side + 4 + line * height), _fitted(text, font, side), _INK, font)
    return sheet


def percent(share: float) -> str:
    """Return a share as text, with one digit after the point below 10 %."""
    value = 100 * float(share)
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.1f} %"


def _pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as `(3, height, width)`, uint8."""
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _resized(image: Image.Image, factor: int) -> Image.Image:
    if factor == 1:
        return image.copy()
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.BICUBIC)


def _borders(classes: np.ndarray) -> np.ndarray:
    """Return which pixels have another class than the next one to the right or below."""
    found = np.zeros(classes.shape, bool)
    found[:, :-1] |= classes[:, :-1] != classes[:, 1:]
    found[:-1] |= classes[:-1] != classes[1:]
    return found


def _readable_on(color: Color) -> Color:
    """Return the color of a text on a ground of that color: dark or white."""
    red, green, blue = color
    return _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else _WHITE


def _tag(draw: ImageDraw.ImageDraw, size: tuple[int, int], corner: tuple[float, float], text: str, color: Color) -> None:
    """Write a text above the corner of a box, or inside the box if there is no space above."""
    font = _font()
    text = _fitted(text, font, size[0] - 6)
    width, height = round(font.getlength(text)) + 6, _FONT_SIZE + 5
    left = min(max(round(corner[0]), 0), max(size[0] - width, 0))
    top = round(corner[1]) - height
    top = top if top >= 0 else round(corner[1])
    draw.rectangle((left, top, left + width, top + height), color)
    draw.text((left + 3, top + 1), text, _readable_on(color), font)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return a text, or its beginning with dots if it is wider than that."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _with_legend(picture: Image.Image, entries: Sequence[tuple[str, Color]]) -> Image.Image:
    """Return the picture with names of colors below it, in as many lines as they need."""
    if not entries:
        return picture
    font, swatch, line = _font(), _FONT_SIZE, _FONT_SIZE + 8
    places, left, top = [], _GAP, _GAP
    texts = [_fitted(text, font, picture.width - 2 * _GAP - swatch - 5) for text, _ in entries]
    for text in texts:
        width = swatch + 5 + round(font.getlength(text))
        if left > _GAP and left + width > picture.width - _GAP:
            left, top = _GAP, top + line
        places.append((left, top))
        left += width + 2 * _GAP
    whole = Image.new("RGB", (picture.width, picture.height + top + line), _WHITE)
    whole.paste(picture, (0, 0))
    draw = ImageDraw.Draw(whole)
    for (x, y), text, (_, color) in zip(places, texts, entries):
        x, y = x, y + picture.height
        draw.rectangle((x, y, x + swatch, y + swatch), color, outline=_FAINT)
        draw.text((x + swatch + 5, y - 1), text, _INK, font)
    return whole
