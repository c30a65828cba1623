"""Renders a report as one HTML page that needs nothing else: no request leaves it."""

from __future__ import annotations

import base64
import hashlib
import math
from importlib import resources
from typing import TYPE_CHECKING, Any

from widekernel.errors import WidekernelError
from widekernel.report.accuracy import Measured
from widekernel.report.collecting import Report
from widekernel.report.costs import Costs
from widekernel.report.kernels import KernelPictures, Kernels, strip
from widekernel.report.masks import Masks, movements
from widekernel.report.masks import picture as mask_picture
from widekernel.report.parts import Missing
from widekernel.report.pictures import Picture, heat_map, signed
from widekernel.report.receptive_field import USUAL_SIZE, ReceptiveField, in_words
from widekernel.report.speed import Speed
from widekernel.report.training import Training, curves

if TYPE_CHECKING:
    from jinja2 import Environment

SECTIONS = {
    "model": "Model and weights",
    "accuracy": "Accuracy",
    "training": "Training",
    "field": "Receptive field",
    "kernels": "Kernels",
    "masks": "Masks",
    "complexity": "Complexity",
    "speed": "Speed",
    "conversion": "Fold and accelerate",
    "comparison": "Comparison",
    "settings": "Settings and versions",
}
"""Titles of the sections by their anchors on the page."""


class MissingPackageError(WidekernelError, ImportError):
    """Error for a package that reports need and that is not installed."""


def render_page(report: Report, command: str = "") -> str:
    """Return the page as text.

    Args:
        report: the data of all sections.
        command: the command that made it, for the footer.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    environment = _environment()
    script = _read("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        report=report,
        sections=SECTIONS,
        tiles=_tiles(report),
        command=command,
        style=_safe(_read("style.css")),
        script=_safe(script),
        script_hash=f"sha256-{digest}",
        usual_size=USUAL_SIZE,
        **_pictures(report),
    )


def check_packages() -> None:
    """Raise a `MissingPackageError` if a package is missing, before any long computation."""
    _environment()


def _environment() -> Environment:
    try:
        import jinja2
    except ImportError as error:
        raise MissingPackageError(
            "jinja2 is not installed, and reports need it: pip install 'widekernel[report]'"
        ) from error
    loader = jinja2.FunctionLoader(lambda name: _read(name))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=number, significant=significant, percent=percent, code=code, path=path)
    environment.tests["missing"] = lambda value: isinstance(value, Missing)
    return environment


def _read(name: str) -> str:
    return resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _safe(text: str) -> Any:
    """Mark text of ours, which is not escaped."""
    from markupsafe import Markup

    return Markup(text)


# -- texts ------------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Return a whole number with separators."""
    return f"{value:,.0f}"


def significant(value: float | None, digits: int = 4) -> str:
    """Return a number with its first digits, and without an exponent if it is of a usual size."""
    if value is None or not math.isfinite(value):
        return "–"
    if not value:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 4)}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share as a percentage."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def code(text: str) -> Any:
    """Return escaped text in which parts in backquotes are marked as code."""
    from markupsafe import Markup

    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(part) if odd % 2 else part for odd, part in enumerate(parts))


def path(name: str) -> Any:
    """Return an escaped name of a module or parameter, in which lines may break after dots."""
    from markupsafe import Markup

    return Markup(".<wbr>").join(name.split("."))


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """Return label, figure and explanation of the figures at the top of the page."""
    tiles = []
    if isinstance(report.accuracy, Measured):
        tiles.append(("Top-1 accuracy", f"{report.accuracy.top1:.2f} %", f"{report.accuracy.images:,} held-out images"))
    if isinstance(report.costs, Costs):
        counted = report.costs.counted
        tiles.append(("Parameters", f"{significant(counted.training.params / 1e6, 3)} M", "training form"))
        size = f"{counted.input_size[1]} × {counted.input_size[2]} pixels, folded"
        tiles.append(("Multiply-accumulates", _giga(counted.folded.macs), size))
    if isinstance(report.masks, Masks):
        tiles.append(("Zeros", f"{100 * report.masks.sparsity:.1f} %", "of the masked weights"))
    if isinstance(report.speed, Speed):
        best = report.speed.best(report.speed.batches[0])
        if best is not None:
            tiles.append(("Fastest form", f"{significant(best.fastest, 3)} ms", f"{best.form}, batch of {best.batch}"))
    if isinstance(report.field, ReceptiveField):
        area = report.field.areas.get(0.99)
        text = "–" if area is None else f"{100 * area.ratio:.0f} %"
        tiles.append(("Receptive field", text, "of the input, for 99 % of the scores"))
    return tiles


def _giga(macs: int) -> str:
    return f"{significant(macs / 1e9, 3)} G" if macs >= 1e8 else f"{significant(macs / 1e6, 3)} M"


# -- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(report: Report) -> dict[str, Any]:
    """Return the pictures of all sections that have data."""
    masks = report.masks if isinstance(report.masks, Masks) else None
    return {
        "curves": _drawings(curves(report.training)) if isinstance(report.training, Training) else [],
        "field_picture": _field(report.field) if isinstance(report.field, ReceptiveField) else None,
        "kernel_strips": [_strips(each) for each in report.kernels.shown] if isinstance(report.kernels, Kernels) else [],
        "moves": _drawings([drawn for drawn in [masks and movements(masks)] if drawn]),
        "mask_pictures": [(name, mask_picture(name, image)) for name, image in masks.images.items()] if masks else [],
    }


def _drawings(drawings: list[Any]) -> list[tuple[Any, str]]:
    return [(_safe(each.svg), each.description) for each in drawings]


def _field(field: ReceptiveField) -> tuple[Picture, list[tuple[str, float, float]]]:
    """Return the heat map, and (label, start, side) of the square for each share, as shares of the picture's side."""
    height = field.scores.shape[0]
    squares = [
        (f"{100 * share:g} %", (height // 2 - area.side // 2) / height, area.side / height)
        for share, area in field.areas.items()
        if area is not None
    ]
    # Without the root, the few largest scores would hide all others.
    return heat_map(field.scores**0.5, in_words(field)), squares


def _strips(layer: KernelPictures) -> tuple[KernelPictures, list[tuple[str, Picture]]]:
    """Return the pictures of a layer's branches, with all channels side by side."""
    count = len(layer.channels)
    return layer, [
        (label, signed(strip(part), f"{label} kernels of {count} channels of {layer.name}, side by side by falling norm."))
        for label, part in layer.parts.items()
    ]
