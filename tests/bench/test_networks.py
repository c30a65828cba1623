"""Benchmarks of networks on the CPU: rows, and errors."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import nn

import widekernel
from widekernel import ops
from widekernel.bench import BenchmarkError, NetworkPlan, Platform, TimeBudget, measure_networks, rivals, variants
from widekernel.bench.depthwise_share import depthwise_share
from widekernel.bench.rows import NetworkRow
from widekernel.bench.tables import network_columns
from widekernel.ops.cpu import library as native
from widekernel.transforms import AccelerationReport

pytestmark = pytest.mark.usefixtures("untimed")


def measured(name: str, model: nn.Module, cpu: Platform, *, batch: int = 2, size: int, **settings) -> list[NetworkRow]:
    plan = NetworkPlan({name: lambda: (model, size)}, [batch], rounds=1, **settings)
    return list(measure_networks(plan, cpu, TimeBudget()))


def test_rows_of_our_network(cpu: Platform) -> None:
    model = timm.create_model("slak_nano")
    before = copy.deepcopy(model.state_dict())
    rows = measured("slak_nano", model, cpu, size=64)
    train = ["PyTorch", "ours", "ours, accelerated"]
    infer = ["PyTorch", "ours", "PyTorch, folded", "ours, folded", "ours, accelerated"]
    infer += ["ours, fused"] if native.load().reason is None else []
    wanted = [(m, r, layout) for m, rs in (("train", train), ("infer", infer)) for layout in ("NCHW", "NHWC") for r in rs]
    assert [(row.mode, row.variant, row.layout) for row in rows] == wanted
    for row in rows:
        (base,) = [r.ms for r in rows if (r.mode, r.variant, r.layout) == (row.mode, "PyTorch", "NHWC")]
        assert row.calls == 1 and row.times_nhwc == pytest.approx(base / row.ms)
        assert row.images_per_second == pytest.approx(2000 / row.ms)
        assert row.depthwise_share is None if row.variant == "ours, fused" else 0 < row.depthwise_share < 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_timm_network_is_compared_with_its_accelerated_form(cpu: Platform) -> None:
    with ops.trace() as ran:
        rows = measured("convnext", _convnext(), cpu, size=32, modes=["train"])
    assert [row.variant for row in rows] == ["PyTorch", "ours, accelerated"] * 2
    assert {problem.op for _, problem in ran.calls} == {"depthwise_sum", "depthwise_weight_grad"}


@pytest.mark.slow
@pytest.mark.parametrize("rival", rivals.RIVALS)
def test_rivals(rival: str, cpu: Platform) -> None:
    if rivals.reason_against(rival):
        pytest.skip(f"{rival}: {rivals.reason_against(rival)}")
    rows = measured("slak_nano", timm.create_model("slak_nano"), cpu, size=64, modes=["infer"], rivals=[rival])
    chosen = [row for row in rows if row.variant == rival]
    assert [row.layout for row in chosen] == list(rivals.layouts_of(rival))
    assert all(row.ms > 0 and row.depthwise_share is None for row in chosen)


def test_speed_up_over_the_best_rival() -> None:
    def row(variant: str, ms: float, batch: int = 1, layout: str = "NCHW") -> NetworkRow:
        return NetworkRow("m", "infer", batch, 32, variant, layout, False, ms, 0.0, 5, 1.0, 1.0, 1.0, None)

    rows = [row("PyTorch", 9.0), row("ours, fused", 2.0), row("OpenVINO", 8.0), row("torch.compile", 3.0, layout="NHWC")]
    rows += [row("ours, folded", 2.0, batch=8), row("PyTorch", math.nan, batch=8)]
    cells = dict(network_columns(rows))
    assert [cells["× best rival"](row) for row in rows] == ["", "1.50", "", "", "", ""]
    assert [cells["images"](row) for row in rows] == ["1"] * 4 + ["8"] * 2
    assert "× best rival" not in dict(network_columns(rows[:2])) and "images" not in dict(network_columns(rows[:2]))


def test_a_rival_that_cannot_be_loaded_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str):
        raise OSError("undefined symbol: made for another PyTorch")

    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(rivals.importlib, "import_module", broken)
    assert "made for another PyTorch" in rivals.reason_against(rivals.ZENTORCH)
    monkeypatch.setattr(rivals.shutil, "which", lambda name: None)
    assert "C++ compiler" in rivals.reason_against(rivals.COMPILED)
    assert rivals.reason_against(rivals.ONNXRUNTIME) == ""
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    assert rivals.reason_against(rivals.OPENVINO) == "not installed (openvino)"


def test_rivals_that_are_wrong_or_fail_are_left_out_and_named(cpu: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    def network_in(rival: str, network: nn.Module, images: torch.Tensor, precision: str):
        if rival == rivals.ONNXRUNTIME:
            raise NotImplementedError("no such operator")
        return lambda x: (1.01 if rival == rivals.OPENVINO else 1.0) * network(x)

    monkeypatch.setattr(variants, "network_in", network_in)
    wanted = [rivals.OPENVINO, rivals.ONNXRUNTIME, rivals.COMPILED]
    plan = NetworkPlan({"some": lambda: (_convnext(), 32)}, [2], modes=["infer"], rounds=1, rivals=wanted)
    budget = TimeBudget()
    rows = list(measure_networks(plan, cpu, budget))
    assert {row.variant for row in rows if row.variant in rivals.RIVALS} == {rivals.COMPILED}
    wrong, failed = sorted(budget.lines(), reverse=True)
    assert "onnxruntime NCHW is left out for some, 2 images" in wrong and "no such operator" in wrong
    assert "OpenVINO NCHW is left out for some, 2 images" in failed and "differ" in failed
    budget.finish()  # other programs' errors are not ours


@pytest.mark.slow
def test_compiled_variants(cpu: Platform) -> None:
    rows = measured("convnext", _convnext(), cpu, size=32, modes=["infer"], compiled=True)
    assert [(row.variant, row.compiled) for row in rows[:2]] == [("PyTorch", False), ("PyTorch", True)]
    assert len(rows) == (10 if native.load().reason is None else 8) and all(
        (row.depthwise_share is None) == row.compiled for row in rows
    )


@pytest.mark.parametrize(
    ("mode", "op", "what"),
    [
        ("infer", "depthwise_sum", r"the layer stages\..* of it: ours N... and PyTorch differ"),
        pytest.param(
            "train", "depthwise_sum", r"the layer stages\..* of it: ours N... and PyTorch differ", marks=pytest.mark.slow
        ),
        ("train", "depthwise_weight_grad", "the gradients of it: ours N... and PyTorch NHWC differ"),
    ],
)
def test_a_wrong_operator_is_found(mode: str, op: str, what: str, spoil, cpu: Platform) -> None:
    spoil(lambda problem: problem.op == op)
    with pytest.raises(BenchmarkError, match=what):
        measured("it", _nano(), cpu, size=64, modes=[mode])


class Louder(nn.Module):
    """Changes outputs and gradients by a tenth."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.1 * x


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_a_wrong_transformation_is_found(mode: str, monkeypatch: pytest.MonkeyPatch, cpu: Platform) -> None:
    def corrupted(network: nn.Module, example: torch.Tensor, blocks: bool = True) -> tuple[nn.Module, AccelerationReport]:
        return nn.Sequential(network, Louder()), AccelerationReport((), False, 1)

    monkeypatch.setattr(variants, "accelerate", corrupted)
    what = "output" if mode == "infer" else "gradients"
    with pytest.raises(BenchmarkError, match=f"the {what} of it: ours, accelerated N... and PyTorch NHWC differ"):
        measured("it", _nano(), cpu, size=64, modes=[mode])


def test_sizes_that_do_not_fit(cpu: Platform) -> None:
    with pytest.raises(BenchmarkError, match=r"it does not run on images of \(3, 1, 1\)"):
        measured("it", _nano(), cpu, size=1)
    with pytest.raises(BenchmarkError, match="only classifiers"):
        measured("it", nn.Conv2d(3, 3, 1), cpu, size=8)


def test_depthwise_share() -> None:
    x = torch.randn(2, 8, 16, 16)
    pointwise, depthwise = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 7, padding=3, groups=8)
    one = nn.Conv2d(1, 8, 3)
    assert depthwise_share(lambda: pointwise(x)) == 0
    assert depthwise_share(lambda: one(x[:, :1])) == 0
    for call in (
        lambda: depthwise(x),
        lambda: torch.inference_mode()(depthwise)(x),
        lambda: widekernel.DepthwiseConv2d(8, 8, 7, padding=3, groups=8)(x),
    ):
        assert 0 < depthwise_share(call) < 1
    y = depthwise(x.clone().requires_grad_())
    assert 0 < depthwise_share(lambda: y.sum().backward()) < 1


def _nano() -> nn.Module:
    return timm.create_model("replknet_nano")


def _convnext() -> nn.Module:
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=10)
