"""Plot of a sparsity report, drawn without touching matplotlib's global state."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import numpy as np

from widekernel.figures import new_figure, to_png
from widekernel.sparsity.snapshot import SparsitySnapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LIVE, _TARGET, _DEAD, _LINE = "#2a6f97", "#c9372c", "#f4c9a8", "#ffffff"


def plot(snapshot: SparsitySnapshot) -> bytes:
    """Draw a snapshot and return it as a PNG file."""
    shown = len(snapshot.images)
    rows = 1 + math.ceil(shown / 3)
    figure = new_figure(12, 3.6 + 3.6 * (rows - 1))
    grid = figure.add_gridspec(rows, 6)
    _plot_densities(figure.add_subplot(grid[0, :4]), snapshot)
    _plot_churn(figure.add_subplot(grid[0, 4:]), snapshot)
    for place, (name, image) in enumerate(snapshot.images.items()):
        column = place % 3 * 2
        _plot_weights(figure.add_subplot(grid[1 + place // 3, column : column + 2]), name, image.numpy())
    if snapshot.images:
        figure.supxlabel("magnitude of the weights, blue (each kernel relative to its largest); masked weights, orange")
    return to_png(figure)


def _plot_densities(axes: Axes, snapshot: SparsitySnapshot) -> None:
    layers = [layer for layer in snapshot.layers if not layer.reason]
    zeros = 1 - sum(layer.active for layer in layers) / max(1, sum(layer.size for layer in layers))
    axes.bar(range(len(layers)), [layer.density for layer in layers], color=_LIVE, width=0.9, label="live weights")
    # One tick per layer, at its target density.
    axes.hlines(
        [layer.target or 0.0 for layer in layers],
        [place - 0.45 for place in range(len(layers))],
        [place + 0.45 for place in range(len(layers))],
        color=_TARGET,
        linewidth=1.2,
        label="target",
    )
    axes.set(ylim=(0, 1.05), ylabel="share of weights", title=f"Density per layer ({100 * zeros:.1f} % zeros)")
    every = max(1, len(layers) // 12)
    axes.set_xticks(range(0, len(layers), every))
    names = [_short(layer.name) for layer in layers[::every]]
    axes.set_xticklabels(names, rotation=60, ha="right", rotation_mode="anchor", fontsize=6)
    if layers:
        axes.legend(loc="lower right", fontsize=7, ncols=2)


def _plot_churn(axes: Axes, snapshot: SparsitySnapshot) -> None:
    axes.set_title("Weights moved per update")
    if not snapshot.churn:
        axes.text(0.5, 0.5, "the masks have not moved", ha="center", va="center", color="0.4", transform=axes.transAxes)
        axes.set_axis_off()
        return
    steps = [update.step for update in snapshot.churn]
    shares = [100 * update.grown / max(1, update.active) for update in snapshot.churn]
    axes.plot(steps, shares, color=_LIVE, marker=".")
    axes.set(xlabel="optimizer step", ylabel="% of the live weights", ylim=(0, None))
    axes.grid(alpha=0.3)


def _plot_weights(axes: Axes, name: str, image: np.ndarray) -> None:
    from matplotlib import colormaps

    # Masked weights and the lines between kernels have colors that no magnitude has.
    shades = colormaps["Blues"].with_extremes(bad=_DEAD, under=_LINE)
    # If no weight is live, any positive number will do as the largest.
    largest = float(np.nan_to_num(image, nan=0.0).max()) or 1.0
    axes.imshow(image, cmap=shades, vmin=0.0, vmax=max(largest, 1e-30), interpolation="nearest")
    axes.set_title(_short(name), fontsize=8)
    axes.set_axis_off()


def _short(name: str) -> str:
    """Return a parameter's name without the parts that do not say where it is."""
    return re.sub(r"\b(stages|blocks|mixer|large_kernel|layer|source|weight)\.|\.weight$", "", name)
