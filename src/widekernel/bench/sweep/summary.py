"""The page of a sweep: how much of the grid was measured, speed-ups by pass and class, and the slowest cells."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from widekernel.bench.cases import PASSES
from widekernel.bench.rows import SweepRow
from widekernel.bench.sweep.grid import case_of, class_of
from widekernel.bench.tables import Column, factor, markdown, operator_columns
from widekernel.ops.torch_conv import NAME as PYTORCH_BACKEND

BEHIND = 0.95
"""Speed-up over PyTorch's best below which a cell is listed."""
FEWEST_LISTED = 20
"""Number of slowest cells that are listed even if they are not behind."""
_CENTRAL = 0.9  # share of the units in the interval that is reported


class Group(NamedTuple):
    """The measured cells of one pass and class, and the speed-ups of those whose PyTorch time is known."""

    direction: str
    name: str
    cells: int
    best: list[float]
    same: list[float]


def is_given(row: SweepRow) -> bool:
    """Return whether our operator leaves the call to PyTorch."""
    return row.backend == PYTORCH_BACKEND


def is_estimated(row: SweepRow) -> bool:
    """Return whether PyTorch's better time is an estimate."""
    times = [(row.torch_nchw_ms, row.torch_nchw_images), (row.torch_nhwc_ms, row.torch_nhwc_images)]
    known = [pair for pair in times if not math.isnan(pair[0])]
    return bool(known) and min(known)[1] < row.batch


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean; NaN if there are no values."""
    return statistics.geometric_mean(values) if values else math.nan


def groups_of(rows: Sequence[SweepRow]) -> list[Group]:
    """Group the cells of each pass: all, by layout, by class of kernel and by class of map."""
    kinds: list[Callable[[SweepRow], str]] = [
        lambda row: "all",
        lambda row: row.layout,
        lambda row: class_of(case_of(row))[0],
        lambda row: class_of(case_of(row))[1],
    ]
    groups = []
    for direction in PASSES:
        chosen = [row for row in rows if row.direction == direction]
        for kind in kinds:
            for name in sorted({kind(row) for row in chosen}, key=_in_order):
                members = [row for row in chosen if kind(row) == name]
                best, same = [row.times_best for row in members], [row.times_same for row in members]
                groups.append(Group(direction, name, len(members), _known(best), _known(same)))
    return groups


def group_columns() -> list[Column]:
    """Return the columns of the table of groups."""

    def share(counts: Callable[[float], bool]) -> Callable[[Group], str]:
        return lambda group: f"{100 * sum(map(counts, group.best)) / len(group.best):.0f} %" if group.best else ""

    return [
        ("pass", lambda group: group.direction),
        ("class", lambda group: group.name),
        ("cells", lambda group: str(group.cells)),
        ("ahead", share(lambda value: value > 1)),
        ("behind by > 5 %", share(lambda value: value < BEHIND)),
        ("× best", lambda group: factor(geometric_mean(group.best))),
        ("× same layout", lambda group: factor(geometric_mean(group.same))),
        ("worst × best", lambda group: factor(min(group.best, default=math.nan))),
    ]


def worst(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Return the cells that are behind, measured as they run by default, and at least `FEWEST_LISTED`; the slowest first."""
    known = sorted((row for row in rows if not math.isnan(row.times_best)), key=lambda row: row.times_best)
    return known[: max(FEWEST_LISTED, sum(row.times_best < BEHIND for row in known))]


def cell_columns(rows: Sequence[SweepRow]) -> list[Column]:
    """Return the columns of the table of cells; a time of PyTorch that is an estimate starts with "~"."""
    shown = {
        "N×C×H×W, kernel": "", "pass": "", "layout": "", "ours, ms": "", "±": "",
        "PyTorch NCHW, ms": "torch_nchw_images", "PyTorch NHWC, ms": "torch_nhwc_images",
        "× best": "", "of limit": "", "algorithm": "",
    }  # fmt: skip
    columns = [(name, _marked(cell, shown[name])) for name, cell in operator_columns(rows) if name in shown]
    place = next(number for number, (name, _) in enumerate(columns) if name == "× best") + 1
    columns.insert(place, ("× same layout", lambda row: factor(row.times_same)))
    columns.insert(place + 1, ("runs on", lambda row: "PyTorch, by default" if is_given(row) else row.backend))
    return columns


def coverage(rows: Sequence[SweepRow], cells: int, left_out: Sequence[str]) -> Iterator[str]:
    """Yield lines about what was measured, of a grid of `cells` cells, and what was not."""
    share = 100 * len(rows) / cells if cells else 0.0
    yield f"{len(rows)} of the {cells} cells of the grid were measured ({share:.1f} %)."
    known = _known([row.times_best for row in rows])
    yield (
        f"Cells with a time of PyTorch: {len(known)}; ahead of its best: {sum(value > 1 for value in known)}; behind by "
        f"more than 5 %: {sum(value < BEHIND for value in known)}; with an estimate as PyTorch's best: "
        f"{sum(map(is_estimated, rows))}."
    )
    given = [row for row in rows if is_given(row) and not math.isnan(row.times_best)]
    if given:
        best, same = [row.times_best for row in given], _known([row.times_same for row in given])
        yield (
            f"Given to PyTorch by default: {len(given)} cells; behind by more than 5 %: {sum(x < BEHIND for x in best)} "
            f"(× {factor(geometric_mean(best))} of PyTorch's best in the mean, × {factor(geometric_mean(same))} of its "
            "speed in the same layout)."
        )
    twins = sorted(_known(list({(row.shape, row.direction): row.twin_ratio for row in rows}.values())))
    if twins:
        low, high = (twins[round(share * (len(twins) - 1))] for share in ((1 - _CENTRAL) / 2, (1 + _CENTRAL) / 2))
        yield (
            f"Errors of measurement: in each of {len(twins)} units, the fastest implementation was timed under two names. "
            f"The ratio of the two medians is {statistics.median(twins):.3f} in the median unit, between {low:.2f} and "
            f"{high:.2f} in {100 * _CENTRAL:.0f} % of them, and between {twins[0]:.2f} and {twins[-1]:.2f} in all."
        )
    reasons: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        if row.remark:
            partly = "" if math.isnan(row.times_best) else ", compared with the other layout only"
            reasons[f"{row.remark}{partly}"][f"{row.direction} of {row.shape}"] = None
    yield from (f"{why}: {', '.join(units)}." for why, units in sorted(reasons.items()))
    yield from left_out


def page_parts(rows: Sequence[SweepRow]) -> str:
    """Return the two tables in Markdown."""
    parts = [markdown(groups_of(rows), group_columns())]
    if any(not math.isnan(row.times_best) for row in rows):
        chosen = worst(rows)
        title = f"## Slowest cells: all behind by more than 5 %, at least {FEWEST_LISTED}"
        parts += [title, markdown(chosen, cell_columns(chosen))]
    return "\n\n".join(parts)


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _in_order(name: str) -> tuple[str, int]:
    kind, _, size = name.rpartition(" to ")
    return (kind, int(size)) if kind else (name, 0)


def _marked(cell: Callable[[SweepRow], str], images: str) -> Callable[[SweepRow], str]:
    """Mark the times of a column as estimates where the field `images` is below the batch."""
    if not images:
        return cell

    def marked(row: SweepRow) -> str:
        text = cell(row)
        return f"~{text}" if text and getattr(row, images) < row.batch else text

    return marked
