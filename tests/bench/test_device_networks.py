"""The benchmark of networks on devices, run on the CPU; and for real where there is a CUDA device."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

import widekernel.models  # noqa: F401 - registers the models
from widekernel import ops
from widekernel.bench import baselines, devices
from widekernel.bench import device_networks as measuring
from widekernel.bench.device_networks import DEFAULT_NETWORKS, DeviceNetworkRow, NetworkPlan, measure_networks
from widekernel.bench.lookup import built, check_names
from widekernel.bench.precision import BFLOAT16, FLOAT32, TF32
from widekernel.bench.tables import DEVICE_NETWORK_NOTES, device_network_columns, document, markdown
from widekernel.bench.time_budget import Course
from widekernel.errors import ConfigError


def replknet() -> tuple[nn.Module, int]:
    # Of smaller images the last norm would see one value an image, and its gradients would be what rounding leaves.
    return timm.create_model("replknet_nano"), 64


def convnext() -> tuple[nn.Module, int]:
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=10), 32


def measured(where, *, build=replknet, course: Course | None = None, **settings) -> list[DeviceNetworkRow]:
    settings = {"batches": [3], "modes": ["infer"], "rounds": 1} | settings
    return list(measure_networks(NetworkPlan({"it": build}, **settings), where, course or Course(10)))


def test_rows_in_bfloat16(on_cpu) -> None:
    with ops.trace() as ran:
        rows = measured(on_cpu, modes=["train", "infer"])
    train, infer = ["PyTorch", "ours", "ours, accelerated"], ["PyTorch", "ours", "PyTorch, folded", "ours, folded"]
    infer.append("ours, accelerated")
    forms = [(m, r, layout) for m, rs in (("train", train), ("infer", infer)) for layout in ("NCHW", "NHWC") for r in rs]
    assert [(r.batch, r.mode, r.rival, r.layout) for r in rows] == [(3, *form) for form in forms]
    for row in rows:
        best = min(r.ms for r in rows if r.mode == row.mode and r.rival.startswith("PyTorch"))
        assert row.dtype == "bfloat16" and row.size == 64 and row.calls == 1 and not row.remark
        assert row.times_best == pytest.approx(best / row.ms) and row.images_per_second == pytest.approx(
            1e3 * row.batch / row.ms
        )
        assert 0 < row.depthwise_share < 1
    checked = {problem.shape[0] for _, problem in ran.calls if problem.dtype == torch.float32}
    timed = {problem.shape[0] for _, problem in ran.calls if problem.dtype == torch.bfloat16}
    assert checked == {1, 2} and timed == {3}, "one image to learn the classes, two to compare"


def test_the_comparison_is_made_in_strict_float32(on_cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], measuring.check_rivals

    def noting(name, some, mode, target) -> None:
        seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"), {len(r.images) for r in some}))
        real(name, some, mode, target)

    monkeypatch.setattr(measuring, "check_rivals", noting)
    before = torch.get_float32_matmul_precision()
    assert {row.dtype for row in measured(on_cpu, build=convnext, precisions=[TF32, BFLOAT16])} == {"tf32", "bfloat16"}
    assert seen == [("highest", False, {2})] * 2 and torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_no_times_of_a_network_that_computes_wrongly(mode: str, compiled: bool, on_cpu, spoil) -> None:
    spoil(lambda problem: problem.op == ("depthwise_sum" if mode == "infer" else "depthwise_weight_grad"))
    course = Course(10)
    (row,) = measured(on_cpu, modes=[mode], course=course, compiled=compiled)
    assert len(course.wrong) == 1
    assert row.rival == "all" and math.isnan(row.ms) and row.calls == 0 and "it: ours N" in row.remark
    assert course.wrong[0].startswith(f"it, {mode}, bfloat16, 3 images: the ")


def test_sizes_that_do_not_fit(on_cpu) -> None:
    (row,) = measured(on_cpu, size=1)
    assert "it does not run on images of (3, 1, 1)" in row.remark and row.size == 1


def test_a_rival_that_fails_does_not_end_the_run(on_cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measuring.call_of

    def failing(rival, *given):
        if rival.name == "ours NHWC":
            return lambda: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("CUDA out of memory."))
        return real(rival, *given)

    monkeypatch.setattr(measuring, "call_of", failing)
    course = Course(10)
    rows = measured(on_cpu, course=course)
    assert {row.rival + row.layout: row.remark for row in rows if row.remark} == {
        "oursNHWC": "OutOfMemoryError: CUDA out of memory."
    }
    assert [row.rival + row.layout for row in rows if math.isnan(row.ms)] == ["oursNHWC"] and len(rows) == 10
    course.finish()


def test_the_best_rival_may_be_missing(on_cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measuring.call_of
    broken = lambda: 1 / 0  # noqa: E731
    monkeypatch.setattr(measuring, "call_of", lambda rival, *g: broken if rival.rival == "PyTorch" else real(rival, *g))
    rows = [row for row in measured(on_cpu, modes=["train"]) if row.rival == "ours"]
    assert all(math.isnan(row.times_nhwc) and math.isnan(row.times_best) and row.ms > 0 for row in rows)


def test_what_there_is_no_time_for_is_left_out(on_cpu) -> None:
    course = Course(1e-9)
    assert not measured(on_cpu, batches=[2, 4], modes=["train", "infer"], course=course)
    wanted = "Left out in bfloat16: it, 2 images (train, infer), it, 4 images (train, infer), because the 1e-09 minutes were"
    assert course.lines()[0].startswith(wanted)


def test_compiled_networks_are_compared_as_they_are_timed(on_cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that does nothing, and one that computes something else."""
    monkeypatch.setattr(baselines, "_compiled", lambda network, number: network)
    rows = measured(on_cpu, build=convnext, compiled=True)
    assert [row.compiled for row in rows] == [False] * 4 + [True] * 4 and not any(row.remark for row in rows)
    assert all((row.depthwise_share is None) == row.compiled for row in rows)
    monkeypatch.setattr(baselines, "_compiled", lambda network, number: lambda x: 2 * network(x))
    course = Course(10)
    rows = measured(on_cpu, build=convnext, compiled=True, course=course)
    for row in rows:
        assert math.isnan(row.ms) == row.compiled == row.remark.startswith("its output is off by 1 of what it is without")
    assert len(course.wrong) == 4 and course.wrong[0].startswith("it, infer, PyTorch NCHW compiled: its output is off")


