"""The picture of a sweep: the speed-up over PyTorch's best for every kernel and map, one panel per pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from widekernel.bench.cases import PASSES, Case
from widekernel.bench.rows import SweepRow
from widekernel.bench.sweep.grid import case_of
from widekernel.bench.sweep.summary import geometric_mean
from widekernel.bench.tables import factor
from widekernel.figures import new_figure, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_PANEL, _LINE, _AROUND = 3.8, 0.24, 1.6  # inches: width of a panel, height of a line, and of everything around the lines
_SLOWEST, _FASTEST = 0.5, 100.0  # the speed-ups beyond which colors do not change
_TICKS = (0.5, 0.7, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0)

Kernel = tuple[int, int]


def draw_heat_map(rows: Sequence[SweepRow], cases: Sequence[Case], title: str) -> bytes:
    """Draw the geometric mean of the speed-ups in each combination of pass, kernel and map; return the bytes of a PNG.

    Args:
        rows: the measured cells.
        cases: the convolutions of the grid; combinations without any are gray.
        title: description of the machine.
    """
    everything = [*cases, *(case_of(row) for row in rows)]
    kernels = sorted({case.kernel for case in everything}, key=_in_order)
    maps = sorted({case.shape[2:] for case in everything})
    exists = {(case.kernel, case.shape[2:]) for case in everything}
    figure = new_figure(_PANEL * len(PASSES) + 1.0, _LINE * len(kernels) + _AROUND)
    panels = figure.subplots(1, len(PASSES), sharey=True)
    for direction, axes in zip(PASSES, panels):
        values = {place: _speed_ups(rows, direction, *place) for place in exists}
        image = _draw_panel(axes, values, kernels, maps)
        axes.set(title=direction, xlabel="map")
    panels[0].set_ylabel("kernel, height × width")
    bar = figure.colorbar(image, ax=panels, shrink=0.8, label="speed-up over PyTorch's best (geometric mean)")
    bar.set_ticks([math.log(tick) for tick in _TICKS], labels=[f"{tick:g}" for tick in _TICKS])
    below = "small numbers: cells measured; hatched: none yet; –: without a time of PyTorch; gray: not in the grid"
    figure.suptitle(f"{title}\n{below}", fontsize=9)
    return to_png(figure)


def _draw_panel(
    axes: Axes, values: dict[tuple[Kernel, Kernel], list[float]], kernels: Sequence[Kernel], maps: Sequence[Kernel]
) -> AxesImage:
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.patches import Rectangle

    means = np.full((len(kernels), len(maps)), np.nan)
    for line, kernel in enumerate(kernels):
        for column, extent in enumerate(maps):
            speed_ups, corner = values.get((kernel, extent)), (column - 0.5, line - 0.5)
            if speed_ups is None:
                axes.add_patch(Rectangle(corner, 1, 1, facecolor="0.8", linewidth=0))
            elif not speed_ups:
                axes.add_patch(Rectangle(corner, 1, 1, facecolor="none", edgecolor="0.85", hatch="////", linewidth=0))
            else:
                means[line, column] = _write_mean(axes, line, column, speed_ups)
    norm = TwoSlopeNorm(0.0, math.log(_SLOWEST), math.log(_FASTEST))
    image = axes.imshow(means, cmap="RdBu", norm=norm, aspect="auto")
    axes.set_xticks(range(len(maps)), [f"{height}²" if height == width else f"{height}×{width}" for height, width in maps])
    axes.set_yticks(range(len(kernels)), [f"{height}×{width}" for height, width in kernels])
    axes.tick_params(labelsize=7)
    return image


def _write_mean(axes: Axes, line: int, column: int, speed_ups: Sequence[float]) -> float:
    """Write the geometric mean of speed-ups (NaN: unknown) and their number into a field; return its logarithm."""
    mean = geometric_mean([value for value in speed_ups if not math.isnan(value)])
    share = math.log(mean) / math.log(_FASTEST if mean > 1 else _SLOWEST)
    color = "white" if share > 0.6 else "black"
    axes.text(column - 0.08, line, factor(mean) or "–", ha="center", va="center", fontsize=7, color=color)
    axes.text(column + 0.46, line + 0.42, str(len(speed_ups)), ha="right", va="bottom", fontsize=5, color=color)
    return math.log(mean)


def _speed_ups(rows: Sequence[SweepRow], direction: str, kernel: Kernel, extent: Kernel) -> list[float]:
    wanted = (direction, *kernel, *extent)
    return [
        row.times_best
        for row in rows
        if (row.direction, row.kernel_height, row.kernel_width, row.height, row.width) == wanted
    ]


def _in_order(kernel: Kernel) -> tuple[int, int, int]:
    """Order kernels: squares, tall strips, wide strips, each by size."""
    height, width = kernel
    return (height > width) + 2 * (height < width), max(kernel), min(kernel)
