"""Timing of pointwise products: rows, the cases of the published networks, wrong results, the command."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from widekernel.bench import products
from widekernel.bench.engines import missing
from widekernel.bench.errors import BenchmarkError
from widekernel.bench.products import PRODUCT_CASES, ProductCase, measure_products
from widekernel.cli.main import main
from widekernel.ops.cpu import library

pytestmark = pytest.mark.skipif(library.load().reason is not None, reason=str(library.load().reason))

PAIR, SINGLE = ProductCase("Any", 2, 5, 12, 7, 4), ProductCase("Any", 1, 6, 8, 0, 3, "relu")


def test_rows() -> None:
    steps = []
    pair, single = measure_products([PAIR, SINGLE], 100.0, rounds=1, advance=lambda what, done: steps.append((what, done)))
    assert pair.case == "5→12→7, 2x4²"
    assert single.case == "6→8, 1x3²"
    assert steps == [("5→12→7, 2x4²", 0), ("", 1), ("6→8, 1x3²", 0), ("", 1)]
    for row, case in ((pair, PAIR), (single, SINGLE)):
        times = [row.linear_ms, row.convolution_ms, *([] if row.onnxruntime_ms is None else [row.onnxruntime_ms])]
        assert (row.onnxruntime_ms is None) == bool(missing("onnxruntime"))
        assert row.times_best == pytest.approx(min(times) / row.nhwc_ms)
        assert row.gflops == pytest.approx(case.operations / row.nhwc_ms / 1e6)
        assert row.peak_share == pytest.approx(row.gflops / 100)
        assert row.error < 1e-5
    assert PAIR.operations == 2 * 2 * 16 * 12 * (5 + 7)
    assert SINGLE.operations == 2 * 9 * 6 * 8


def test_the_cases_have_the_pixels_of_their_stages() -> None:
    assert len(set(PRODUCT_CASES)) == len(PRODUCT_CASES)
    assert {(case.inputs, case.size) for case in PRODUCT_CASES if case.family == "SLaK"} == {
        (124, 56),
        (249, 28),
        (499, 14),
        (998, 7),
    }
    assert all(case.outputs in (0, case.inputs) for case in PRODUCT_CASES)


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(products.PackedBlock):
        def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            return super().__call__(x, residual) * 1.01

    monkeypatch.setattr(products, "PackedBlock", Wrong)
    with pytest.raises(BenchmarkError, match=r"5→12→7, 2x4²: NCHW and linear differ by 0\.01"):
        next(measure_products([PAIR], 100.0, rounds=1))


@pytest.mark.usefixtures("hasty")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    table, page = tmp_path / "p.csv", tmp_path / "p.md"
    monkeypatch.setattr(
        products, "PRODUCT_CASES", tuple(ProductCase(family, 1, 3, 4, 3, 2) for family in ("ConvNeXt", "SLaK", "RepLKNet"))
    )
    options = ["--families", "slak,replknet", "--rounds", "1", "--threads", "1"]
    assert main(["bench", "pointwise", *options, "--csv", str(table), "--markdown", str(page)]) == 0
    assert "FMA peak" in capsys.readouterr().out
    with table.open(newline="") as file:
        assert [row["family"] for row in csv.DictReader(file)] == ["SLaK", "RepLKNet"]
    assert "`widekernel bench pointwise --families slak,replknet --rounds 1 --threads 1`" in page.read_text()
    assert main(["bench", "pointwise", "--families", "slack"]) == 2
    assert "slak" in capsys.readouterr().err
