"""Rows of the benchmark of layers with several branches, and what they time."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from tests.bench.conftest import hasty, spoil  # noqa: F401 - fixtures
from widekernel import ops
from widekernel.bench import BenchmarkError, Platform, TimeBudget
from widekernel.bench.branches import PARTS, STEP, BranchesCase, choose_branches, measure_branches
from widekernel.bench.rows import BranchesRow
from widekernel.bench.tables import branches_columns, markdown, write_each
from widekernel.cli.main import main
from widekernel.errors import ArgumentError

TINY = BranchesCase("tiny", (2, 3, 7, 8), ((5, 5, 1), (3, 3, 2), (3, 1, 3)))
DENSE = BranchesCase("dense", (1, 3, 7, 8), ((5, 5, 1), (3, 3, 1)))


def rows_of(case: BranchesCase, platform: Platform) -> list[BranchesRow]:
    return list(measure_branches([case], platform, TimeBudget(), rounds=2))


def test_every_part_and_the_step_are_timed_in_both_layouts(cpu: Platform) -> None:
    with ops.trace() as ran:
        rows = rows_of(TINY, cpu)
    assert [(row.layout, row.part) for row in rows] == [(layout, p) for layout in ("NCHW", "NHWC") for p in (*PARTS, STEP)]
    for row in rows:
        assert row.error < 1e-4
        assert row.backend
        assert row.times_filled == pytest.approx(row.filled_ms / row.ours_ms)
        assert row.times_best == pytest.approx(min(row.torch_nchw_ms, row.torch_nhwc_ms) / row.ours_ms)
    for layout in ("NCHW", "NHWC"):
        *parts, step = (row for row in rows if row.layout == layout)
        for field in ("ours_ms", "filled_ms", "torch_nchw_ms", "torch_nhwc_ms"):
            assert getattr(step, field) == pytest.approx(sum(getattr(row, field) for row in parts))
    # Both the dilated kernels and those with zeros in their gaps ran.
    found = {rect for _, problem in ran.calls for rect in zip(problem.kernels, problem.dilations)}
    assert {((5, 5), 1), ((3, 3), 2), ((3, 1), 3), ((7, 1), 1)} <= found


def test_layers_without_gaps_have_no_column_for_them(cpu: Platform, tmp_path: Path) -> None:
    rows = list(write_each(rows_of(DENSE, cpu), tmp_path / "rows.csv"))
    assert all(math.isnan(row.filled_ms) for row in rows)
    assert "zeros in gaps" not in markdown(rows, branches_columns(rows))
    assert "zeros in gaps" in markdown(rows, branches_columns([rows[0], *rows_of(TINY, cpu)]))
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [row["part"] for row in csv.DictReader(file)] == [row.part for row in rows]


def test_wrong_results_are_not_timed(cpu: Platform, spoil) -> None:  # noqa: F811
    spoil(lambda problem: problem.op == "depthwise_weight_grad" and problem.kernels == ((3, 3),))
    with pytest.raises(BenchmarkError, match=r"weight gradient of .*3x3d2.*differ"):
        rows_of(TINY, cpu)


def test_the_named_layers_are_those_of_the_networks() -> None:
    cases = choose_branches([])
    assert [str(case) for case in cases][1] == "8x160x28x28 13x13 + 5x5 + 7x7d2 + 3x3d3 + 3x3d4 + 3x3d5"
    assert [case.shape for case in cases] == [(8, 80, 56, 56), (8, 160, 28, 28), (8, 320, 14, 14), (8, 640, 7, 7)]
    assert choose_branches(["slak-3"], batch=2)[0].shape == (2, 499, 14, 14)
    with pytest.raises(ArgumentError, match=r"unknown case 'unireplknet-5'.*Did you mean"):
        choose_branches(["unireplknet-5"])


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "page.md"
    options = ["--batch", "1", "--rounds", "1", "--threads", "1", "--markdown", str(path)]
    assert main(["bench", "branches", "unireplknet-4", *options]) == 0
    assert "× zeros in gaps" in path.read_text()
    assert "`widekernel bench branches unireplknet-4 --batch 1" in path.read_text()
    assert "1x640x7x7" in capsys.readouterr().out
