"""The benchmark of operators on devices, run on the CPU; and for real where there is a CUDA device."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from widekernel import ops
from widekernel.bench import PASSES, Case, devices, gpu
from widekernel.bench import device_operators as measuring
from widekernel.bench.cases import FORWARD, INPUT_GRAD, WEIGHT_GRAD, choose
from widekernel.bench.device_operators import DeviceRow, Plan, measure_cases
from widekernel.bench.devices import Accelerator
from widekernel.bench.plots import draw_device
from widekernel.bench.precision import BFLOAT16, FLOAT16, FLOAT32, PRECISIONS, TF32
from widekernel.bench.tables import DEVICE_OPERATOR_NOTES, device_columns, document, markdown, write_each
from widekernel.bench.time_budget import Course
from widekernel.bench.timing import WallClock
from widekernel.ops.problem import DEPTHWISE_WEIGHT_GRAD

TINY = Case("tiny", 3, 5, 9, 11, (13, 3))


def measured(where: Accelerator, limits, *, course: Course | None = None, cases=(TINY,), **settings) -> list[DeviceRow]:
    settings.setdefault("precisions", [FLOAT32])
    settings.setdefault("rounds", 1)
    return list(measure_cases(Plan(cases, **settings), where, limits, course or Course(10)))


def test_every_type_pass_and_layout(on_cpu, device_gpu) -> None:
    with ops.trace() as ran:
        rows = measured(on_cpu, device_gpu, precisions=list(PRECISIONS.values()))
    wanted = [(dtype, direction, layout) for dtype in PRECISIONS for direction in PASSES for layout in ("NCHW", "NHWC")]
    assert [(row.dtype, row.direction, row.layout) for row in rows] == wanted
    assert {problem.dtype for _, problem in ran.calls} == {torch.float32, torch.float16, torch.bfloat16}
    for row in rows:
        assert row.ours_calls == row.torch_nchw_calls == row.torch_nhwc_calls == 1 and not row.remark
        assert row.reference_error <= PRECISIONS[row.dtype].tolerance and row.error <= PRECISIONS[row.dtype].rivals_tolerance
        assert row.times_best == pytest.approx(min(row.torch_nchw_ms, row.torch_nhwc_ms) / row.ours_ms)
        assert row.backend in ops.backends() and row.onnxruntime_ms is None
    assert max(row.reference_error for row in rows if row.dtype == "bfloat16") > 1e-4, "it computes in that type"


def test_settings_are_in_force_while_a_rival_runs_only(on_cpu, device_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = set(), measuring.pytorchs
    monkeypatch.setattr(measuring, "pytorchs", lambda *given: seen.add(torch.get_float32_matmul_precision()) or real(*given))
    before = torch.get_float32_matmul_precision()
    for row in measure_cases(Plan([TINY], [TF32], rounds=1), on_cpu, device_gpu, Course(10)):
        assert row.dtype == "tf32" and torch.get_float32_matmul_precision() == before
    assert seen == {"high"}


def test_floors() -> None:
    """Against numbers computed by hand."""
    limits = gpu.Gpu("", "", 0, 0, 0, "", {}, 4000.0, {"bfloat16": 800e3, "tf32": 400e3, "float16": 1.0, "float32": 50e3})
    # 31x31 on 56x56 (25 and 56 rows of taps, by symmetry 1496² pairs), 64 images of 128 channels.
    large = Case("large", 64, 128, 56, 56, (31, 31))
    assert large.macs == 64 * 128 * 1496**2
    for precision, floor in ((BFLOAT16, 2 * large.macs / 800e12), (FLOAT32, 2 * large.macs / (400e12 / 3))):
        row = next(measuring._Trial(large, FORWARD, precision, Plan([], [])).rows(limits))
        assert row.limit_ms == pytest.approx(1e3 * floor) and row.limited_by == "matmul"
        assert math.isnan(row.ours_ms) and math.isnan(row.limit_share) and row.copy_gbs == 4000
    small = Case("small", 64, 96, 56, 56, (7, 7))
    row = next(measuring._Trial(small, FORWARD, BFLOAT16, Plan([], [])).rows(limits))
    assert row.limited_by == "copy" and row.limit_ms == pytest.approx(1e3 * 2 * (2 * 64 * 96 * 56**2 + 96 * 49) / 4000e9)
    assert row.intensity == pytest.approx(2 * small.macs / (2 * (2 * 64 * 96 * 56**2 + 96 * 49)))


def test_shares_of_the_floor(on_cpu, device_gpu) -> None:
    for row in measured(on_cpu, device_gpu):
        assert row.limit_share == pytest.approx(row.limit_ms / row.ours_ms)
        assert row.peak_share == pytest.approx(row.gflops / 130e3)


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_no_times_of_what_is_wrong(direction: str, layout: str, on_cpu, device_gpu, spoil) -> None:
    spoil(lambda problem: problem.shape == TINY.shape and problem.channels_last == (layout == "NHWC"))
    course = Course(10)
    rows = measured(on_cpu, device_gpu, course=course, passes=[direction], precisions=[BFLOAT16])
    for row in rows:
        is_wrong = row.layout == layout
        assert math.isnan(row.ours_ms) == math.isnan(row.times_best) == is_wrong and row.torch_nhwc_ms > 0
        assert ("differs from float64 by 0.1" in row.remark) == is_wrong
        assert (row.backend == "wrong") == is_wrong
    (line,) = course.wrong
    assert line.startswith(
        f"{direction} of tiny 3x5x9x11 13x3 in bfloat16, ours {layout} (wrong): differs from float64 by 0."
    )


@pytest.mark.parametrize("direction", PASSES)
def test_what_is_wrong_in_some_images_only_is_found(direction: str, on_cpu, device_gpu, monkeypatch) -> None:
    """The image in the middle is not among those compared with float64, but among those compared with the rivals."""
    real = measuring.rivals_in_pytorch

    def spoilt(*given) -> dict:
        calls = real(*given)
        call = calls["ours NHWC"]

        def run() -> torch.Tensor:
            y = call().clone()
            y[1, 0, 0, 0] += 0.1 * y.abs().max()
            return y

        return calls | {"ours NHWC": run}

    monkeypatch.setattr(measuring, "rivals_in_pytorch", spoilt)
    nchw, nhwc = measured(on_cpu, device_gpu, passes=[direction])
    assert nchw.ours_ms > 0 and math.isnan(nhwc.ours_ms) and nhwc.torch_nchw_ms > 0
    assert "ours NHWC: differs from float64 by 0.1" in nhwc.remark


def test_a_rival_that_computes_wrongly_has_no_times(on_cpu, device_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measuring.rivals_in_pytorch
    wrong = {"PyTorch NHWC": lambda: torch.full(TINY.shape, math.nan)}
    monkeypatch.setattr(measuring, "rivals_in_pytorch", lambda *given: real(*given) | wrong)
    course = Course(10)
    for row in measured(on_cpu, device_gpu, course=course, passes=[FORWARD]):
        assert row.ours_ms > 0 and row.torch_nchw_ms > 0 and math.isnan(row.torch_nhwc_ms)
        assert row.remark == "PyTorch NHWC: differs from float64 by nan of the largest number, more than 0.0001"
        assert row.times_best == row.times_default == pytest.approx(row.torch_nchw_ms / row.ours_ms)
        assert row.error < 1e-5
    course.finish()


def test_the_weight_gradient_is_checked_in_the_first_and_the_last_image(on_cpu, device_gpu) -> None:
    with ops.trace() as ran:
        rows = measured(on_cpu, device_gpu, passes=[WEIGHT_GRAD])
    problems = [problem for _, problem in ran.calls]
    assert {problem.op for problem in problems} == {DEPTHWISE_WEIGHT_GRAD}
    assert {problem.shape for problem in problems} == {TINY.shape}, "the batch that is timed"
    assert len(rows) == 2 and all(0 < row.reference_error < 1e-5 for row in rows)


@pytest.mark.parametrize("failing", ["PyTorch NCHW", "ours NHWC"])
def test_a_rival_that_fails_does_not_end_the_run(failing: str, on_cpu, device_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measuring.rivals_in_pytorch

    def fail() -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nMore.")

    monkeypatch.setattr(measuring, "rivals_in_pytorch", lambda *given: real(*given) | {failing: fail})
    rows = measured(on_cpu, device_gpu)
    assert len(rows) == 6
    for row in rows:
        times = {"ours NHWC": row.ours_ms if row.layout == "NHWC" else 1.0, "PyTorch NCHW": row.torch_nchw_ms}
        assert {name: math.isnan(time) for name, time in times.items()} == {n: n == failing for n in times} or (
            failing == "ours NHWC" and row.layout == "NCHW"
        )
        said = f"{failing}: OutOfMemoryError: CUDA out of memory."
        assert row.remark == ("" if failing == "ours NHWC" and row.layout == "NCHW" else said)


def test_a_backend_that_does_not_take_the_case(on_cpu, device_gpu, spoil) -> None:
    spoil(lambda problem: False)
    rows = measured(on_cpu, device_gpu, backend="wrong", passes=[FORWARD])
    assert all("NoBackendError: wrong cannot compute" in row.remark and row.torch_nchw_ms > 0 for row in rows)


def test_no_memory_for_the_numbers(on_cpu, device_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no memory")))
    rows = measured(on_cpu, device_gpu)
    assert [row.remark for row in rows] == [f"{direction}: RuntimeError: no memory" for direction in PASSES for _ in "ab"]


class Lost(WallClock):
    """On a device that goes on working only until something fails."""

    def recover(self) -> None:
        raise devices.DeviceLostError("the device takes no more calls")


def test_a_lost_device(device_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measuring.rivals_in_pytorch

    def fail() -> None:
        raise RuntimeError("illegal")

    def spoilt(direction, *given) -> dict:
        return real(direction, *given) | ({"ours NCHW": fail} if direction == INPUT_GRAD else {})

    monkeypatch.setattr(measuring, "rivals_in_pytorch", spoilt)
    course = Course(10)
    rows = measured(Accelerator(torch.device("cpu"), Lost()), device_gpu, course=course)
    assert [row.direction for row in rows] == [FORWARD] * 2 + [INPUT_GRAD] * 2
    assert "takes no more calls" in rows[2].remark and math.isnan(rows[2].torch_nchw_ms)
    assert course.lines() == ["Left out in float32: tiny (weight gradient), because the device takes no more calls."]


def test_what_there_is_no_time_for_is_left_out(on_cpu, device_gpu) -> None:
    now = iter([0.0, 1.0, 59.0, 61.0] + [100.0] * 20)
    course = Course(1, lambda: next(now))
    told: list = []
    plan = Plan([TINY, Case("other", 1, 2, 5, 5, (3, 3))], [BFLOAT16, FLOAT16], rounds=1)
    rows = list(measure_cases(plan, on_cpu, device_gpu, course, lambda what, steps: told.append((what, steps))))
    assert [row.direction for row in rows] == [FORWARD] * 2 + [INPUT_GRAD] * 2
    every, why = ", ".join(PASSES), "because the 1 minutes were over; --minutes gives more."
    assert course.lines() == [
        f"Left out in bfloat16: tiny (weight gradient), other ({every}), {why}",
        f"Left out in float16: tiny ({every}), other ({every}), {why}",
    ]
    assert told[0] == ("bfloat16 tiny forward", 0) and sum(steps for _, steps in told) == 4


def test_cases_of_one_name_are_told_apart(on_cpu, device_gpu) -> None:
    course = Course(1e-9)
    cases = [Case("sweep", 1, 2, 5, 5, (3, 3)), Case("sweep", 1, 2, 5, 5, (5, 5))]
    assert not measured(on_cpu, device_gpu, course=course, cases=cases, passes=[FORWARD])
    assert "1x2x5x5 3x3 (forward), 1x2x5x5 5x5 (forward)" in course.lines()[0]


def test_rows_are_written_as_they_come(on_cpu, device_gpu, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("of an earlier run\n")
    rows = write_each(measure_cases(Plan([TINY], [BFLOAT16], rounds=1), on_cpu, device_gpu, Course(10)), path)
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


def test_the_page_and_the_picture(on_cpu, device_gpu, spoil) -> None:
    spoil(lambda problem: problem.channels_last and problem.dtype == torch.bfloat16)
    rows = measured(on_cpu, device_gpu, precisions=[BFLOAT16, TF32])
    columns = device_columns(rows)
    page = document("Title", device_gpu.lines(), markdown(rows, columns), DEVICE_OPERATOR_NOTES, "widekernel bench ops")
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 12 and len({line.count("|") for line in table}) == 1
    assert "GPU: Some GPU" in page and "copying 4.00 TB/s" in page and "1.3 to 1.7 times" in page
    assert "nan" not in page and "ours NHWC: differs from float64" in page
    assert "remark" in table[0] and "remark" not in [header for header, _ in device_columns(rows[6:])]
    for some in (rows, rows[1:2], []):
        assert draw_device(some, device_gpu).startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_small_set_on_cuda(tmp_path: Path) -> None:
    where = devices.accelerator("cuda")
    with where.current():
        limits = gpu.measure_gpu(where)
        course = Course(5)
        plan = Plan(choose(["small"], 8)[0], list(PRECISIONS.values()), seconds=0.01)
        rows = list(write_each(measure_cases(plan, where, limits, course), tmp_path / "rows.csv"))
    assert limits.bandwidth > 50 and limits.products["bfloat16"] > limits.products["float32"] > 1000
    assert len(rows) == 5 * 4 * 3 * 2 and not course.lines()
    for row in rows:
        assert not row.remark and row.ours_ms > 0 and row.limit_share > 0 and row.ours_calls >= 5
    assert draw_device(rows, limits).startswith(b"\x89PNG")


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
