"""Benchmarks in bfloat16 and int8 on the CPU: rows of networks and products, deviations, and what is refused."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from widekernel import ops
from widekernel.bench import BenchmarkError, NetworkPlan, Platform, TimeBudget, lower_precision, products, rivals, variants
from widekernel.bench.lower_precision import measure_lower_networks, precision_columns
from widekernel.bench.precision import BFLOAT16, FLOAT32, INT8, Precision
from widekernel.bench.products import ProductCase, measure_products
from widekernel.bench.rows import PrecisionNetworkRow
from widekernel.cli.main import main
from widekernel.errors import ArgumentError
from widekernel.ops.cpu.pointwise import reason_against

LACKING = reason_against("bfloat16")
pytestmark = pytest.mark.usefixtures("untimed")
needs_products = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))


def measured(
    model: nn.Module, cpu: Platform, budget: TimeBudget | None = None, precision: Precision = BFLOAT16, **settings
) -> list[PrecisionNetworkRow]:
    plan = NetworkPlan({"it": lambda: (model, 64)}, [2], rounds=1, **settings)
    return list(measure_lower_networks(plan, cpu, budget or TimeBudget(), precision=precision))


@needs_products
def test_rows_of_a_network(cpu: Platform) -> None:
    with ops.trace() as ran:
        rows = measured(timm.create_model("slak_nano", num_classes=5), cpu)
    assert {call.precision for call in ran.fused} == {"float32", "bfloat16"}
    exact = ["PyTorch", "ours, accelerated", "ours, fused"]
    lower = ["ours, fused, bfloat16", "PyTorch, bfloat16 by autocast", "PyTorch, bfloat16"]
    wanted = [(kind, layout) for kinds in (exact, lower) for layout in ("NCHW", "NHWC") for kind in kinds]
    assert [(row.variant, row.layout) for row in rows] == wanted
    for row in rows:
        assert row.ms > 0 and row.images == 8 and row.mode == "infer"
        assert row.precision == ("bfloat16" if "bfloat16" in row.variant else "float32")
        assert row.error < (0.1 if row.precision == "bfloat16" else 1e-5)
        assert row.error > 1e-5 or row.precision == "float32"
        assert row.cosine > 0.99 and 0 <= row.same_class <= 8
    cells = {header: cell(rows[-1]) for header, cell in precision_columns(rows)}
    assert cells["same class"] == f"{rows[-1].same_class} of 8"


@needs_products
def test_results_that_are_far_off_are_noticed(cpu: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    class Louder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1.2 * x

    accelerate = lower_precision.accelerate

    def corrupted(network: nn.Module, x: Tensor, precision: str) -> tuple[nn.Module, object]:
        network, report = accelerate(network, x, precision=precision)
        return nn.Sequential(network, Louder()), report

    monkeypatch.setattr(lower_precision, "accelerate", corrupted)
    with pytest.raises(BenchmarkError, match=r"ours, fused, bfloat16 NCHW differs from PyTorch NHWC in float32 by 0\.2"):
        measured(timm.create_model("slak_nano"), cpu)


@needs_products
def test_rivals_that_are_wrong_or_fail_are_left_out_and_named(cpu: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is wrong in float32, one cannot convert the network to bfloat16, and one returns NaN in bfloat16 and NHWC."""
    asked = []

    def network_in(rival: str, network: nn.Module, images: Tensor, precision: str):
        asked.append((rival, precision))
        if (rival, precision) == (rivals.OPENVINO, "bfloat16"):
            raise NotImplementedError("no such hint")
        wrong = rival == rivals.ZENTORCH
        spoiled = precision == "bfloat16" and images.is_contiguous(memory_format=torch.channels_last)
        return lambda x: network(x) * (1.01 if wrong else math.nan if spoiled else 1.0)

    monkeypatch.setattr(variants, "network_in", network_in)
    budget = TimeBudget()
    wanted = [rivals.OPENVINO, rivals.COMPILED, rivals.ZENTORCH]
    rows = measured(timm.create_model("slak_nano", num_classes=5), cpu, budget, rivals=wanted)
    others = [f"{row.variant} {row.layout}" for row in rows if row.variant.startswith((*rivals.RIVALS,))]
    left = ["OpenVINO NCHW", "torch.compile NCHW", "torch.compile NHWC", "torch.compile, bfloat16 NCHW"]
    assert sorted(others) == left
    assert (rivals.ZENTORCH, "bfloat16") not in asked and all(row.ms > 0 for row in rows)
    in_float32, in_nhwc, converted = (
        [line for line in budget.lines() if line.startswith(f"{name} is left out for it, 2 images: ")]
        for name in ("zentorch NHWC", "torch.compile, bfloat16 NHWC", "OpenVINO, bfloat16 NCHW")
    )
    assert "differ" in in_float32[0] and "by nan of the largest" in in_nhwc[0] and "no such hint" in converted[0]
    budget.finish()


