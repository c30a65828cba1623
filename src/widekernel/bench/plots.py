"""Plots of operator times and rooflines, drawn without touching matplotlib's global state."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from widekernel.bench.cases import PASSES
from widekernel.bench.platforms import Platform
from widekernel.bench.precision import FLOAT32, PRECISIONS, Precision
from widekernel.bench.rows import DeviceOperatorRow, OperatorRow
from widekernel.figures import new_figure, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# For each implementation: the field of its time, the layout of the rows that it is taken from (None: either), and its color.
_IMPLEMENTATIONS = {
    "ours NCHW": ("ours_ms", "NCHW", "#1d4e89"),
    "ours NHWC": ("ours_ms", "NHWC", "#00a6a6"),
    "PyTorch NCHW": ("torch_nchw_ms", None, "#c9372c"),
    "PyTorch NHWC": ("torch_nhwc_ms", None, "#f28e2b"),
    "onnxruntime": ("onnxruntime_ms", None, "#8f7ac1"),
    "OpenVINO": ("openvino_ms", None, "#7a7a7a"),
}
_MARKERS = dict(zip(PASSES, "osv"))
_WIDTH, _HEIGHT = 5.8, 4.8  # of a panel, in inches


def draw(rows: Sequence[OperatorRow], platform: Platform) -> bytes:
    """Plot times over kernel sizes, one panel per pass, and the roofline, for each precision; return the bytes of a PNG."""
    passes = [direction for direction in PASSES if any(row.direction == direction for row in rows)]
    groups = {p: [row for row in rows if _precision_of(row) is p] for p in PRECISIONS.values()}
    groups = {precision: group for precision, group in groups.items() if group}
    panels = len(passes) + 1
    # A single precision fills two columns; several precisions get a row each.
    columns = min(2, panels) if len(groups) == 1 else panels
    lines_each = math.ceil(panels / columns)
    lines = max(1, lines_each * len(groups))
    figure = new_figure(_WIDTH * columns, _HEIGHT * lines)
    grid = figure.subplots(lines, columns, squeeze=False)
    for number, (precision, group) in enumerate(groups.items()):
        axes = grid[number * lines_each : (number + 1) * lines_each].ravel()
        for direction, panel in zip(passes, axes):
            _draw_times(panel, [row for row in group if row.direction == direction], f"{direction}, {precision.name}")
        limits = [limit for panel in axes[: len(passes)] for limit in panel.get_ylim()]
        for panel in axes[: len(passes)]:
            panel.set_ylim(min(limits), max(limits))
        _draw_roofline(axes[len(passes)], group, platform.operator_peak(precision), platform.peak_name)
        for panel in axes[panels:]:
            panel.set_axis_off()
    figure.suptitle(platform.title, fontsize=10)
    return to_png(figure)


def _precision_of(row: OperatorRow) -> Precision:
    return PRECISIONS[row.dtype] if isinstance(row, DeviceOperatorRow) else FLOAT32


def _draw_times(axes: Axes, rows: Sequence[OperatorRow], title: str) -> None:
    for label, (field, layout, color) in _IMPLEMENTATIONS.items():
        for number, line in enumerate(_lines(rows, field, layout)):
            sizes, times = zip(*line)
            in_legend = label if number == 0 else None
            axes.plot(sizes, times, color=color, marker="o", markersize=4, linewidth=1, label=in_legend)
    axes.set(xscale="log", yscale="log", xlabel="longer side of the kernel", title=title)
    axes.set_ylabel("milliseconds (lines: same image, same shape of kernel)", fontsize=8)
    ticks = sorted({_size(row) for row in rows})
    axes.set_xticks(ticks, [str(size) for size in ticks], fontsize=7)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _lines(rows: Sequence[OperatorRow], field: str, layout: str | None) -> list[list[tuple[int, float]]]:
    """Return lists of (size, time); the rows of each list differ only in the size of the kernel."""
    lines: dict[tuple, dict[int, float]] = defaultdict(dict)
    for row in rows:
        value = getattr(row, field)
        if value is None or math.isnan(value) or layout not in (None, row.layout):
            continue
        orientation = (row.kernel_height > row.kernel_width) - (row.kernel_height < row.kernel_width)
        lines[row.batch, row.channels, row.height, row.width, orientation][_size(row)] = value
    return [sorted(line.items()) for line in lines.values()]


def _size(row: OperatorRow) -> int:
    return max(row.kernel_height, row.kernel_width)


def _draw_roofline(axes: Axes, rows: Sequence[OperatorRow], peak: float, peak_name: str) -> None:
    for direction, marker in _MARKERS.items():
        chosen = [row for row in rows if row.direction == direction]
        for label, (field, layout, color) in _IMPLEMENTATIONS.items():
            points = [
                (row.intensity, row.gflops * row.ours_ms / getattr(row, field))
                for row in chosen
                if getattr(row, field) is not None and layout in (None, row.layout)
            ]
            points = [point for point in points if not math.isnan(point[1])]
            if points:
                in_legend = label if direction == rows[0].direction else None
                xs, ys = zip(*points)
                axes.scatter(xs, ys, s=18, marker=marker, color=color, label=in_legend, linewidths=0)
        if chosen:
            axes.scatter([], [], s=18, marker=marker, color="0.4", label=direction)
    low, high = (bound([row.intensity for row in rows]) for bound in (min, max))
    # Small tensors are copied within caches, so every case has its own roof; the highest one is drawn.
    copying = max(row.copy_gbs for row in rows)
    span = sorted([low / 2, peak / copying, high * 2])
    roof = [min(peak, copying * intensity) for intensity in span]
    axes.plot(span, roof, color="black", linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte moved", title="roofline")
    axes.set_ylabel("GFLOP/s (taps on pixels)", fontsize=8)
    speed = f"{peak / 1e3:.3g} TFLOP/s" if peak >= 1e3 else f"{peak:.0f} GFLOP/s"
    axes.text(span[-1], peak, f"{peak_name}, {speed}", ha="right", va="bottom", fontsize=7)
    axes.text(span[0], roof[0], f" copy, up to {copying:.0f} GB/s", ha="left", va="top", fontsize=7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, ncols=2)
