"""What a run shows: bars in terminals of any width, lines in log files, and results that are named by their metrics."""

import io
import math

import pytest
from rich.console import Console

from widekernel.cli.console import ConsoleReporter
from widekernel.cli.progress_text import duration, metric_texts, row_parts
from widekernel.engine.metrics import Metric
from widekernel.engine.reporter import RunLength

LENGTH = RunLength(steps=300 * 1251, steps_per_epoch=1251)
ROW = {"epoch": 300, "step": 375_000, "train_loss": 6.907, "lr": 4e-3, "data_seconds": 0.03, "step_seconds": 0.22,
       "images_per_second": 4096.4}  # fmt: skip
ACCURACY = (Metric("val_top1", "top-1", "%"), Metric("val_loss", "loss", larger_is_better=False, digits=4))
ERROR = (Metric("val_rmse", "RMSE", "mm", larger_is_better=False, digits=1), Metric("val_r2", "R²", digits=3))


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def make(width, terminal):
    page = Console(width=width, file=io.StringIO(), force_terminal=terminal, markup=False, emoji=False, highlight=False)
    clock = Clock()
    return ConsoleReporter(page, clock), page, clock


def lines_shown(reporter, width):
    page = Console(width=width, file=io.StringIO())
    for part in reporter._progress.get_renderables():
        page.print(part)
    return page.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_bars_fit_the_terminal(width):
    reporter, _, clock = make(width, terminal=True)
    with reporter:
        reporter.start_training(LENGTH, 374_000)
        reporter.step(374_001, {})
        clock.now += 999
        reporter.step(375_000, ROW)
        reporter.start_evaluation(390, "averaged weights")
        reporter.evaluated(350)
        training, evaluating, details, *more = lines_shown(reporter, width)
    assert more == [] and all(len(line) <= width for line in (training, evaluating, details))
    assert details.startswith("epoch 300/300  loss 6.907")
    if width >= 80:
        assert "…" not in training + evaluating + details
        assert "375000/375300" in training and "ETA 0:05:00" in training
        assert "350/390" in evaluating and "averaged weights" in evaluating
        assert details.rstrip() == "epoch 300/300  loss 6.907  lr 4.0e-03  4,096 images/s  data 12 %"


def test_bars_are_updated_a_few_times_a_second():
    reporter, _, clock = make(80, terminal=True)
    with reporter:
        reporter.start_training(LENGTH, 0)
        for step in range(1, 101):
            reporter.step(step, {})
            clock.now += 1 / 16
        assert reporter._progress.tasks[0].completed == 97
        reporter.step(101, ROW)
        assert reporter._progress.tasks[0].completed == 101


def test_a_log_file_gets_lines():
    reporter, page, clock = make(80, terminal=False)
    with reporter:
        reporter.message("Resuming")
        reporter.start_training(RunLength(40, 20), 0)
        for step in range(1, 21):
            reporter.step(step, {**ROW, "train_loss": 0.001 * step} if step % 2 == 0 else {})
            clock.now += 3
        reporter.start_evaluation(3, "weights")
        reporter.evaluated(3)
        reporter.evaluation(20, ACCURACY, {"val_top1": 9.5, "val_loss": 2.0}, is_best=True)
        reporter.evaluation(40, ACCURACY, {"val_top1": 81.25, "val_loss": 0.5, "ema_val_top1": 82, "ema_val_loss": 0.4})
    lines = page.file.getvalue().splitlines()
    rate = "lr 4.0e-03  4,096 images/s  data 12 %"
    assert lines == [
        "Resuming",
        f"step 2/40  epoch 1/2  loss 2.00e-03  {rate}  ETA 0:01:54",
        f"step 6/40  epoch 1/2  loss 6.00e-03  {rate}  ETA 0:01:42",
        f"step 10/40  epoch 1/2  loss 0.010  {rate}  ETA 0:01:30",
        f"step 14/40  epoch 1/2  loss 0.014  {rate}  ETA 0:01:18",
        f"step 18/40  epoch 1/2  loss 0.018  {rate}  ETA 0:01:06",
        "epoch 1/2  top-1 9.50 % (best so far)  loss 2.0000",
        "epoch 2/2  top-1 81.25 %  loss 0.5000  averaged weights: top-1 82.00 %  loss 0.4000",
    ]


def test_no_control_characters_in_a_pipe(capfd):
    with ConsoleReporter() as reporter:
        reporter.start_training(RunLength(4, 2), 0)
        for step in range(1, 5):
            reporter.step(step, {"train_loss": 1.0})
        reporter.start_evaluation(1, "weights")
    assert capfd.readouterr() == ("", "step 1/4  epoch 1/2  loss 1.000\n")


def test_metrics_name_themselves():
    values = {"val_rmse": 3.25, "val_r2": 0.5, "ema_val_rmse": math.nan, "ema_val_r2": 0.75}
    texts = metric_texts(ERROR, values, is_best=True)
    assert texts == {"weights": "RMSE 3.2 mm  R² 0.500", "averaged weights": "RMSE nan mm (best so far)  R² 0.750"}
    assert metric_texts(ERROR, {"val_rmse": 2}, is_best=True) == {"weights": "RMSE 2.0 mm (best so far)"}
    assert metric_texts(ERROR, {"ema_val_r2": 1}, is_best=True) == {"averaged weights": "R² 1.000"}


def test_evaluations_after_steps_are_aligned():
    reporter, page, _ = make(80, terminal=False)
    reporter.start_training(RunLength(1000, 300), 0)
    for step, value in ((100, 12.25), (200, 3.5), (300, 100)):
        reporter.evaluation(step, ERROR, {"val_rmse": value})
    assert page.file.getvalue().splitlines() == [
        "step  100  RMSE 12.2 mm", "step  200  RMSE  3.5 mm", "epoch 1/4  RMSE 100.0 mm"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "parts"),
    [({}, ["epoch 1/300"]),
     ({"train_loss": math.nan, "train_loss_a": 0.5, "train_loss_b": 0.0},
      ["epoch 1/300", "loss nan", "losses: a 0.500, b 0.000"]),
     ({"images_per_second": 0.25, "data_seconds": 0, "step_seconds": 4}, ["epoch 1/300", "0.25 images/s", "data 0 %"])],
)  # fmt: skip
def test_rows(row, parts):
    assert row_parts(LENGTH, 1, row) == parts


def test_durations():
    assert [duration(seconds) for seconds in (0, 59.6, 3661, 360_000)] == ["0:00:00", "0:01:00", "1:01:01", "100:00:00"]
