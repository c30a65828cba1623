"""Pictures inside a page: drawings as SVG in the page's own colors, and matrices as small PNG files."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PALE = "#e9e3d3"
"""Color of the area of the learning rate, which the page replaces by a dark one on a dark background."""
_TEXT_COLORS = re.compile(r"#(?:000000|333333)\b")
# Entries of the palette of signed numbers: none, -126 to 126, and a masked one.
_LEVELS, _NOTHING, _ZERO, _ABSENT = 126, 0, 127, 255
_RED, _BLUE, _ORANGE, _GRAY = (196, 60, 44), (43, 110, 190), (224, 138, 30), (128, 128, 128)


@dataclass(frozen=True)
class Drawing:
    """A drawing for a page.

    Attributes:
        svg: an SVG element without references to anything else.
        description: what it shows, for those who do not see it.
    """

    svg: str
    description: str


@dataclass(frozen=True)
class Picture:
    """A picture of pixels for a page.

    Attributes:
        uri: a PNG file as an address of data.
        width: pixels.
        height: pixels.
        description: what it shows, for those who do not see it.
    """

    uri: str
    width: int
    height: int
    description: str


def drawing(figure: Figure, prefix: str, description: str) -> Drawing:
    """Return a figure as SVG whose background is transparent and whose black is the color of the page's text.

    Args:
        figure: the figure; its backgrounds are turned off.
        prefix: start of all its identifiers, unique on the page.
        description: what it shows.
    """
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
        legend = axes.get_legend()
        if legend is not None:
            legend.get_frame().set_visible(False)
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :].strip()
    for part in (r"<!--.*?-->", r"<metadata>.*?</metadata>", r"<style.*?</style>", r"\s+xmlns(?::\w+)?=\"[^\"]*\""):
        text = re.sub(part, "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"\bid=\"", f'id="{prefix}-', text)
    text = re.sub(r"href=\"#", f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = _TEXT_COLORS.sub("currentColor", text)
    text = text.replace(_PALE, f"var(--pale, {_PALE})")
    text = re.sub(
        r"^<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" fill="currentColor" aria-hidden="true">', text
    )
    return Drawing(re.sub(r">\s+<", "><", text), description)


def heat_map(matrix: np.ndarray, description: str, largest: int = 512) -> Picture:
    """Return a matrix (H, W) of numbers from 0 to 1 in shades from black through red to light yellow.

    Args:
        matrix: the numbers.
        description: what it shows.
        largest: side in pixels to which larger matrices are averaged down.
    """
    from matplotlib import colormaps

    while max(matrix.shape) > largest:
        height, width = matrix.shape[0] // 2 * 2, matrix.shape[1] // 2 * 2
        matrix = matrix[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))
    image = Image.fromarray(np.round(255 * np.clip(matrix, 0, 1)).astype(np.uint8), "P")
    colors = colormaps["magma"](np.arange(256), bytes=True)[:, :3]
    image.putpalette(colors.tobytes())
    return _picture(image, description)


def signed(values: np.ndarray, description: str, absent: np.ndarray | None = None) -> Picture:
    """Return numbers (H, W) as red if positive and blue if negative, the more opaque the larger; 0 is a faint gray.

    Args:
        values: the numbers, from -1 to 1; NaN is transparent.
        description: what it shows.
        absent: bool (H, W), entries that are masked, which become pale orange.
    """
    levels = np.round(_LEVELS * np.clip(np.nan_to_num(values), -1, 1)).astype(np.int16) + _ZERO
    levels[np.isnan(values)] = _NOTHING
    if absent is not None:
        levels[absent] = _ABSENT
    image = Image.fromarray(levels.astype(np.uint8), "P")
    colors = {_NOTHING: _GRAY, _ZERO: _GRAY, _ABSENT: _ORANGE}
    palette = [colors.get(level, _BLUE if level < _ZERO else _RED) for level in range(256)]
    image.putpalette(bytes(number for color in palette for number in color))
    opacity = {_NOTHING: 0.0, _ZERO: 0.1, _ABSENT: 0.3}
    shares = [opacity.get(level, min(1.0, abs(level - _ZERO) / _LEVELS) ** 0.7) for level in range(256)]
    return _picture(image, description, bytes(round(255 * share) for share in shares))


def _picture(image: Image.Image, description: str, transparency: bytes | None = None) -> Picture:
    buffer = io.BytesIO()
    options = {} if transparency is None else {"transparency": transparency}
    image.save(buffer, "PNG", optimize=True, **options)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(uri, image.width, image.height, description)
