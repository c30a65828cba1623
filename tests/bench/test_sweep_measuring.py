"""The loop of a sweep: what it measures, continues, checks and refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.sweep_rows import unit_rows
from tests.bench.test_timing import Scene
from widekernel import ops
from widekernel.bench import BenchmarkError, Case, OperatorPlan, Platform, TimeBudget, measure_operators, operators
from widekernel.bench import fewer_images as trials
from widekernel.bench.cases import FORWARD, WEIGHT_GRAD
from widekernel.bench.fewer_images import MOST, affordable_images
from widekernel.bench.precision import BFLOAT16
from widekernel.bench.sweep import Record, SweepPlan, measure_sweep, measuring, ordered, units_of
from widekernel.bench.timing import Timing

TINY, EVEN = Case("tiny", 2, 5, 9, 9, (13, 3)), Case("even", 2, 3, 8, 8, (4, 4))
PLAN = SweepPlan([TINY, EVEN], seconds=1e-4)


def record_in(folder: Path) -> Record:
    return Record.begin_or_continue(folder / "s.csv", {"CPU": "A processor"}, [])


def units_in(record: Record) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.shape, row.direction) for row in record.rows))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Replace measuring by made-up rows, and the checks by nothing; return the list of units that are measured."""
    measured = []

    def rows_of(plan, platform, budget):
        (case,), (direction,) = plan.cases, plan.passes
        measured.append((str(case), direction))
        yield from unit_rows(case, direction)

    monkeypatch.setattr(measuring, "measure_operators", rows_of)
    monkeypatch.setattr(measuring, "check_class", lambda case, precision: None)
    return measured


def test_a_tiny_grid_is_measured_and_checked(tmp_path: Path, cpu: Platform) -> None:
    record = record_in(tmp_path)
    with ops.trace() as ran:
        measure_sweep(PLAN, cpu, record, TimeBudget())
    assert set(units_in(record)) == {unit.key for unit in units_of(PLAN.cases)} and len(record.rows) == 12
    shapes = {(problem.shape, problem.kernels) for _, problem in ran.calls}
    assert {(case.shape, (case.kernel,)) for case in PLAN.cases} <= shapes
    compared = {problem.kernels for name, problem in ran.calls if name == "reference"}
    assert compared == {((13, 3),), ((4, 4),)}, "each class is compared with the definition"
    for row in record.rows:
        assert row.times_best > 0 and row.times_same > 0 and row.error < 1e-5 and not row.remark
        assert row.torch_nchw_images == row.torch_nhwc_images == 2 and row.twin_ratio > 0
    with ops.trace() as again:
        measure_sweep(PLAN, cpu, Record.begin_or_continue(record.path, record.conditions, []), TimeBudget())
    assert not again.calls, "nothing is left to measure or to check"


def test_a_longer_sweep_extends_a_shorter_one(tmp_path: Path, cpu: Platform, made_up: list) -> None:
    wanted = [unit.key for unit in ordered(units_of(PLAN.cases), PLAN.seed)]
    told: list[tuple[str, int]] = []
    for units in (2, 1, 6):
        ticks = iter(range(100))  # a minute for each question whether time is left
        budget = TimeBudget(units + 0.5, lambda ticks=ticks: 60 * next(ticks) / 2)
        measure_sweep(PLAN, cpu, record_in(tmp_path), budget, lambda *step: told.append(step))
    record = record_in(tmp_path)
    assert units_in(record) == made_up == wanted[: len(made_up)] and len(made_up) > 3
    assert any("min left, " in what for what, _ in told)


