"""The picture of a sparsity report, drawn without touching matplotlib's global state."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import numpy as np

from widekernel.figures import new_figure, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from widekernel.sparsity.report import SparsityReport

_LIVE, _TARGET, _DEAD, _LINE = "#2a6f97", "#c9372c", "#f4c9a8", "#ffffff"


def draw(report: SparsityReport) -> bytes:
    """Draw `report` as a PNG file."""
    shown = len(report.pictures)
    rows = 1 + math.ceil(shown / 3)
    figure = new_figure(12, 3.6 + 3.6 * (rows - 1))
    grid = figure.add_gridspec(rows, 6)
    _draw_densities(figure.add_subplot(grid[0, :4]), report)
    _draw_churn(figure.add_subplot(grid[0, 4:]), report)
    for place, (name, image) in enumerate(report.pictures.items()):
        column = place % 3 * 2
        _draw_weights(figure.add_subplot(grid[1 + place // 3, column : column + 2]), name, image.numpy())
    if report.pictures:
        figure.supxlabel("magnitude of the weights, blue (each kernel relative to its largest); masked weights, orange")
    return to_png(figure)


def _draw_densities(axes: Axes, report: SparsityReport) -> None:
    layers = report.masked
    axes.bar(range(len(layers)), [layer.density for layer in layers], color=_LIVE, width=0.9, label="live weights")
    # One tick a layer, where its density is to end.
    axes.hlines(
        [layer.target or 0.0 for layer in layers],
        [place - 0.45 for place in range(len(layers))],
        [place + 0.45 for place in range(len(layers))],
        color=_TARGET,
        linewidth=1.2,
        label="target",
    )
    axes.set(ylim=(0, 1.05), ylabel="share of weights", title=f"Density per layer ({100 * report.sparsity():.1f} % zeros)")
    every = max(1, len(layers) // 12)
    axes.set_xticks(range(0, len(layers), every))
    names = [_short(layer.name) for layer in layers[::every]]
    axes.set_xticklabels(names, rotation=60, ha="right", rotation_mode="anchor", fontsize=6)
    if layers:
        axes.legend(loc="lower right", fontsize=7, ncols=2)


def _draw_churn(axes: Axes, report: SparsityReport) -> None:
    axes.set_title("Weights moved per update")
    if not report.churn:
        axes.text(0.5, 0.5, "the masks have not moved", ha="center", va="center", color="0.4", transform=axes.transAxes)
        axes.set_axis_off()
        return
    steps = [churn.step for churn in report.churn]
    axes.plot(steps, [100 * churn.grown / max(1, churn.active) for churn in report.churn], color=_LIVE, marker=".")
    axes.set(xlabel="optimizer step", ylabel="% of the live weights", ylim=(0, None))
    axes.grid(alpha=0.3)


def _draw_weights(axes: Axes, name: str, image: np.ndarray) -> None:
    from matplotlib import colormaps

    # Dead weights and the lines between kernels have colours that no magnitude has.
    shades = colormaps["Blues"].with_extremes(bad=_DEAD, under=_LINE)
    # Where nothing lives, any positive number will do as the largest.
    largest = float(np.nan_to_num(image, nan=0.0).max()) or 1.0
    axes.imshow(image, cmap=shades, vmin=0.0, vmax=max(largest, 1e-30), interpolation="nearest")
    axes.set_title(_short(name), fontsize=8)
    axes.set_axis_off()


def _short(name: str) -> str:
    """Leave out the parts of a parameter's name that say nothing about its place."""
    return re.sub(r"\b(stages|blocks|mixer|large_kernel|layer|source|weight)\.|\.weight$", "", name)
