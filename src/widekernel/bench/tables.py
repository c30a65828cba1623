"""Tables of rows: CSV with every field, and Markdown with the columns for readers."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from widekernel.bench.engines import ENGINES
from widekernel.bench.rivals import RIVALS
from widekernel.bench.rows import CSV_NAME, BranchesRow, NetworkRow, OperatorRow
from widekernel.bench.variants import OURS
from widekernel.files import write_atomically

Column = tuple[str, Callable[[Any], str]]


def write_each(rows: Iterable[Any], path: Path | None) -> Iterator[Any]:
    """Yield rows after writing each of them to a CSV file, so that an interrupted run keeps its measurements.

    Every field of the dataclass is a column; None and NaN are empty.

    Args:
        rows: the rows, all of one dataclass.
        path: path of the file, which is replaced when the first row arrives; None to write nothing.
    """
    for number, row in enumerate(rows):
        if path is not None:
            with path.open("a" if number else "w", encoding="utf-8", newline="") as file:
                file.write(csv_lines(row, header=not number))
        yield row


def csv_columns(kind: type) -> dict[str, str]:
    """Return the field names of a row, by column name."""
    return {field.metadata.get(CSV_NAME, field.name): field.name for field in dataclasses.fields(kind)}


def csv_lines(row: Any, header: bool) -> str:
    """Return the line of a row in a CSV file, after the line of column names if `header` is set."""
    text = io.StringIO()
    columns = csv_columns(type(row))
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerow({column: _cell(getattr(row, name)) for column, name in columns.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"


def write(content: bytes, path: Path) -> None:
    """Replace the content of a file, or leave it unchanged if writing fails."""
    write_atomically(path, lambda file: file.write(content))


def operator_columns(rows: Sequence[OperatorRow], on_device: bool = False) -> list[Column]:
    """Return the columns of a table of operators, without empty ones."""
    unit, per_ms = ("µs", 1e3) if on_device else ("ms", 1.0)

    def time(prefix: str) -> Callable[[Any], str]:
        return lambda row: _time(per_ms * getattr(row, f"{prefix}_ms"), getattr(row, f"{prefix}_calls"))

    def engine_time(engine: str) -> Callable[[Any], str]:
        return lambda row: significant(getattr(row, f"{engine}_ms"))

    engines = [engine for engine in ENGINES if any(getattr(row, f"{engine}_ms") is not None for row in rows)]
    columns: list[Column] = [("dtype", lambda row: row.dtype)] if on_device else []
    columns += [
        ("case", lambda row: row.case),
        ("N×C×H×W, kernel", lambda row: row.shape),
        ("pass", lambda row: row.direction),
        ("layout", lambda row: row.layout),
        (f"ours, {unit}", time("ours")),
        ("±", lambda row: _percent(row.ours_spread, row.ours_ms)),
        (f"PyTorch NCHW, {unit}", time("torch_nchw")),
        (f"PyTorch NHWC, {unit}", time("torch_nhwc")),
        *((f"{engine}, ms", engine_time(engine)) for engine in engines),
        ("× best", lambda row: factor(row.times_best)),
        ("× NCHW", lambda row: factor(row.times_default)),
    ]
    if on_device:
        columns += [
            ("TFLOP/s", lambda row: significant(row.gflops / 1e3)),
            ("floor, µs", lambda row: significant(1e3 * row.limit_ms)),
            ("of floor", lambda row: _formatted(row.limit_share, ".2f")),
            ("floor is", lambda row: row.limited_by),
            ("float64 error", lambda row: _formatted(row.reference_error, ".1g")),
        ]
    else:
        columns += [
            ("GFLOP/s", lambda row: f"{row.gflops:.0f}"),
            ("of peak", lambda row: f"{row.peak_share:.2f}"),
            ("limit, ms", lambda row: significant(row.limit_ms)),
            ("of limit", lambda row: f"{row.limit_share:.2f}"),
        ]
    columns.append(("backend", lambda row: row.backend))
    if any(row.algorithm for row in rows):
        columns.append(("algorithm", lambda row: row.algorithm))
    return columns + _remarks(rows)


def branches_columns(rows: Sequence[BranchesRow]) -> list[Column]:
    """Return the columns of a table of layers with several branches, without empty ones."""
    columns: list[Column] = [
        ("dtype", lambda row: row.dtype),
        ("case", lambda row: row.case),
        ("N×C×H×W, kernels", lambda row: row.shape),
        ("pass", lambda row: row.part),
        ("layout", lambda row: row.layout),
        ("ours, ms", lambda row: significant(row.ours_ms)),
        ("±", lambda row: "" if math.isnan(row.ours_spread) else _percent(row.ours_spread, row.ours_ms)),
    ]
    if any(not math.isnan(row.filled_ms) for row in rows):
        columns.append(("zeros in gaps, ms", lambda row: significant(row.filled_ms)))
    columns += [
        ("PyTorch NCHW, ms", lambda row: significant(row.torch_nchw_ms)),
        ("PyTorch NHWC, ms", lambda row: significant(row.torch_nhwc_ms)),
    ]
    if any(not math.isnan(row.filled_ms) for row in rows):
        columns.append(("× zeros in gaps", lambda row: factor(row.times_filled)))
    return [*columns, ("× best of PyTorch", lambda row: factor(row.times_best)), ("backend", lambda row: row.backend)]


def network_columns(rows: Sequence[NetworkRow], on_device: bool = False) -> list[Column]:
    """Return the columns of a table of networks, without empty ones."""
    columns: list[Column] = [("model", lambda row: row.model)]
    if on_device:
        columns.append(("dtype", lambda row: row.dtype))
    if on_device or len({row.batch for row in rows}) > 1:
        columns.append(("images", lambda row: str(row.batch)))
    columns += [
        ("mode", lambda row: row.mode),
        ("variant", lambda row: row.variant + (", compiled" if row.compiled else "")),
        ("layout", lambda row: row.layout),
        ("ms", lambda row: _time(row.ms, row.calls)),
        ("±", lambda row: _percent(row.spread, row.ms)),
        ("× PyTorch NHWC", lambda row: factor(row.times_nhwc)),
        ("× PyTorch NCHW", lambda row: factor(row.times_default)),
    ]
    if on_device:
        columns.append(("× best of PyTorch", lambda row: factor(row.times_best)))
    if any(row.variant in RIVALS for row in rows):
        best = _best_of_others(rows)
        ours = [("× best rival", lambda row: factor(best[_network(row)] / row.ms) if row.variant.startswith(OURS) else "")]
        columns += ours
    columns.append(("images/s", lambda row: _formatted(row.images_per_second, ".1f")))
    if any(row.depthwise_share is not None for row in rows):
        columns.append(("depthwise", lambda row: _percent(row.depthwise_share, row.depthwise_share)))
    return columns + _remarks(rows)


def _network(row: NetworkRow) -> Hashable:
    """Return what the rows that are compared with each other have in common."""
    return row.model, row.mode, row.batch, getattr(row, "precision", None)


def _best_of_others(rows: Sequence[NetworkRow]) -> dict[Hashable, float]:
    """Return the shortest time of the rows that are not ours, by network, mode and batch; NaN if there is none."""
    best: dict[Hashable, float] = {}
    for row in rows:
        known = best.setdefault(_network(row), math.nan)
        # Written so that a number replaces NaN.
        if not row.variant.startswith(OURS) and not row.ms >= known:
            best[_network(row)] = row.ms
    return best


def _remarks(rows: Sequence[Any]) -> list[Column]:
    return [("remark", lambda row: row.remark)] if any(getattr(row, "remark", "") for row in rows) else []


def markdown(rows: Sequence[Any], columns: Sequence[Column]) -> str:
    """Return a table in Markdown."""
    lines = [[header for header, _ in columns], ["---"] * len(columns)]
    lines += [[cell(row).replace("|", "\\|") for _, cell in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def document(title: str, facts: Sequence[str], table: str, notes: Sequence[str], command: str) -> str:
    """Return the page for a file: the machine, the command, the table and how to read it."""
    parts = [f"# {title}", "\n".join(f"- {fact}" for fact in facts), f"`{command}`", table]
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def factor(value: float) -> str:
    """Format a speed-up; empty for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 3 else f"{value:.2f}"


def significant(value: float | None) -> str:
    """Format a number to about three significant digits; empty for None and NaN."""
    if value is None or math.isnan(value):
        return ""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3
    return f"{value:.{digits}f}"


def _time(value: float, calls: int) -> str:
    """Format a median, followed by the number of calls behind it if that is small."""
    return significant(value) + (f" ({calls})" if 0 < calls < 5 else "")


def _formatted(value: float, how: str) -> str:
    return "" if math.isnan(value) else format(value, how)


def _percent(share: float | None, of: float | None) -> str:
    """Format a share in percent, followed by `of`; empty if there is no share."""
    return "" if share is None or of is None or math.isnan(of) else f"{100 * share:.0f} %"