def test_compiling_costs_no_row_of_anything_else(on_cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes last, and what there is no time to compile is left out."""
    monkeypatch.setattr(baselines, "_compiled", lambda network, number: network)
    rows = measured(on_cpu, build=convnext, compiled=True, modes=["train", "infer"])
    assert [(row.compiled, row.mode) for row in rows[::4]] == [(c, m) for c in (False, True) for m in ("train", "infer")]
    asked = []
    course = Course(1, lambda: 60.0 * (len(asked) > 0))
    real = measuring.call_of

    def compiling(rival, *given):
        call = real(rival, *given)
        return (lambda: (asked.append(rival.name), call())[1]) if rival.compiled else call

    monkeypatch.setattr(measuring, "call_of", compiling)
    rows = measured(on_cpu, build=convnext, compiled=True, batches=[3, 4], course=course)
    assert [row.batch for row in rows] == [3] * 4 + [4] * 4 + [3] * 4
    assert [row.remark for row in rows] == [""] * 9 + ["no time was left to compile it"] * 3
    assert course.lines()[0].startswith("Left out in bfloat16: it, 4 images, compiled (infer), because the 1 minutes were")


@pytest.mark.slow
def test_compiled(on_cpu) -> None:
    for mode in ("infer", "train"):
        rows = measured(on_cpu, build=convnext, compiled=True, modes=[mode])
        assert len(rows) == 8 and not any(row.remark for row in rows)


def test_the_page(on_cpu, device_gpu, spoil) -> None:
    rows = measured(on_cpu, build=convnext)
    spoil(lambda problem: True)
    for some in (rows, rows + measured(on_cpu, build=replknet)):
        page = document("T", device_gpu.lines(), markdown(some, device_network_columns(some)), DEVICE_NETWORK_NOTES, "bench")
        table = [line for line in page.splitlines() if line.startswith("|")]
        assert len(table) == 2 + len(some) and len({line.count("|") for line in table}) == 1 and "nan" not in page
        assert ("remark" in table[0]) == (len(some) > len(rows))


def test_names() -> None:
    check_names(DEFAULT_NETWORKS)
    assert built("replknet_nano")[1] == 64
    with pytest.raises(ConfigError, match="Did you mean 'slak_tiny'"):
        check_names(["slak_tinny"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["replknet_nano", "slak_nano", "shiftwise_nano"])
def test_networks_on_cuda(name: str) -> None:
    where, course = devices.accelerator("cuda"), Course(5)
    plan = NetworkPlan({name: lambda: built(name)}, [8], [BFLOAT16, TF32, FLOAT32], size=64, seconds=0.02)
    with where.current():
        rows = list(measure_networks(plan, where, course))
    assert not course.lines() and len(rows) == 3 * 16
    for row in rows:
        assert not row.remark and row.ms > 0 and 0 < row.depthwise_share < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_networks_on_cuda() -> None:
    where, course = devices.accelerator("cuda"), Course(5)
    plan = NetworkPlan({"convnext": convnext}, [4], compiled=True, seconds=0.02)
    with where.current():
        rows = list(measure_networks(plan, where, course))
    assert not course.lines() and len(rows) == 16 and not any(row.remark for row in rows)