def test_an_interrupted_sweep_keeps_what_is_done(tmp_path: Path, cpu: Platform, made_up, monkeypatch) -> None:
    real = measuring.measure_operators

    def interrupted(*arguments):
        if len(made_up) == 3:
            raise KeyboardInterrupt
        yield from real(*arguments)

    monkeypatch.setattr(measuring, "measure_operators", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_sweep(PLAN, cpu, record_in(tmp_path), TimeBudget())
    assert units_in(record_in(tmp_path)) == made_up and len(made_up) == 3


def test_nothing_of_a_class_that_is_computed_wrongly_is_reported(tmp_path: Path, cpu: Platform, spoil: Callable) -> None:
    spoil(lambda problem: problem.kernels == ((4, 4),) and problem.shape != EVEN.shape)
    record = record_in(tmp_path)
    with pytest.raises(BenchmarkError, match=r"wrong computes depthwise_sum of .* wrongly.*Nothing is timed"):
        measure_sweep(PLAN, cpu, record, TimeBudget())
    assert EVEN.kernel not in {(row.kernel_height, row.kernel_width) for row in record.rows}


def test_nothing_of_a_unit_that_is_computed_wrongly_is_reported(tmp_path: Path, cpu: Platform, spoil: Callable) -> None:
    spoil(lambda problem: problem.shape == TINY.shape)
    plan, record = dataclasses.replace(PLAN, cases=[TINY]), record_in(tmp_path)
    with pytest.raises(BenchmarkError, match="no times for"):
        measure_sweep(plan, cpu, record, TimeBudget())
    assert not record.rows


def test_other_types(tmp_path: Path, cpu: Platform) -> None:
    record = record_in(tmp_path)
    with ops.trace() as ran:
        measure_sweep(dataclasses.replace(PLAN, cases=[TINY], precision=BFLOAT16), cpu, record, TimeBudget())
    assert len(record.rows) == 6 and BFLOAT16.dtype in {problem.dtype for _, problem in ran.calls}


def rows_of(direction: str, platform: Platform, case: Case = TINY):
    plan = OperatorPlan([case], passes=[direction], seconds=1e-4, longest=1.0)
    return list(measure_operators(plan, platform, TimeBudget()))


def test_the_fastest_implementation_is_timed_under_two_names(cpu: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    def interleave(calls, first, *settings):
        assert len(calls) == 5 and len(set(calls.values())) == 4
        (name,) = (name for name in calls if name != "twin" and calls[name] is calls["twin"])
        assert first[name] == min(first.values())
        return dict.fromkeys(calls, Timing((4.0,))) | {name: Timing((2.0,)), "twin": Timing((1.5,))}

    monkeypatch.setattr(operators, "interleave", interleave)
    assert [row.twin_ratio for row in rows_of(FORWARD, cpu)] == [0.75, 0.75]


@pytest.mark.parametrize("direction", [FORWARD, WEIGHT_GRAD])
def test_a_slow_call_is_timed_on_fewer_images(direction: str, cpu: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def for_one_image(call_on, case, longest, stopwatch):
        call_on(1, case.channels)()
        called.append(case)
        return len(called)  # NCHW: one image, NHWC: both

    monkeypatch.setattr(operators, "affordable_images", for_one_image)
    timed = {}
    real = operators.interleave
    monkeypatch.setattr(operators, "interleave", lambda *arguments: timed.update(real(*arguments)) or timed)
    with ops.trace() as ran:
        rows = rows_of(direction, cpu)
    assert {row.torch_nchw_images for row in rows} == {1} and {row.torch_nhwc_images for row in rows} == {2}
    assert rows[0].torch_nchw_ms == pytest.approx(2e3 * timed["PyTorch NCHW"].median)
    assert rows[0].torch_nhwc_ms == pytest.approx(1e3 * timed["PyTorch NHWC"].median)
    assert {problem.shape[0] for _, problem in ran.calls} == {1, 2}, "ours is compared on the same image"
    assert rows[0].error < 1e-5


def test_a_call_that_is_too_slow_for_one_image_has_no_time(cpu: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "affordable_images", lambda *arguments: 0)
    for row in rows_of(FORWARD, cpu):
        assert math.isnan(row.torch_nchw_ms) and math.isnan(row.times_best) and row.ours_ms > 0
        assert row.torch_nchw_images == 0 and "PyTorch NHWC: a single image would take more than 3 s" in row.remark


def test_pytorch_loses_only_its_own_times(cpu: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    real = operators.implementations

    def wrong(*arguments):
        calls = real(*arguments)
        right = calls["PyTorch NHWC"]
        return calls | {"PyTorch NHWC": lambda: right() + 1}

    monkeypatch.setattr(operators, "implementations", wrong)
    for row in rows_of(FORWARD, cpu):
        assert math.isnan(row.torch_nhwc_ms) and row.times_best == pytest.approx(row.torch_nchw_ms / row.ours_ms)
        assert row.remark.startswith("PyTorch NHWC: differs from float64")


@pytest.mark.parametrize(
    ("per_image", "images"), [(0.001, 32), (0.1, 10), (0.9, 1), (2.5, 1), (MOST + 1, 0)], ids=lambda value: f"{value}"
)
def test_affordable_images(per_image: float, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "SURE_RATE", 0.0)
    scene, case = Scene(), Case("some", 32, 4096, 9, 9, (3, 3))

    def call_on(few: int, channels: int):
        return lambda: scene.run(f"{few} {channels}", per_image * few * channels / case.channels)

    assert affordable_images(call_on, case, 1.0, scene.stopwatch) == images
    assert set(scene.made) <= {f"1 {case.channels}", scene.made[0]} and scene.now < 1 + 3 * MOST
    assert (f"1 {case.channels}" in scene.made) == (images > 0)


def test_small_calls_need_no_trial() -> None:
    assert affordable_images(lambda *few: pytest.fail("a trial"), TINY, 1.0, Scene().stopwatch) == TINY.batch
