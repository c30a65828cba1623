"""The engine trains a task that shares nothing with classification, and says nothing of images."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console
from tests import pictures
from tests.engine.sequences import FindEnds, make_track_trainer
from tests.engine.test_resume import KillAt, Killed
from tests.engine.tiny import states_equal, without_timings

from widekernel.cli.console import ConsoleReporter
from widekernel.engine import Trainer
from widekernel.engine.error_context import TrainingError
from widekernel.engine.metrics_log import read_metrics


def rows_of(trainer: Trainer) -> list[dict]:
    return without_timings(read_metrics(trainer.context.folder.metrics))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, str]:
    """Return the trainer of an undisturbed run, and what the console showed."""
    text = io.StringIO()
    with ConsoleReporter(Console(file=text, width=200), clock=iter(range(0, 10**6, 20)).__next__) as reporter:
        trainer = make_track_trainer(tmp_path_factory.mktemp("tracks"), reporter=reporter, damaged=(7,))
        with pictures.drawn():
            trainer.run()
    return trainer, text.getvalue()


def test_it_learns_and_keeps_the_state_with_the_lowest_error(reference: tuple[Trainer, str]) -> None:
    trainer, _ = reference
    rows = rows_of(trainer)
    assert (trainer.length.steps, trainer.length.steps_per_epoch, trainer.length.epochs) == (20, 7, 3)
    assert [row["step"] for row in rows] == [4, 5, 8, 10, 12, 15, 16, 20]
    evaluations = {row["step"]: row["ema_val_distance"] for row in rows if "val_distance" in row}
    assert list(evaluations) == [5, 10, 15, 20]
    assert evaluations[20] < 0.7 * evaluations[5]
    assert trainer.progress.best == min(evaluations.values())
    assert evaluations[trainer.progress.best_step] == trainer.progress.best
    assert trainer.store.load_step(trainer.progress.best_step)["progress"]["step"] == trainer.progress.best_step
    assert {row["val_tracks"] for row in rows if "val_tracks" in row} == {11}
    for row in rows:
        assert row["train_loss"] == pytest.approx(row["train_loss_distance"] + row["train_loss_size"])
    assert trainer.context.folder.curves.stat().st_size > 1000


def test_what_the_user_sees_speaks_of_tracks(reference: tuple[Trainer, str]) -> None:
    _, shown = reference
    assert "Skipped an unreadable track: track 7: the recorder failed" in shown
    assert "median distance" in shown and " m" in shown and "(best so far)" in shown
    assert "step 10" in shown and "step  5" in shown  # no epoch ends there
    assert "losses: distance" in shown
    assert "image" not in shown.replace("images/s", "") and "top-1" not in shown


def test_errors_speak_of_tracks(tmp_path: Path) -> None:
    trainer = make_track_trainer(tmp_path, damaged=tuple(range(0, 60, 2)), max_unreadable=3)
    with pytest.raises(TrainingError, match=r"4 training tracks cannot be read.*track"):
        trainer.run()


@pytest.mark.parametrize("step", [1, 7, 15, *(pytest.param(step, marks=pytest.mark.slow) for step in (6, 13))])
def test_it_resumes_exactly(step: int, reference: tuple[Trainer, str], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        make_track_trainer(tmp_path, reporter=KillAt(step), damaged=(7,)).run()
    resumed = make_track_trainer(tmp_path, damaged=(7,))
    resumed.run()
    assert states_equal(resumed.state(), reference[0].state())
    assert rows_of(resumed) == rows_of(reference[0])


def test_a_metric_that_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    # Each evaluation measures the weights, and then their average: the fourth number is that of the average at step 10.
    trainer = make_track_trainer(tmp_path, task=FindEnds(broken_evaluations=(2, 8)))
    trainer.run()
    values = {row["step"]: row["ema_val_distance"] for row in rows_of(trainer) if "ema_val_distance" in row}
    assert [step for step, value in values.items() if math.isnan(value)] == [5, 20]
    assert trainer.progress.best == min(values[10], values[15])
    assert trainer.progress.best_step in (10, 15)