@needs_products
def test_a_network_without_blocks(cpu: Platform) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(BenchmarkError, match="no block of the network is fused in bfloat16: it has none"):
        measured(model, cpu)


@needs_products
def test_rows_of_products() -> None:
    cases = [ProductCase("Any", 2, 5, 12, 7, 4), ProductCase("Any", 1, 6, 8, 0, 3, "relu")]
    rows = list(measure_products(cases, 100.0, rounds=1, precision=BFLOAT16))
    for row in rows:
        assert row.precision == "bfloat16" and row.onnxruntime_ms is None
        assert 1e-5 < row.error < products.TOLERANCES[BFLOAT16]


@needs_products
@pytest.mark.usefixtures("hasty")
def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(products, "PRODUCT_CASES", (ProductCase("SLaK", 1, 3, 4, 3, 2),))
    options = ["--dtypes", "bfloat16", "--rounds", "1", "--threads", "1", "--csv", str(tmp_path / "t.csv")]
    assert main(["bench", "pointwise", "--families", "slak", *options]) == 0
    assert "Pointwise products in bfloat16" in capsys.readouterr().out
    assert main(["bench", "models", "slak_nano", "--modes", "infer", "--size", "64", "--batch", "2", *options]) == 0
    assert "same class" in capsys.readouterr().out
    with (tmp_path / "t.csv").open(newline="") as file:
        assert {row["precision"] for row in csv.DictReader(file)} == {"float32", "bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "slak_nano"], "modes is 'train,infer', but must be infer with --dtypes bfloat16 on the CPU"),
        (["models", "slak_nano", "--modes", "infer", "--compile"], "compile is True, but must be left out"),
        (["ops"], "dtypes is 'bfloat16', but must be float32 on the CPU"),
        (["ops", "--dtypes", "int8"], "dtypes has 'int8'"),
        (["pointwise", "--dtypes", "int8"], "dtypes has 'int8'"),
        (["models", "slak_nano", "--dtypes", "int8"], "must be infer with --dtypes int8 on the CPU"),
        (["models", "slak_nano", "--dtypes", "int8,float32"], "must be float32, bfloat16 or int8 on the CPU"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", *arguments, *([] if "--dtypes" in arguments else ["--dtypes", "bfloat16"])]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_machines_without_it(cpu: Platform) -> None:
    assert cpu.peak(FLOAT32) == 100
    with pytest.raises(ArgumentError, match="no such products: time float32"):
        cpu.peak(BFLOAT16)
    if LACKING is not None:
        with pytest.raises(ArgumentError, match="use 'float32'"):
            measured(timm.create_model("slak_nano"), cpu)


@pytest.mark.slow
@pytest.mark.skipif(reason_against("int8") is not None, reason=str(reason_against("int8")))
def test_int8(cpu: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rivals, OpenVINO alone is asked for int8; blocks that are not suitable remain in float32."""
    asked = []

    def network_in(rival: str, network: nn.Module, images: Tensor, precision: str):
        asked.append((rival, precision))
        return network

    monkeypatch.setattr(variants, "network_in", network_in)
    model, wanted = timm.create_model("slak_nano", num_classes=5), [rivals.OPENVINO, rivals.ZENTORCH]
    with ops.trace() as ran:
        rows = measured(model, cpu, precision=INT8, rivals=wanted)
    assert "int8" in {call.precision for call in ran.fused} <= {"float32", "int8"}
    lower = [(row.variant, row.layout) for row in rows if row.precision == "int8"]
    assert lower == [("ours, fused, int8", "NCHW"), ("ours, fused, int8", "NHWC"), ("OpenVINO, int8", "NCHW")]
    assert all(1e-3 < row.error < 0.1 for row in rows if row.variant == "ours, fused, int8")
    assert [rival for rival, precision in asked if precision == "int8"] == [rivals.OPENVINO]


def test_openvino_in_int8_needs_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda package: None if package == "nncf" else object())
    assert rivals.reason_against(rivals.OPENVINO) == ""
    assert rivals.reason_against(rivals.OPENVINO, "int8") == "not installed (nncf)"
    assert rivals.reason_against(rivals.ONNXRUNTIME, "int8") == ""
