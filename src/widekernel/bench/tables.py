"""Rows of measurements as CSV (every field), and as the table that people read (some of them)."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from widekernel.bench.device_networks import DeviceNetworkRow
from widekernel.bench.device_operators import DeviceRow
from widekernel.bench.networks import NetworkRow
from widekernel.bench.operators import Row
from widekernel.files import write_atomically

Column = tuple[str, Callable[[Any], str]]


def write_csv(rows: Sequence[Any], path: Path) -> None:
    """Write rows, all of one dataclass, with a column for each of its fields; empty where a value is None or NaN."""
    write(_csv(rows, header=True).encode(), path)


def write_each(rows: Iterable[Any], path: Path | None) -> Iterator[Any]:
    """Pass rows on, each of them written to a CSV file before: whoever is stopped keeps what there is so far.

    Args:
        rows: all of one dataclass.
        path: of the file, which is replaced when the first row comes; None to write nothing.
    """
    for number, row in enumerate(rows):
        if path is not None:
            with path.open("a" if number else "w", encoding="utf-8", newline="") as file:
                file.write(_csv([row], header=not number))
        yield row


def _csv(rows: Sequence[Any], header: bool) -> str:
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(rows[0])] if rows else []
    writer = csv.DictWriter(text, names, lineterminator="\n")
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in dataclasses.asdict(row).items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"


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


def device_columns(rows: Sequence[DeviceRow]) -> list[Column]:
    """Give the columns of a table of operators on a device, without those in which nothing would stand."""
    chosen: list[Column] = [
        ("dtype", lambda row: row.dtype),
        ("case", lambda row: row.case),
        ("N×C×H×W, kernel", lambda row: row.shape),
        ("pass", lambda row: row.direction),
        ("layout", lambda row: row.layout),
        ("ours, µs", lambda row: _microseconds(row.ours_ms, row.ours_calls)),
        ("±", lambda row: _percent(row.ours_spread, row.ours_ms)),
        ("PyTorch NCHW, µs", lambda row: _microseconds(row.torch_nchw_ms, row.torch_nchw_calls)),
        ("PyTorch NHWC, µs", lambda row: _microseconds(row.torch_nhwc_ms, row.torch_nhwc_calls)),
        ("× best", lambda row: factor(row.times_best)),
        ("× NCHW", lambda row: factor(row.times_default)),
        ("TFLOP/s", lambda row: _number(row.gflops / 1e3)),
        ("floor, µs", lambda row: _number(1e3 * row.limit_ms)),
        ("of floor", lambda row: _fixed(row.limit_share)),
        ("floor is", lambda row: row.limited_by),
        ("off float64 by", lambda row: _rough(row.reference_error)),
        ("backend", lambda row: row.backend),
    ]
    if any(row.algorithm for row in rows):
        chosen.append(("algorithm", lambda row: row.algorithm))
    return chosen + _remarks(rows)


def device_network_columns(rows: Sequence[DeviceNetworkRow]) -> list[Column]:
    """Give the columns of a table of networks on a device, without those in which nothing would stand."""
    chosen: list[Column] = [
        ("model", lambda row: row.model),
        ("dtype", lambda row: row.dtype),
        ("images", lambda row: str(row.batch)),
        ("mode", lambda row: row.mode),
        ("rival", lambda row: row.rival + (", compiled" if row.compiled else "")),
        ("layout", lambda row: row.layout),
        ("ms", lambda row: _times(row.ms, row.calls)),
        ("±", lambda row: _percent(row.spread, row.ms)),
        ("images/s", lambda row: _number(row.images_per_second)),
        ("× PyTorch NHWC", lambda row: factor(row.times_nhwc)),
        ("× PyTorch NCHW", lambda row: factor(row.times_default)),
        ("× best of PyTorch", lambda row: factor(row.times_best)),
    ]
    if any(row.depthwise_share is not None for row in rows):
        chosen.append(("depthwise", lambda row: _percent(row.depthwise_share, row.depthwise_share)))
    return chosen + _remarks(rows)


def _remarks(rows: Sequence[DeviceRow | DeviceNetworkRow]) -> list[Column]:
    return [("remark", lambda row: row.remark)] if any(row.remark for row in rows) else []


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
    """Write how many times faster something is; nothing for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 3 else f"{value:.2f}"


