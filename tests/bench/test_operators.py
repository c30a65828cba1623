"""Rows of the benchmark of operators, the files made of them, and inference engines."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from widekernel import ops
from widekernel.bench import (
    PASSES,
    BenchmarkError,
    Case,
    OperatorPlan,
    Platform,
    TimeBudget,
    engines,
    measure_operators,
)
from widekernel.bench.machine import copy_bandwidth, fma_peak, measure_machine, using_threads
from widekernel.bench.notes import OPERATOR_NOTES
from widekernel.bench.plots import draw
from widekernel.bench.rows import NetworkRow, OperatorRow
from widekernel.bench.tables import csv_columns, document, markdown, operator_columns, write_each
from widekernel.errors import ArgumentError

TINY = Case("tiny", 2, 5, 9, 11, (13, 3))


def rows_of(case: Case, platform: Platform, **settings) -> list[OperatorRow]:
    return list(measure_operators(OperatorPlan([case], rounds=2, **settings), platform, TimeBudget()))


def test_every_pass_is_timed_in_both_layouts(cpu: Platform) -> None:
    rows = rows_of(TINY, cpu)
    assert [(row.direction, row.layout) for row in rows] == [(p, layout) for p in PASSES for layout in ("NCHW", "NHWC")]
    for row in rows:
        assert (row.case, row.kernel_height, row.kernel_width) == ("tiny", 13, 3)
        assert row.ours_calls == row.torch_nchw_calls == row.torch_nhwc_calls == 2
        assert row.error < 1e-5
        assert row.times_default == pytest.approx(row.torch_nchw_ms / row.ours_ms)
        assert row.times_best == pytest.approx(min(row.torch_nchw_ms, row.torch_nhwc_ms) / row.ours_ms)
        assert row.gflops == pytest.approx(2e-6 * TINY.macs / row.ours_ms)
        assert row.peak_share == pytest.approx(row.gflops / 100)
        limit = max(2 * TINY.macs / 100, TINY.bytes_moved / row.copy_gbs) * 1e-6
        assert row.limit_ms == pytest.approx(limit) and row.limit_share == pytest.approx(limit / row.ours_ms)


def test_dilated_cases_are_timed(cpu: Platform) -> None:
    with ops.trace() as ran:
        rows = rows_of(dataclasses.replace(TINY, kernel=(5, 3), dilation=2), cpu)
    assert {problem.dilations for _, problem in ran.calls} == {(2,)}
    assert [row.direction for row in rows] == [p for p in PASSES for _ in range(2)]
    assert all(row.error < 1e-5 and row.shape == "2x5x9x11 5x3d2" for row in rows)


def test_row_names_the_backend_that_ran(cpu: Platform) -> None:
    with ops.trace() as ran:
        rows = rows_of(TINY, cpu, backend="reference")
    assert {row.backend for row in rows} == set(ran.backends()) == {"reference"}
    x, kernel = torch.randn(TINY.shape), torch.randn(5, 1, 13, 3)
    chosen = [explanation.backend for explanation in ops.explain(x, [kernel])]
    assert [row.backend for row in rows_of(TINY, cpu) if row.layout == "NCHW"] == chosen


def test_only_requested_passes_are_timed(cpu: Platform) -> None:
    with ops.trace() as ran:
        rows = rows_of(TINY, cpu, passes=["weight gradient"])
    assert {row.direction for row in rows} == {"weight gradient"}
    assert {problem.op for _, problem in ran.calls} == {"depthwise_weight_grad"}


def test_requested_algorithm_is_used(cpu: Platform) -> None:
    with ops.trace() as ran:
        rows_of(TINY, cpu, algorithm="direct")
    assert {problem.algorithm for _, problem in ran.calls} == {"direct"}


@pytest.mark.parametrize("direction", PASSES)
def test_a_wrong_case_has_no_times(direction: str, cpu: Platform, spoil) -> None:
    spoil(lambda problem: problem.shape == TINY.shape)
    with pytest.raises(BenchmarkError, match=f"{direction} of 2x5x9x11 13x3: ours NCHW and PyTorch NHWC differ"):
        rows_of(TINY, cpu, passes=[direction])


def test_engines_are_timed_in_the_forward_pass_only(cpu: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "missing", lambda engine: [] if engine == "openvino" else [engine])
    monkeypatch.setattr(engines, "forward_in", lambda _, x, k: lambda: F.conv2d(x, k, padding=(6, 1), groups=5))
    rows = rows_of(TINY, cpu)
    timed = {row.direction for row in rows if row.openvino_ms is not None}
    assert timed == {"forward"} and all(row.onnxruntime_ms is None for row in rows)
    assert "openvino, ms" in markdown(rows, operator_columns(rows)) and "onnxruntime" not in markdown(
        rows, operator_columns(rows)
    )
    monkeypatch.setattr(engines, "forward_in", lambda _, x, k: lambda: torch.zeros_like(x))
    with pytest.raises(BenchmarkError, match="openvino and PyTorch NHWC differ"):
        rows_of(TINY, cpu, passes=["forward"])


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_engines_compute_the_convolution(engine: str) -> None:
    if engines.missing(engine):
        pytest.skip(f"{engine} is not installed")
    x, kernel = torch.randn(2, 5, 9, 11).contiguous(memory_format=torch.channels_last), torch.randn(5, 1, 13, 3)
    got = engines.forward_in(engine, x, kernel)()
    torch.testing.assert_close(got, F.conv2d(x, kernel, padding=(6, 1), groups=5), atol=1e-5, rtol=1e-5)


def test_csv_has_a_column_for_every_field(cpu: Platform, tmp_path: Path) -> None:
    rows = rows_of(TINY, cpu)
    assert list(write_each(rows, tmp_path / "times.csv")) == rows
    with (tmp_path / "times.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == [field.name for field in dataclasses.fields(OperatorRow)]
    assert [row["direction"] for row in read] == [row.direction for row in rows]
    assert float(read[3]["ours_ms"]) == pytest.approx(rows[3].ours_ms, rel=1e-5)
    assert read[0]["shape"] == "2x5x9x11 13x3"
    assert read[-1]["openvino_ms"] == ""


@pytest.mark.parametrize(("kind", "table"), [(OperatorRow, "bench_ops_cpu"), (NetworkRow, "bench_models_cpu")])
def test_csv_columns_equal_those_of_the_published_tables(kind: type, table: str) -> None:
    published = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / f"{table}.csv"
    with published.open(newline="") as file:
        assert list(csv_columns(kind)) == csv.DictReader(file).fieldnames


def test_page_describes_the_machine_and_marks_few_calls(cpu: Platform) -> None:
    rows = [dataclasses.replace(row, torch_nchw_ms=1234.5, torch_nchw_calls=1) for row in rows_of(TINY, cpu)]
    page = document("Title", cpu.facts, markdown(rows, operator_columns(rows)), OPERATOR_NOTES, "widekernel bench ops")
    assert "CPU: A processor, 2 cores, 1 threads used" in page and "100 GFLOP/s (made up)" in page
    assert "1234 (1)" in page
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and len({line.count("|") for line in table}) == 1


def test_plot(cpu: Platform) -> None:
    small = rows_of(TINY, cpu) + rows_of(Case("large", 2, 5, 9, 11, (17, 3)), cpu)
    for rows in (small, small[:1]):
        assert draw(rows, cpu).startswith(b"\x89PNG")


def test_measured_machine(hasty: None) -> None:
    with using_threads(1):
        found = measure_machine()
        assert found.threads == torch.get_num_threads() == 1
    assert found.peak > 0 and found.bandwidth > 0 and found.cpu and found.cores > 0
    assert {"Python", "PyTorch", "widekernel", "timm", "onnxruntime", "openvino", "zentorch"} == set(found.versions)
    assert not any("/" in line.replace("GB/s", "").replace("GFLOP/s", "") for line in found.lines()), "no folders"


def test_peak_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from widekernel.ops.cpu import library

    monkeypatch.setattr(library, "load", lambda: library.Library("switched off"))
    peak, source = fma_peak(1)
    assert peak > 0 and "matrix product" in source
    assert copy_bandwidth(1024, 0.001) > 0


def test_number_of_threads_is_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ArgumentError, match="threads is 0"), using_threads(0):
        pass
    with using_threads(None):
        assert torch.get_num_threads() == before
    with pytest.raises(KeyError), using_threads(1):
        raise KeyError
    assert torch.get_num_threads() == before
