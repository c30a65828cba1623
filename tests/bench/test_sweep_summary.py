"""Tables and picture of a sweep, from made-up rows."""

from __future__ import annotations

import itertools
import math

import pytest

from tests.bench.sweep_rows import row_of, unit_rows
from widekernel.bench import PASSES, Case
from widekernel.bench.cases import FORWARD, INPUT_GRAD
from widekernel.bench.sweep import draw_heat_map, page_parts, summary

LARGE, STRIP = Case("some", 8, 64, 56, 56, (31, 31)), Case("some", 1, 16, 14, 14, (5, 13))


def groups(rows) -> dict[tuple[str, str], dict[str, str]]:
    columns = summary.group_columns()
    return {
        (group.direction, group.name): {name: cell(group) for name, cell in columns} for group in summary.groups_of(rows)
    }


def test_speed_ups_by_pass_and_class() -> None:
    rows = unit_rows(LARGE, FORWARD) + unit_rows(STRIP, FORWARD, ours=4.0) + unit_rows(STRIP, INPUT_GRAD)
    found = groups(rows)
    everything = found[FORWARD, "all"]
    assert (everything["cells"], everything["ahead"], everything["behind by > 5 %"]) == ("4", "50 %", "50 %")
    # 2, 2, 0.5 and 0.5; in the same layout 4, 2, 1 and 0.5
    assert (everything["× best"], everything["× same layout"], everything["worst × best"]) == ("1.00", "1.41", "0.50")
    assert found[FORWARD, "wide strips to 21"]["× best"] == "0.50"
    assert found[FORWARD, "squares to 61"]["× best"] == found[FORWARD, "maps to 56"]["× best"] == "2.00"
    assert found[FORWARD, "NHWC"]["cells"] == "2" and found[INPUT_GRAD, "all"]["cells"] == "2"
    assert (PASSES[2], "all") not in found


def test_calls_given_to_pytorch_count_as_measured_and_are_named() -> None:
    rows = unit_rows(LARGE, FORWARD, ours=4.0, backend="portable") + unit_rows(STRIP, FORWARD)
    found = groups(rows)[FORWARD, "squares to 61"]
    assert (found["ahead"], found["behind by > 5 %"], found["× best"], found["worst × best"]) == (
        "0 %",
        "100 %",
        "0.50",
        "0.50",
    )
    lines = page_parts(rows).splitlines()
    first = next(line for line in lines if line.startswith("| 8x64x56x56 31x31 | forward |"))
    assert "| PyTorch, by default |" in first and "| 0.50 |" in first
    told = list(summary.coverage(rows, 10, []))
    assert told[2].startswith("Given to PyTorch by default: 2 cells; behind by more than 5 %: 2 (× 0.50 of PyTorch's best")


def test_every_cell_that_is_behind_is_listed_and_the_slowest_comes_first() -> None:
    behind = [row_of(LARGE, FORWARD, ours=2.2 + 0.1 * number) for number in range(30)]
    rows = [
        row_of(STRIP, FORWARD),
        *behind,
        row_of(STRIP, FORWARD, ours=2.05),
        row_of(STRIP, FORWARD, nchw=math.nan, nhwc=math.nan),
    ]
    listed = summary.worst(rows)
    assert [row.times_best for row in listed] == sorted(row.times_best for row in behind)
    assert len(summary.worst(rows[:3])) == 3, "a few are listed even if they are not behind"


def test_estimates_are_marked() -> None:
    estimated = row_of(LARGE, FORWARD, torch_nchw_images=2, torch_nchw_calls=1)
    best = row_of(LARGE, FORWARD, layout="NHWC", torch_nhwc_images=1)
    assert not summary.is_estimated(estimated) and summary.is_estimated(best)
    cells = dict(summary.cell_columns([estimated]))
    assert cells["PyTorch NCHW, ms"](estimated) == "~4.00 (1)" and cells["PyTorch NHWC, ms"](estimated) == "2.00"
    assert cells["PyTorch NHWC, ms"](best) == "~2.00"
    assert any("estimate as PyTorch's best: 1" in line for line in summary.coverage([estimated, best], 10, []))


def test_errors_of_measurement_are_told_once_for_each_unit() -> None:
    ratios = [0.9, 1.01, 1.0, 1.02, 0.99]
    cases = [Case("some", 1 + number, 16, 14, 14, (5, 13)) for number in range(len(ratios))]
    rows = [row for case, ratio in zip(cases, ratios) for row in unit_rows(case, FORWARD, twin_ratio=ratio)]
    told = "\n".join(summary.coverage(rows + unit_rows(LARGE, FORWARD, twin_ratio=math.nan), 100, []))
    assert "in each of 5 units" in told and "1.000 in the median unit" in told
    assert "between 0.90 and 1.02 in all" in told
    assert "Errors of measurement" not in "\n".join(summary.coverage([], 100, []))


def test_what_was_not_compared_is_listed() -> None:
    rows = unit_rows(LARGE, FORWARD, nchw=math.nan, nhwc=math.nan, remark="too slow")
    rows += unit_rows(STRIP, FORWARD, nchw=math.nan, nhwc=2.0, remark="one too slow", times_best=2.0)
    told = list(summary.coverage(rows, 400, ["3 cases are left out"]))
    assert told[0] == "4 of the 400 cells of the grid were measured (1.0 %)."
    assert "one too slow, compared with the other layout only: forward of 1x16x14x14 5x13." in told
    assert "too slow: forward of 8x64x56x56 31x31." in told and told[-1] == "3 cases are left out"
    found = groups(rows)[FORWARD, "squares to 61"]
    assert found["cells"] == "2" and found["ahead"] == found["× best"] == found["worst × best"] == ""
    assert "## Slowest" not in page_parts(rows[:2])


@pytest.mark.parametrize("measured", [0, 3])
def test_heat_map(measured: int) -> None:
    rows = [unit_rows(LARGE, FORWARD), unit_rows(STRIP, FORWARD, ours=9.0), unit_rows(STRIP, INPUT_GRAD, nhwc=math.nan)]
    picture = draw_heat_map(
        list(itertools.chain(*rows[:measured])), [LARGE, STRIP, Case("some", 1, 1, 7, 9, (3, 3))], "A processor"
    )
    assert picture.startswith(b"\x89PNG")