def _engine_time(field: str) -> Callable[[Row], str]:
    return lambda row: _milliseconds(getattr(row, field))


def _times(milliseconds: float, calls: int) -> str:
    """Write a median with the number of calls behind it, if that is small."""
    return _milliseconds(milliseconds) + (f" ({calls})" if 0 < calls < 5 else "")


def _microseconds(milliseconds: float, calls: int) -> str:
    return _number(1e3 * milliseconds) + (f" ({calls})" if 0 < calls < 5 else "")


def _number(value: float) -> str:
    """Write a number to three digits, none of them after the point from 100 on; nothing for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _fixed(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _rough(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1g}"


def _percent(share: float | None, of: float | None) -> str:
    """Write a share of a time as percent; nothing if there is no time."""
    return "" if share is None or of is None or math.isnan(of) else f"{100 * share:.0f} %"


def _milliseconds(value: float | None) -> str:
    if value is None or math.isnan(value):
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

DEVICE_OPERATOR_NOTES = (
    "Times are of the device, by CUDA events: medians of calls made in turns with the rivals, on the same random numbers. "
    "Before each call, and not timed, a buffer of at least twice the L2 cache is zeroed and read, so that nothing is found "
    "in the cache and the host has launched the call before the device gets to it. Every rival is called once before "
    "without being timed: it compiles, and cuDNN chooses. ± is half the distance between the quartiles. A number in "
    "brackets says how many calls there were, if fewer than five: of what takes more than 0.2 s there is one.",
    "dtype: of all tensors; tf32 is float32 tensors with `torch.set_float32_matmul_precision('high')` and cuDNN's tf32 "
    "allowed, float32 with neither. PyTorch's convolutions run with `cudnn.benchmark` on.",
    "× best, × NCHW: how many times faster ours is than PyTorch in its better layout, and in its default layout. PyTorch's "
    "times are the same in the two rows of a pass.",
    "TFLOP/s count taps that lie on a pixel, twice each, and no padding.",
    "floor: the longer one of two times: these operations at the speed of a large matrix product in that type, and reading "
    "and writing everything once at the speed of a large copy. For float32 the product is the faster one of the strict one "
    "and a third of tf32's, which three products make as exact.",
    "of floor: a share of 1 is out of reach where the floor is matmul: as a matrix product a convolution is a banded "
    "Toeplitz matrix, which in tiles that the hardware takes needs 1.3 to 1.7 times the operations counted here.",
    "The input gradient of ours includes flipping the kernel. PyTorch's gradients are `aten.convolution_backward`, asked "
    "for one of them at a time.",
    "off float64 by: largest difference of the call that is timed from float64, in its first and last image, relative to "
    "the largest number; allowed are 1e-5 in float32, 2e-3 in tf32, 4e-3 in float16, 1.6e-2 in bfloat16. All rivals are "
    "compared with each other on the whole batch, within twice that (1e-4 in float32). What differs by more has no times.",
)
DEVICE_NETWORK_NOTES = (
    "Times are of the device, by CUDA events: medians of calls made in turns, on the same images; ± is half the distance "
    "between the quartiles. A number in brackets says how many calls there were, if fewer than five. Every rival is called "
    "once before without being timed.",
    "dtype: bfloat16 and float16 by autocast, with parameters in float32 (float16 without scaling the loss); tf32 is "
    "float32 with `torch.set_float32_matmul_precision('high')` and cuDNN's tf32 allowed. `cudnn.benchmark` is on.",
    *NETWORK_NOTES[1:4],
    "× best of PyTorch: how many times faster it is than the fastest of PyTorch's: either layout, folded or not, and for "
    "compiled rows, which were timed in turns with all the others once more, compiled or not.",
    "depthwise: share of the time in depthwise convolutions, measured in a call of its own.",
    "Before anything is timed every large-kernel layer is compared with the same layer on PyTorch's convolutions, and then "
    "the outputs, or the gradients of one step, of all rivals: on two images in strict float32, where a difference means "
    "something. Of compiled networks the outputs are compared with those before compiling, in the type that is timed.",
)
