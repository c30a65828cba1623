"""Benchmarks of networks on devices, run on the CPU and, where there is one, on a CUDA device."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

import widekernel.models  # noqa: F401 - registers the models
from widekernel import ops
from widekernel.bench import NetworkPlan, TimeBudget, cuda_platform, devices, gpu, measure_networks, variants
from widekernel.bench import networks as measuring
from widekernel.bench.lookup import build_network, check_names
from widekernel.bench.networks import DEFAULT_NETWORKS
from widekernel.bench.notes import DEVICE_NETWORK_NOTES
from widekernel.bench.precision import BFLOAT16, FLOAT32, TF32
from widekernel.bench.rows import DeviceNetworkRow
from widekernel.bench.tables import document, markdown, network_columns
from widekernel.errors import ConfigError

pytestmark = pytest.mark.usefixtures("untimed")


def replknet() -> tuple[nn.Module, int]:
    # For smaller images the last norm would have one value per image, and its gradients would be rounding errors.
    return timm.create_model("replknet_nano", depths=(1, 1, 1, 1)), 64


def convnext() -> tuple[nn.Module, int]:
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=10), 32


def measured(device, *, build=replknet, budget: TimeBudget | None = None, **settings) -> list[DeviceNetworkRow]:
    settings = {"batches": [3], "modes": ["infer"], "rounds": 1, "precisions": [BFLOAT16]} | settings
    return list(measure_networks(NetworkPlan({"it": build}, **settings), device, budget or TimeBudget(10)))


def test_rows_are_in_bfloat16(device) -> None:
    with ops.trace() as ran:
        rows = measured(device, modes=["train", "infer"])
    train, infer = ["PyTorch", "ours", "ours, accelerated"], ["PyTorch", "ours", "PyTorch, folded", "ours, folded"]
    infer.append("ours, accelerated")
    forms = [(m, r, layout) for m, rs in (("train", train), ("infer", infer)) for layout in ("NCHW", "NHWC") for r in rs]
    assert [(r.batch, r.mode, r.variant, r.layout) for r in rows] == [(3, *form) for form in forms]
    for row in rows:
        best = min(r.ms for r in rows if r.mode == row.mode and r.variant.startswith("PyTorch"))
        assert row.dtype == "bfloat16" and row.size == 64 and row.calls == 1 and not row.remark
        assert row.times_best == pytest.approx(best / row.ms) and row.images_per_second == pytest.approx(
            1e3 * row.batch / row.ms
        )
        assert 0 < row.depthwise_share < 1
    checked = {problem.shape[0] for _, problem in ran.calls if problem.dtype == torch.float32}
    timed = {problem.shape[0] for _, problem in ran.calls if problem.dtype == torch.bfloat16}
    assert checked == {1, 2} and timed == {3}, "one image to learn the classes, two to compare"


def test_the_comparison_is_made_in_strict_float32(device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], measuring.check_variants

    def recording(name, some, mode, target) -> None:
        seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"), {len(r.images) for r in some}))
        real(name, some, mode, target)

    monkeypatch.setattr(measuring, "check_variants", recording)
    before = torch.get_float32_matmul_precision()
    assert {row.dtype for row in measured(device, build=convnext, precisions=[TF32, BFLOAT16])} == {"tf32", "bfloat16"}
    assert seen == [("highest", False, {2})] * 2 and torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("mode", "compiled"),
    [
        ("infer", True),
        ("train", False),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("infer", False), ("train", True))),
    ],
)
def test_a_wrong_network_has_no_times(mode: str, compiled: bool, device, spoil) -> None:
    spoil(lambda problem: problem.op == ("depthwise_sum" if mode == "infer" else "depthwise_weight_grad"))
    budget = TimeBudget(10)
    (row,) = measured(device, modes=[mode], budget=budget, compiled=compiled)
    assert len(budget.wrong) == 1
    assert row.variant == "all" and math.isnan(row.ms) and row.calls == 0 and "it: ours N" in row.remark
    assert budget.wrong[0].startswith(f"it, {mode}, bfloat16, 3 images: the ")


def test_sizes_that_do_not_fit(device) -> None:
    (row,) = measured(device, size=1)
    assert "it does not run on images of (3, 1, 1)" in row.remark and row.size == 1


def test_a_failing_variant_does_not_end_the_run(device, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measuring.network_call

    def failing(variant, *given):
        if variant.name == "ours NHWC":
            return lambda: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("CUDA out of memory."))
        return real(variant, *given)

    monkeypatch.setattr(measuring, "network_call", failing)
    budget = TimeBudget(10)
    rows = measured(device, budget=budget)
    assert {row.variant + row.layout: row.remark for row in rows if row.remark} == {
        "oursNHWC": "OutOfMemoryError: CUDA out of memory."
    }
    assert [row.variant + row.layout for row in rows if math.isnan(row.ms)] == ["oursNHWC"] and len(rows) == 10
    budget.finish()


def test_the_baseline_may_be_missing(device, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measuring.network_call
    broken = lambda: 1 / 0  # noqa: E731
    monkeypatch.setattr(
        measuring, "network_call", lambda variant, *g: broken if variant.kind == "PyTorch" else real(variant, *g)
    )
    rows = [row for row in measured(device, modes=["train"]) if row.variant == "ours"]
    assert all(math.isnan(row.times_nhwc) and math.isnan(row.times_best) and row.ms > 0 for row in rows)


def test_rows_that_exceed_the_budget_are_left_out(device) -> None:
    budget = TimeBudget(1e-9)
    assert not measured(device, batches=[2, 4], modes=["train", "infer"], budget=budget)
    wanted = "Left out in bfloat16: it, 2 images (train, infer), it, 4 images (train, infer), because the 1e-09 minutes were"
    assert budget.lines()[0].startswith(wanted)


def test_compiled_networks_are_compared_as_they_are_timed(device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One compiler here does nothing, and another one produces wrong results."""
    monkeypatch.setattr(variants, "compiled_by_torch", lambda network: network)
    rows = measured(device, build=convnext, compiled=True)
    assert [row.compiled for row in rows] == [False] * 4 + [True] * 4 and not any(row.remark for row in rows)
    assert all((row.depthwise_share is None) == row.compiled for row in rows)
    monkeypatch.setattr(variants, "compiled_by_torch", lambda network: lambda x: 2 * network(x))
    budget = TimeBudget(10)
    rows = measured(device, build=convnext, compiled=True, budget=budget)
    for row in rows:
        assert math.isnan(row.ms) == row.compiled == row.remark.startswith("compiling changes its output by 1 of")
    assert len(budget.wrong) == 4 and budget.wrong[0].startswith(
        "it, infer, PyTorch NCHW compiled: compiling changes its output"
    )


