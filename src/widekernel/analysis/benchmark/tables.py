"""Rows of measurements as CSV (every field), and as the table that people read (some of them)."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from widekernel.analysis.benchmark.networks import NetworkRow
from widekernel.analysis.benchmark.operators import Row
from widekernel.training.files import write_atomically

Column = tuple[str, Callable[[Any], str]]


def write_csv(rows: Sequence[Any], path: Path) -> None:
    """Write rows, all of one dataclass, with a column for each of its fields; empty where a value is None."""
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(rows[0])] if rows else []
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = dataclasses.asdict(row)
        writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in values.items()})
    write(text.getvalue().encode(), path)


def write(content: bytes, path: Path) -> None:
    """Replace a file by `content`, or leave it as it is if that fails."""
    write_atomically(path, lambda file: file.write(content))


def columns(rows: Sequence[Row]) -> list[Column]:
    """Give the columns of a table of operators, without those in which nothing would stand."""
    chosen: list[Column] = [
        ("case", lambda row: row.case),
        ("N×C×H×W, kernel", lambda row: row.shape),
        ("pass", lambda row: row.direction),
        ("layout", lambda row: row.layout),
        ("ours, ms", lambda row: _times(row.ours_ms, row.ours_calls)),
        ("±", lambda row: f"{100 * row.ours_spread:.0f} %"),
        ("PyTorch NCHW, ms", lambda row: _times(row.torch_nchw_ms, row.torch_nchw_calls)),
        ("PyTorch NHWC, ms", lambda row: _times(row.torch_nhwc_ms, row.torch_nhwc_calls)),
    ]
    for engine in ("onnxruntime", "openvino"):
        if any(getattr(row, f"{engine}_ms") is not None for row in rows):
            chosen.append((f"{engine}, ms", _engine_time(f"{engine}_ms")))
    chosen += [
        ("× best", lambda row: factor(row.times_best)),
        ("× NCHW", lambda row: factor(row.times_default)),
        ("GFLOP/s", lambda row: f"{row.gflops:.0f}"),
        ("of peak", lambda row: f"{row.peak_share:.2f}"),
        ("limit, ms", lambda row: _milliseconds(row.limit_ms)),
        ("of limit", lambda row: f"{row.limit_share:.2f}"),
        ("backend", lambda row: row.backend),
    ]
    if any(row.algorithm for row in rows):
        chosen.append(("algorithm", lambda row: row.algorithm))
    return chosen


def network_columns(rows: Sequence[NetworkRow]) -> list[Column]:
    """Give the columns of a table of networks."""
    chosen: list[Column] = [
        ("model", lambda row: row.model),
        ("mode", lambda row: row.mode),
        ("rival", lambda row: row.rival + (", compiled" if row.compiled else "")),
        ("layout", lambda row: row.layout),
        ("ms", lambda row: _times(row.ms, row.calls)),
        ("±", lambda row: f"{100 * row.spread:.0f} %"),
        ("× PyTorch NHWC", lambda row: factor(row.times_nhwc)),
        ("× PyTorch NCHW", lambda row: factor(row.times_default)),
        ("images/s", lambda row: f"{row.images_per_second:.1f}"),
    ]
    if any(row.depthwise_share is not None for row in rows):
        chosen.append(("depthwise", lambda row: "" if row.depthwise_share is None else f"{100 * row.depthwise_share:.0f} %"))
    return chosen


def markdown(rows: Sequence[Any], chosen: Sequence[Column]) -> str:
    """Give a table in Markdown."""
    lines = [[header for header, _ in chosen], ["---"] * len(chosen)]
    lines += [[cell(row).replace("|", "\\|") for _, cell in chosen] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def document(title: str, facts: Sequence[str], table: str, notes: Sequence[str], command: str) -> str:
    """Put together the page that is kept: machine, command, table and how to read it."""
    parts = [f"# {title}", "\n".join(f"- {fact}" for fact in facts), f"`{command}`", table]
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def factor(value: float) -> str:
    """Write how many times faster something is."""
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 3 else f"{value:.2f}"


def _engine_time(field: str) -> Callable[[Row], str]:
    return lambda row: _milliseconds(getattr(row, field))


def _times(milliseconds: float, calls: int) -> str:
    """Write a median with the number of calls behind it, if that is small."""
    return _milliseconds(milliseconds) + (f" ({calls})" if calls < 5 else "")


def _milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 0.1
        else f"{value:.3f}"
    )


OPERATOR_NOTES = (
    "Times are medians of calls made in turns with the rivals, on the same numbers, in float32; ± is half the distance "
    "between the quartiles. A number in brackets says how many calls there were, if fewer than five: of what takes more "
    "than a second there is one.",
    "× best, × NCHW: how many times faster ours is than PyTorch in its better layout, and in its default layout.",
    "GFLOP/s count taps that lie on a pixel, twice each, and no padding. An algorithm that needs fewer operations than that "
    "can be above the FMA peak (of peak > 1).",
    "limit: the larger one of two times: direct computation at the FMA peak, and reading and writing everything once at the "
    "speed with which PyTorch copies tensors of this size.",
    "The input gradient of ours includes flipping the kernel. PyTorch's gradients are `aten.convolution_backward`, asked "
    "for one of them at a time.",
    "Before anything is timed the operator is compared with its definition in float64 on small shapes, and before each case "
    "all rivals with each other.",
)
NETWORK_NOTES = (
    "Times are medians of calls made in turns, on the same images, in float32; ± is half the distance between the "
    "quartiles. A number in brackets says how many calls there were, if fewer than five.",
    "train: forward, cross-entropy, backward and a step of SGD. infer: forward in evaluation and inference mode.",
    "PyTorch: the same network with every branch of a large kernel, and every other depthwise layer, a convolution of "
    "PyTorch's, gradients included. folded: after `widekernel.fold`. accelerated: folded (for inference), then "
    "`widekernel.accelerate`.",
    "× PyTorch NHWC, NCHW: how many times faster it is than that network, unfolded and not compiled, in either layout.",
    "depthwise: share of the time in depthwise convolutions.",
    "Before anything is timed every large-kernel layer is compared with the same layer on PyTorch's convolutions, and then "
    "the outputs, or the gradients of one step, of all rivals.",
)
