"""Plots of the training curves, drawn without touching matplotlib's global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from widekernel.engine.metrics import Metric
from widekernel.figures import new_figure, to_png
from widekernel.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]
"""Rows of metrics.jsonl."""

TRAINING_COLOR = "#7f8c99"
COLORS = ("#d55e00", "#0072b2", "#009e73", "#b8529a", "#8c6d1f", "#4f9fd0")
"""Colors of what is measured; they differ for color-blind readers, too."""

_RATE_COLOR = "#e9e3d3"
_WEIGHTS = {"alpha": 0.55, "linewidth": 1.0}  # beside averaged weights, the others are thin
_AVERAGED = {"linewidth": 2.0}
_FEW = 60
"""Most points of a curve that are marked one by one."""

_MANY = 200
"""Points from which a training loss is smoothed; its points stay visible in a light color."""

_LOG_SPAN = 20
"""Ratio of the largest to the smallest loss from which the axis is logarithmic."""


def save_curves(rows: Rows, metrics: Sequence[Metric], path: Path) -> None:
    """Draw the losses, and the metrics by unit, over optimizer steps.

    Args:
        rows: rows of metrics.jsonl.
        metrics: what the evaluations measure.
        path: picture, in PNG format.

    Raises:
        WidekernelError: the picture cannot be written.
    """
    groups = metric_groups(metrics)
    columns = min(3, 1 + len(groups))
    lines = math.ceil((1 + len(groups)) / columns)
    figure = new_figure(5.2 * columns, 4.4 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    draw_losses(panels[0], rows, metrics)
    for panel, group in zip(panels[1:], groups, strict=False):
        draw_metrics(panel, rows, group)
    for panel in panels[1 + len(groups) :]:
        panel.set_axis_off()
    write_file(path, to_png(figure, dpi=120))


def metric_groups(metrics: Sequence[Metric]) -> list[tuple[Metric, ...]]:
    """Return the metrics that share a panel: those with one unit and direction. Losses belong to the panel of losses."""
    groups: dict[tuple[str, bool], list[Metric]] = {}
    for metric in metrics:
        if not _is_loss(metric):
            groups.setdefault((metric.unit, metric.larger_is_better), []).append(metric)
    return [tuple(group) for group in groups.values()]


def draw_losses(axes: Axes, rows: Rows, metrics: Sequence[Metric]) -> None:
    """Draw training losses, held-out losses and, in the background, the learning rate over optimizer steps."""
    _draw_rate(axes, rows)
    _draw_training_loss(axes, rows, "train_loss", "training", TRAINING_COLOR)
    parts = sorted({key for row in rows for key in row if key.startswith("train_loss_")})
    names = [part.removeprefix("train_loss_") for part in parts]
    held_out = [metric for metric in metrics if _is_loss(metric)]
    # A held-out loss has the color of the training loss of the same name, if it is named.
    colors = dict(zip(dict.fromkeys([*map(_loss_name, held_out), *names]), _cycle(), strict=False))
    for part, name in zip(parts, names, strict=True):
        _draw_training_loss(axes, rows, part, f"training: {name}", colors[name])
    averaged = []
    for metric in held_out:
        label = f"held-out: {metric.label}" if _loss_name(metric) else "held-out"
        averaged.append(_draw_metric(axes, rows, metric, colors[_loss_name(metric)], label))
    _set_loss_scale(axes)
    axes.set(title="Loss", ylabel="loss")
    _finish(axes, rows, any(averaged))


def draw_metrics(axes: Axes, rows: Rows, metrics: Sequence[Metric]) -> None:
    """Draw held-out metrics with one unit and direction over optimizer steps, and ring the best value of each."""
    averaged = []
    for metric, color in zip(metrics, _cycle(), strict=False):
        best = _best(rows, metric)
        label = metric.label if best is None else f"{metric.label} (best {metric.text(best[1])})"
        averaged.append(_draw_metric(axes, rows, metric, color, label))
        if best is not None:
            axes.plot(*best, marker="o", markersize=8, markerfacecolor="none", markeredgecolor=color, linestyle="none")
    labels = [metric.label for metric in metrics]
    title = "Held-out " + (", ".join(labels) if len(labels) <= 3 else "metrics")
    axes.set(title=title if metrics[0].larger_is_better else f"{title} (lower is better)", ylabel=metrics[0].unit or "value")
    _finish(axes, rows, any(averaged))


def _draw_metric(axes: Axes, rows: Rows, metric: Metric, color: str, label: str) -> bool:
    """Draw a metric of the weights and of the averaged weights; return whether there are averaged ones."""
    plain, averaged = _points(rows, metric.name), _points(rows, f"ema_{metric.name}")
    both = bool(len(plain[0]) and len(averaged[0]))
    if len(plain[0]):
        _plot(axes, plain, color=color, label=None if both else label, **(_WEIGHTS if both else {"linewidth": 1.6}))
    if len(averaged[0]):
        _plot(axes, averaged, color=color, label=label, **_AVERAGED)
    return both


def _draw_training_loss(axes: Axes, rows: Rows, key: str, label: str, color: str) -> None:
    steps, values = points = _points(rows, key)
    if len(steps) < _MANY:
        if len(steps):
            _plot(axes, points, color=color, label=label, linewidth=1.4)
        return
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.7)
    axes.plot(steps, _smoothed(values, len(steps) // 50), color=color, label=label, linewidth=1.6)


def _draw_rate(axes: Axes, rows: Rows) -> None:
    """Draw the learning rate as an area behind the curves."""
    steps, values = points = _points(rows, "lr")
    if not len(steps):
        return
    rates = axes.twinx()
    rates.set_zorder(axes.get_zorder() - 1)
    axes.patch.set_visible(False)
    rates.fill_between(steps, values, color=_RATE_COLOR, alpha=0.6, linewidth=0)
    rates.plot(*points, color=_RATE_COLOR, linewidth=1, marker="." if len(steps) == 1 else None)
    rates.set_ylim(bottom=0)
    rates.set_ylabel("learning rate (area)", color="#8a8069")
    rates.tick_params(axis="y", colors="#8a8069")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    rates.spines[["top"]].set_visible(False)


def _best(rows: Rows, metric: Metric) -> tuple[float, float] | None:
    """Return step and value of the best result, of the averaged weights if there are any."""
    points = _points(rows, f"ema_{metric.name}")
    best: tuple[float, float] | None = None
    for step, value in zip(*(points if len(points[0]) else _points(rows, metric.name)), strict=True):
        if metric.is_better(value, None if best is None else best[1]):
            best = float(step), float(value)
    return best


def _set_loss_scale(axes: Axes) -> None:
    """Make the axis of the losses logarithmic if they are positive and span a large ratio."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > _LOG_SPAN * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _finish(axes: Axes, rows: Rows, averaged: bool) -> None:
    """Set up the axis of steps, which is the same in all panels, and the legend, which is below and so hides nothing."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, 1.03 * max((row["step"] for row in rows), default=1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _short(step)))
    axes.grid(alpha=0.25)
    axes.spines[["top"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if averaged:
        handles += [Line2D([], [], color="0.2", **_AVERAGED), Line2D([], [], color="0.2", **_WEIGHTS)]  # type: ignore[arg-type]
        labels += ["averaged weights", "weights"]
    if handles:
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2 if len(labels) < 6 else 3}
        axes.legend(handles, labels, frameon=False, fontsize=8.5, **place)
    else:
        axes.text(0.5, 0.5, "no values yet", transform=axes.transAxes, ha="center", va="center", color="0.5")


def _short(step: float) -> str:
    """Return a number of steps in short, such as 250k."""
    if step >= 1e6:
        return f"{step / 1e6:g}M"
    return f"{step / 1e3:g}k" if step >= 1e4 else f"{step:g}"


def _plot(axes: Axes, points: tuple[np.ndarray, np.ndarray], **style: Any) -> None:
    """Draw a curve; its points are marked if they are few, or if some would be invisible between missing ones."""
    marked = len(points[0]) <= _FEW or not np.isfinite(points[1]).all()
    axes.plot(*points, marker="." if marked else None, markersize=5, **style)


def _points(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of a key; a value that is not finite interrupts the curve."""
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    return steps, np.where(np.isfinite(values), values, np.nan)


def _smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Return the means over `width` values before and after each, as far as there are any."""
    finite = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(finite, values, 0.0), finite))
    index = np.arange(len(values))
    low, high = np.maximum(index - width, 0), np.minimum(index + width + 1, len(values))
    number = counts[high] - counts[low]
    means = (sums[high] - sums[low]) / np.maximum(number, 1)
    return np.where(finite, means, np.nan)


def _cycle() -> list[str]:
    return list(COLORS) * 8


def _is_loss(metric: Metric) -> bool:
    return metric.name.removeprefix("val_").split("_")[0] == "loss"


def _loss_name(metric: Metric) -> str:
    """Return the name of a held-out loss, as in the key of the training loss."""
    return metric.name.removeprefix("val_").removeprefix("loss").removeprefix("_")