@pytest.mark.slow
def test_compiling_costs_no_other_rows(device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling comes last, and is left out if there is no time for it."""
    monkeypatch.setattr(variants, "compiled_by_torch", lambda network: network)
    rows = measured(device, build=convnext, compiled=True, modes=["train", "infer"])
    assert [(row.compiled, row.mode) for row in rows[::4]] == [(c, m) for c in (False, True) for m in ("train", "infer")]
    asked = []
    budget = TimeBudget(1, lambda: 60.0 * (len(asked) > 0))
    real = measuring.network_call

    def compiling(variant, *given):
        call = real(variant, *given)
        return (lambda: (asked.append(variant.name), call())[1]) if variant.compiled else call

    monkeypatch.setattr(measuring, "network_call", compiling)
    rows = measured(device, build=convnext, compiled=True, batches=[3, 4], budget=budget)
    assert [row.batch for row in rows] == [3] * 4 + [4] * 4 + [3] * 4
    assert [row.remark for row in rows] == [""] * 9 + ["no time was left to compile it"] * 3
    assert budget.lines()[0].startswith("Left out in bfloat16: it, 4 images, compiled (infer), because the 1 minutes were")


@pytest.mark.slow
def test_compiled_variants(device) -> None:
    for mode in ("infer", "train"):
        rows = measured(device, build=convnext, compiled=True, modes=[mode])
        assert len(rows) == 8 and not any(row.remark for row in rows)


def test_page(device, spoil) -> None:
    rows = measured(device, build=convnext)
    spoil(lambda problem: True)
    for some in (rows, rows + measured(device, build=replknet)):
        page = document(
            "T", device.facts, markdown(some, network_columns(some, on_device=True)), DEVICE_NETWORK_NOTES, "bench"
        )
        table = [line for line in page.splitlines() if line.startswith("|")]
        assert len(table) == 2 + len(some) and len({line.count("|") for line in table}) == 1 and "nan" not in page
        assert ("remark" in table[0]) == (len(some) > len(rows))


def test_names_are_checked() -> None:
    check_names(DEFAULT_NETWORKS)
    assert build_network("replknet_nano")[1] == 64
    with pytest.raises(ConfigError, match="Did you mean 'slak_tiny'"):
        check_names(["slak_tinny"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["replknet_nano", "slak_nano", "shiftwise_nano"])
def test_networks_on_cuda(name: str) -> None:
    where, budget = devices.accelerator("cuda"), TimeBudget(5)
    plan = NetworkPlan({name: lambda: build_network(name)}, [8], [BFLOAT16, TF32, FLOAT32], size=64, seconds=0.02)
    with where.current():
        rows = list(measure_networks(plan, cuda_platform(where, gpu.measure_gpu(where)), budget))
    assert not budget.lines() and len(rows) == 3 * 16
    for row in rows:
        assert not row.remark and row.ms > 0 and 0 < row.depthwise_share < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_networks_on_cuda() -> None:
    where, budget = devices.accelerator("cuda"), TimeBudget(5)
    plan = NetworkPlan({"convnext": convnext}, [4], [BFLOAT16], compiled=True, seconds=0.02)
    with where.current():
        rows = list(measure_networks(plan, cuda_platform(where, gpu.measure_gpu(where)), budget))
    assert not budget.lines() and len(rows) == 16 and not any(row.remark for row in rows)
