"""Benchmark of operators on devices, run on the CPU and, if there is one, on a CUDA device."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from widekernel import ops
from widekernel.bench import PASSES, Case, OperatorPlan, Platform, TimeBudget, cuda_platform, devices, gpu, measure_operators
from widekernel.bench import operators as measuring
from widekernel.bench.cases import FORWARD, INPUT_GRAD, WEIGHT_GRAD, choose
from widekernel.bench.devices import Accelerator
from widekernel.bench.notes import DEVICE_OPERATOR_NOTES
from widekernel.bench.plots import draw
from widekernel.bench.precision import BFLOAT16, FLOAT16, FLOAT32, PRECISIONS, TF32
from widekernel.bench.rows import DeviceOperatorRow
from widekernel.bench.tables import document, markdown, operator_columns, write_each
from widekernel.bench.timing import WallClock
from widekernel.ops.problem import DEPTHWISE_WEIGHT_GRAD

TINY = Case("tiny", 3, 5, 9, 11, (13, 3))


def measured(device: Platform, *, budget: TimeBudget | None = None, cases=(TINY,), **settings) -> list[DeviceOperatorRow]:
    settings.setdefault("precisions", [FLOAT32])
    settings.setdefault("rounds", 1)
    return list(measure_operators(OperatorPlan(cases, **settings), device, budget or TimeBudget(10)))


def test_every_precision_pass_and_layout_is_timed(device) -> None:
    with ops.trace() as ran:
        rows = measured(device, precisions=list(PRECISIONS.values()))
    wanted = [(dtype, direction, layout) for dtype in PRECISIONS for direction in PASSES for layout in ("NCHW", "NHWC")]
    assert [(row.dtype, row.direction, row.layout) for row in rows] == wanted
    assert {problem.dtype for _, problem in ran.calls} == {torch.float32, torch.float16, torch.bfloat16}
    for row in rows:
        assert row.ours_calls == row.torch_nchw_calls == row.torch_nhwc_calls == 1 and not row.remark
        assert (
            row.reference_error <= PRECISIONS[row.dtype].tolerance and row.error <= PRECISIONS[row.dtype].agreement_tolerance
        )
        assert row.times_best == pytest.approx(min(row.torch_nchw_ms, row.torch_nhwc_ms) / row.ours_ms)
        assert row.backend in ops.backends() and row.onnxruntime_ms is None
    assert max(row.reference_error for row in rows if row.dtype == "bfloat16") > 1e-4, "it computes in that type"


def test_settings_are_in_force_only_while_calls_run(device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = set(), measuring.pytorch_call
    monkeypatch.setattr(
        measuring, "pytorch_call", lambda *given: seen.add(torch.get_float32_matmul_precision()) or real(*given)
    )
    before = torch.get_float32_matmul_precision()
    for row in measure_operators(OperatorPlan([TINY], [TF32], rounds=1), device, TimeBudget(10)):
        assert row.dtype == "tf32" and torch.get_float32_matmul_precision() == before
    assert seen == {"high"}


def test_floors_equal_numbers_computed_by_hand(on_cpu) -> None:
    limits = gpu.Gpu("", "", 0, 0, 0, "", {}, 4000.0, {"bfloat16": 800e3, "tf32": 400e3, "float16": 1.0, "float32": 50e3})
    platform = cuda_platform(on_cpu, limits)
    # 31x31 on 56x56 (25 and 56 rows of taps, by symmetry 1496² pairs), 64 images of 128 channels.
    large = Case("large", 64, 128, 56, 56, (31, 31))
    assert large.macs == 64 * 128 * 1496**2
    for precision, floor in ((BFLOAT16, 2 * large.macs / 800e12), (FLOAT32, 2 * large.macs / (400e12 / 3))):
        row = next(
            measuring._Trial(large, FORWARD, precision, OperatorPlan([]), platform).rows(platform.limits(large, precision))
        )
        assert row.limit_ms == pytest.approx(1e3 * floor) and row.limited_by == "matmul"
        assert math.isnan(row.ours_ms) and math.isnan(row.limit_share) and row.copy_gbs == 4000
    small = Case("small", 64, 96, 56, 56, (7, 7))
    row = next(measuring._Trial(small, FORWARD, BFLOAT16, OperatorPlan([]), platform).rows(platform.limits(small, BFLOAT16)))
    assert row.limited_by == "copy" and row.limit_ms == pytest.approx(1e3 * 2 * (2 * 64 * 96 * 56**2 + 96 * 49) / 4000e9)
    assert row.intensity == pytest.approx(2 * small.macs / (2 * (2 * 64 * 96 * 56**2 + 96 * 49)))


def test_shares_of_the_floor(device) -> None:
    for row in measured(device):
        assert row.limit_share == pytest.approx(row.limit_ms / row.ours_ms)
        assert row.peak_share == pytest.approx(row.gflops / 130e3)


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_wrong_results_have_no_times(direction: str, layout: str, device, spoil) -> None:
    spoil(lambda problem: problem.shape == TINY.shape and problem.channels_last == (layout == "NHWC"))
    budget = TimeBudget(10)
    rows = measured(device, budget=budget, passes=[direction], precisions=[BFLOAT16])
    for row in rows:
        is_wrong = row.layout == layout
        assert math.isnan(row.ours_ms) == math.isnan(row.times_best) == is_wrong and row.torch_nhwc_ms > 0
        assert ("differs from float64 by 0.1" in row.remark) == is_wrong
        assert (row.backend == "wrong") == is_wrong
    (line,) = budget.wrong
    assert line.startswith(
        f"{direction} of tiny 3x5x9x11 13x3 in bfloat16, ours {layout} (wrong): differs from float64 by 0."
    )


@pytest.mark.parametrize("direction", PASSES)
def test_errors_in_some_images_only_are_found(direction: str, device, monkeypatch) -> None:
    """The middle image is not among those compared with float64, but on it, all implementations are compared."""
    real = measuring.implementations

    def corrupted(*given) -> dict:
        calls = real(*given)
        call = calls["ours NHWC"]

        def run() -> torch.Tensor:
            y = call().clone()
            y[1, 0, 0, 0] += 0.1 * y.abs().max()
            return y

        return calls | {"ours NHWC": run}

    monkeypatch.setattr(measuring, "implementations", corrupted)
    nchw, nhwc = measured(device, passes=[direction])
    assert nchw.ours_ms > 0 and math.isnan(nhwc.ours_ms) and nhwc.torch_nchw_ms > 0
    assert "ours NHWC: differs from float64 by 0.1" in nhwc.remark


def test_a_wrong_baseline_has_no_times(device, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measuring.implementations
    wrong = {"PyTorch NHWC": lambda: torch.full(TINY.shape, math.nan)}
    monkeypatch.setattr(measuring, "implementations", lambda *given: real(*given) | wrong)
    budget = TimeBudget(10)
    for row in measured(device, budget=budget, passes=[FORWARD]):
        assert row.ours_ms > 0 and row.torch_nchw_ms > 0 and math.isnan(row.torch_nhwc_ms)
        assert row.remark == "PyTorch NHWC: differs from float64 by nan of the largest number, more than 0.0001"
        assert row.times_best == row.times_default == pytest.approx(row.torch_nchw_ms / row.ours_ms)
        assert row.error < 1e-5
    budget.finish()


def test_the_weight_gradient_is_checked_in_the_first_and_the_last_image(device) -> None:
    with ops.trace() as ran:
        rows = measured(device, passes=[WEIGHT_GRAD])
    problems = [problem for _, problem in ran.calls]
    assert {problem.op for problem in problems} == {DEPTHWISE_WEIGHT_GRAD}
    assert {problem.shape for problem in problems} == {TINY.shape}, "the batch that is timed"
    assert len(rows) == 2 and all(0 < row.reference_error < 1e-5 for row in rows)


@pytest.mark.parametrize("failing", ["PyTorch NCHW", "ours NHWC"])
def test_a_failing_implementation_does_not_end_the_run(failing: str, device, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measuring.implementations

    def fail() -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nMore.")

    monkeypatch.setattr(measuring, "implementations", lambda *given: real(*given) | {failing: fail})
    rows = measured(device)
    assert len(rows) == 6
    for row in rows:
        times = {"ours NHWC": row.ours_ms if row.layout == "NHWC" else 1.0, "PyTorch NCHW": row.torch_nchw_ms}
        assert {name: math.isnan(time) for name, time in times.items()} == {n: n == failing for n in times} or (
            failing == "ours NHWC" and row.layout == "NCHW"
        )
        said = f"{failing}: OutOfMemoryError: CUDA out of memory."
        assert row.remark == ("" if failing == "ours NHWC" and row.layout == "NCHW" else said)


def test_a_backend_that_refuses_the_case(device, spoil) -> None:
    spoil(lambda problem: False)
    rows = measured(device, backend="wrong", passes=[FORWARD])
    assert all("NoBackendError: wrong cannot compute" in row.remark and row.torch_nchw_ms > 0 for row in rows)


def test_no_memory_for_the_tensors(device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no memory")))
    rows = measured(device)
    assert [row.remark for row in rows] == [f"{direction}: RuntimeError: no memory" for direction in PASSES for _ in "ab"]


class LostDevice(WallClock):
    """A stopwatch of a device that works only until something fails."""

    def recover(self) -> None:
        raise devices.DeviceLostError("the device takes no more calls")


def test_a_lost_device_ends_the_run(device_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measuring.implementations

    def fail() -> None:
        raise RuntimeError("illegal")

    def corrupted(direction, *given) -> dict:
        return real(direction, *given) | ({"ours NCHW": fail} if direction == INPUT_GRAD else {})

    monkeypatch.setattr(measuring, "implementations", corrupted)
    budget = TimeBudget(10)
    rows = measured(cuda_platform(Accelerator(torch.device("cpu"), LostDevice()), device_gpu), budget=budget)
    assert [row.direction for row in rows] == [FORWARD] * 2 + [INPUT_GRAD] * 2
    assert "takes no more calls" in rows[2].remark and math.isnan(rows[2].torch_nchw_ms)
    assert budget.lines() == ["Left out in float32: tiny (weight gradient), because the device takes no more calls."]


def test_rows_that_exceed_the_budget_are_left_out(device) -> None:
    now = iter([0.0, 1.0, 59.0, 61.0] + [100.0] * 20)
    budget = TimeBudget(1, lambda: next(now))
    told: list = []
    plan = OperatorPlan([TINY, Case("other", 1, 2, 5, 5, (3, 3))], [BFLOAT16, FLOAT16], rounds=1)
    rows = list(measure_operators(plan, device, budget, lambda what, steps: told.append((what, steps))))
    assert [row.direction for row in rows] == [FORWARD] * 2 + [INPUT_GRAD] * 2
    every, why = ", ".join(PASSES), "because the 1 minutes were over; --minutes gives more."
    assert budget.lines() == [
        f"Left out in bfloat16: tiny (weight gradient), other ({every}), {why}",
        f"Left out in float16: tiny ({every}), other ({every}), {why}",
    ]
    assert told[0] == ("bfloat16 tiny forward", 0) and sum(steps for _, steps in told) == 4


def test_cases_with_the_same_name_are_distinguished(device) -> None:
    budget = TimeBudget(1e-9)
    cases = [Case("sweep", 1, 2, 5, 5, (3, 3)), Case("sweep", 1, 2, 5, 5, (5, 5))]
    assert not measured(device, budget=budget, cases=cases, passes=[FORWARD])
    assert "1x2x5x5 3x3 (forward), 1x2x5x5 5x5 (forward)" in budget.lines()[0]


def test_rows_are_written_as_they_are_measured(device, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("of an earlier run\n")
    rows = write_each(measure_operators(OperatorPlan([TINY], [BFLOAT16], rounds=1), device, TimeBudget(10)), path)
    for number in range(1, 4):
        row = next(rows)
        with path.open(newline="") as file:
            read = list(csv.DictReader(file))
        assert len(read) == number and float(read[-1]["ours_ms"]) == pytest.approx(row.ours_ms, rel=1e-5)
    assert read[-1]["dtype"] == "bfloat16" and read[-1]["onnxruntime_ms"] == "" and read[-1]["limited_by"] == row.limited_by
    assert len(list(write_each(iter([row]), None))) == 1


def test_the_layers_of_networks_are_the_default() -> None:
    names = [case.name for case in choose(["layers"], 64)[0]]
    assert len(names) == 13 and not {"dense-51", "dense-61", "detection"} & set(names)
    assert {case.batch for case in choose(["layers"], 64)[0]} == {64}


def test_page_and_plot(device, spoil) -> None:
    spoil(lambda problem: problem.channels_last and problem.dtype == torch.bfloat16)
    rows = measured(device, precisions=[BFLOAT16, TF32])
    columns = operator_columns(rows, on_device=True)
    page = document("Title", device.facts, markdown(rows, columns), DEVICE_OPERATOR_NOTES, "widekernel bench ops")
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 12 and len({line.count("|") for line in table}) == 1
    assert "GPU: Some GPU" in page and "copying 4.00 TB/s" in page and "1.3 to 1.7 times" in page
    assert "nan" not in page and "ours NHWC: differs from float64" in page
    assert "remark" in table[0] and "remark" not in [header for header, _ in operator_columns(rows[6:], on_device=True)]
    for some in (rows, rows[1:2], []):
        assert draw(some, device).startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_small_set_on_cuda(tmp_path: Path) -> None:
    where = devices.accelerator("cuda")
    with where.current():
        limits = gpu.measure_gpu(where)
        budget = TimeBudget(5)
        plan = OperatorPlan(choose(["small"], 8)[0], list(PRECISIONS.values()), seconds=0.01)
        rows = list(write_each(measure_operators(plan, cuda_platform(where, limits), budget), tmp_path / "rows.csv"))
    assert limits.bandwidth > 50 and limits.products["bfloat16"] > limits.products["float32"] > 1000
    assert len(rows) == 5 * 4 * 3 * 2 and not budget.lines()
    for row in rows:
        assert not row.remark and row.ours_ms > 0 and row.limit_share > 0 and row.ours_calls >= 5
    assert draw(rows, cuda_platform(where, limits)).startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_times_of_a_cuda_device() -> None:
    where = devices.accelerator("cuda")
    x = torch.ones(2**26, device="cuda")
    one, eight = (
        min(where.stopwatch.time(lambda n=n: [x.mul_(1.0) for _ in range(n)])[1] for _ in range(5)) for n in (1, 8)
    )
    assert 5 * one < eight < 11 * one
    with pytest.raises(RuntimeError):
        where.stopwatch.time(lambda: torch.empty(2**60, device="cuda"))
    where.stopwatch.recover()
