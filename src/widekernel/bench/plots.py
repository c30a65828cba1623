"""Pictures of measurements, drawn without touching matplotlib's global state."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from widekernel.bench.cases import PASSES
from widekernel.bench.device_operators import DeviceRow
from widekernel.bench.gpu import Gpu
from widekernel.bench.machine import Machine
from widekernel.bench.operators import Row
from widekernel.bench.precision import PRECISIONS
from widekernel.figures import new_figure, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of each rival: the field of its time, the layout of the rows it is taken from (None: either), and its colour.
_RIVALS = {
    "ours NCHW": ("ours_ms", "NCHW", "#1d4e89"),
    "ours NHWC": ("ours_ms", "NHWC", "#00a6a6"),
    "PyTorch NCHW": ("torch_nchw_ms", None, "#c9372c"),
    "PyTorch NHWC": ("torch_nhwc_ms", None, "#f28e2b"),
    "onnxruntime": ("onnxruntime_ms", None, "#8f7ac1"),
    "OpenVINO": ("openvino_ms", None, "#7a7a7a"),
}
_MARKERS = dict(zip(PASSES, "osv"))


def draw(rows: Sequence[Row], machine: Machine) -> bytes:
    """Draw the times against the size of the kernel, a panel a pass, and the roofline, as a PNG file."""
    passes = [direction for direction in PASSES if any(row.direction == direction for row in rows)]
    # Three passes and the roofline make a square.
    lines = 1 + len(passes) // 2
    figure = new_figure(13, 5.2 * lines)
    panels = figure.subplots(lines, 2, squeeze=False).ravel()
    for axes, direction in zip(panels, passes):
        _draw_times(axes, [row for row in rows if row.direction == direction], direction)
    limits = [limit for axes in panels[: len(passes)] for limit in axes.get_ylim()]
    for axes in panels[: len(passes)]:
        axes.set_ylim(min(limits), max(limits))
    _draw_roofline(panels[len(passes)], rows, machine.peak, f"FMA {machine.peak:.0f} GFLOP/s")
    for axes in panels[len(passes) + 1 :]:
        axes.set_axis_off()
    figure.suptitle(f"{machine.cpu}, {machine.threads} threads, float32", fontsize=10)
    return to_png(figure)


def draw_device(rows: Sequence[DeviceRow], gpu: Gpu) -> bytes:
    """Draw a line of panels for each type, one a pass and the roofline, as a PNG file."""
    passes = [direction for direction in PASSES if any(row.direction == direction for row in rows)]
    precisions = [p for name, p in PRECISIONS.items() if any(row.dtype == name for row in rows)]
    figure = new_figure(5.4 * (len(passes) + 1), 4.4 * max(1, len(precisions)))
    lines = figure.subplots(max(1, len(precisions)), len(passes) + 1, squeeze=False)
    for panels, precision in zip(lines, precisions):
        own = [row for row in rows if row.dtype == precision.name]
        for axes, direction in zip(panels, passes):
            _draw_times(axes, [row for row in own if row.direction == direction], direction)
            axes.set_title(f"{direction}, {precision.name}")
        limits = [limit for axes in panels[:-1] for limit in axes.get_ylim()]
        for axes in panels[:-1]:
            axes.set_ylim(min(limits), max(limits))
        peak = gpu.peak(precision)
        _draw_roofline(panels[-1], own, peak, f"matrix products, {peak / 1e3:.3g} TFLOP/s")
    figure.suptitle(gpu.name, fontsize=10)
    return to_png(figure)


def _draw_times(axes: Axes, rows: Sequence[Row], direction: str) -> None:
    for label, (field, layout, colour) in _RIVALS.items():
        named = False
        for line in _lines(rows, field, layout):
            sizes, times = zip(*line)
            axes.plot(sizes, times, color=colour, marker="o", markersize=4, linewidth=1, label=None if named else label)
            named = True
    axes.set(xscale="log", yscale="log", xlabel="longer side of the kernel", title=direction)
    axes.set_ylabel("milliseconds (lines: same image, same shape of kernel)", fontsize=8)
    ticks = sorted({_size(row) for row in rows})
    axes.set_xticks(ticks, [str(size) for size in ticks], fontsize=7)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _lines(rows: Sequence[Row], field: str, layout: str | None) -> list[list[tuple[int, float]]]:
    """Give (size, time) of what differs in the size of the kernel only, one list each."""
    lines: dict[tuple, dict[int, float]] = defaultdict(dict)
    for row in rows:
        value = getattr(row, field)
        if value is None or math.isnan(value) or layout not in (None, row.layout):
            continue
        kind = (row.kernel_height > row.kernel_width) - (row.kernel_height < row.kernel_width)
        lines[row.batch, row.channels, row.height, row.width, kind][_size(row)] = value
    return [sorted(line.items()) for line in lines.values()]


def _size(row: Row) -> int:
    return max(row.kernel_height, row.kernel_width)


def _draw_roofline(axes: Axes, rows: Sequence[Row], peak: float, what: str) -> None:
    for direction, marker in _MARKERS.items():
        chosen = [row for row in rows if row.direction == direction]
        for label, (field, layout, colour) in _RIVALS.items():
            points = [
                (row.intensity, row.gflops * row.ours_ms / getattr(row, field))
                for row in chosen
                if getattr(row, field) is not None and layout in (None, row.layout)
            ]
            points = [point for point in points if not math.isnan(point[1])]
            if points:
                shown = label if direction == chosen[0].direction == rows[0].direction else None
                axes.scatter(
                    [x for x, _ in points],
                    [y for _, y in points],
                    s=18,
                    marker=marker,
                    color=colour,
                    label=shown,
                    linewidths=0,
                )
        if chosen:
            axes.scatter([], [], s=18, marker=marker, color="0.4", label=direction)
    low, high = (bound([row.intensity for row in rows]) for bound in (min, max))
    # Small tensors are copied within caches, so that every case has a roof of its own; this is the highest.
    copying = max(row.copy_gbs for row in rows)
    span = [low / 2, peak / copying, high * 2]
    ceiling = [min(peak, copying * intensity) for intensity in sorted(span)]
    axes.plot(sorted(span), ceiling, color="black", linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="operations for each byte moved", title="roofline")
    axes.set_ylabel("GFLOP/s (taps on pixels)", fontsize=8)
    axes.text(span[-1], peak, what, ha="right", va="bottom", fontsize=7)
    axes.text(span[0], ceiling[0], f" copy, up to {copying:.0f} GB/s", ha="left", va="top", fontsize=7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, ncols=2)
