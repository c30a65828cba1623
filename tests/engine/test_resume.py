"""A run that is interrupted and resumed equals the uninterrupted run bit for bit."""

import os
import signal

import pytest
import torch
from tests.engine.tiny import array_source, make_config, make_trainer, states_equal, without_timings

from widekernel.engine import CheckpointConfig, Processes
from widekernel.engine.interrupts import Interrupted
from widekernel.engine.metrics_log import read_metrics
from widekernel.errors import CheckpointError


class Killed(BaseException):
    """Simulates the death of the process: nothing may catch it."""


class KillAt:
    """Reporter that ends training at a given step, by an exception or a signal."""

    def __init__(self, step: int, signal_number: int | None = None) -> None:
        self.at, self.signal_number, self.messages = step, signal_number, []

    def message(self, text):
        self.messages.append(text)

    def step(self, step, figures):
        if step == self.at:
            if self.signal_number is None:
                raise Killed
            os.kill(os.getpid(), self.signal_number)

    def start_training(self, *_): ...

    def start_evaluation(self, *_): ...

    def evaluated(self, *_): ...

    def evaluation(self, *_): ...


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Return the final state and metrics of an uninterrupted run: 9 steps, 3 per epoch, one batch left over in each."""
    trainer = make_trainer(make_config(tmp_path_factory.mktemp("reference")))
    trainer.run()
    assert trainer.progress.step == 9
    return trainer.state(), without_timings(read_metrics(trainer.context.folder.metrics))


@pytest.mark.parametrize("step", [1, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 8)), 3, 4, 9])
def test_killed_run_resumes_exactly(step, reference, tmp_path):
    config = make_config(tmp_path, checkpoint=CheckpointConfig(every_steps=2))
    with pytest.raises(Killed):
        make_trainer(config, reporter=KillAt(step)).run()
    resumed = make_trainer(config)
    resumed.run()
    state, rows = reference
    assert states_equal(resumed.state(), state)
    assert without_timings(read_metrics(resumed.context.folder.metrics)) == rows


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_resumes_exactly(number, reference, tmp_path):
    former = signal.getsignal(number)
    config = make_config(tmp_path)
    with pytest.raises(Interrupted) as caught:
        make_trainer(config, reporter=KillAt(5, number)).run()
    assert caught.value.signal_number == number
    assert signal.getsignal(number) is former
    resumed = make_trainer(config)
    assert resumed.store.load_latest()["progress"]["step"] == 5
    resumed.run()
    assert states_equal(resumed.state(), reference[0])


def test_interrupt_during_evaluation_resumes_with_the_evaluation(reference, tmp_path):
    config = make_config(tmp_path)
    trainer = make_trainer(config)
    evaluator, calls = trainer.task.evaluator, []

    def interrupted_evaluator():
        calls.append(trainer.progress.step)
        if len(calls) == 3:  # the weights after epoch 2
            os.kill(os.getpid(), signal.SIGINT)
        return evaluator()

    trainer.task.evaluator = interrupted_evaluator
    with pytest.raises(Interrupted):
        trainer.run()
    resumed = make_trainer(config)
    resumed.run()
    assert states_equal(resumed.state(), reference[0])
    assert without_timings(read_metrics(resumed.context.folder.metrics)) == reference[1]


def test_a_signal_to_another_process_is_reported_as_sigterm(tmp_path):
    class Together(Processes):
        def vote(self, flag):
            return lambda: True

    trainer = make_trainer(make_config(tmp_path))
    object.__setattr__(trainer.context, "processes", Together())
    with pytest.raises(Interrupted) as caught:
        trainer.run()
    assert caught.value.signal_number == signal.SIGTERM
    assert trainer.store.load_latest()["progress"]["step"] == 1


def test_worker_count_does_not_matter(reference, tmp_path):
    trainer = make_trainer(make_config(tmp_path), workers=2)
    trainer.run()
    assert states_equal(trainer.state(), reference[0])


def test_another_seed_gives_another_run(reference, tmp_path):
    config = make_config(tmp_path)
    object.__setattr__(config, "seed", 6)
    trainer = make_trainer(config)
    trainer.run()
    assert not states_equal(trainer.state()["model"], reference[0]["model"])


def test_damaged_latest_state_falls_back_and_says_so(reference, tmp_path):
    config = make_config(tmp_path)
    with pytest.raises(Killed):
        make_trainer(config, reporter=KillAt(7)).run()
    reporter = KillAt(-1)
    resumed = make_trainer(config, reporter=reporter)
    latest = resumed.store.paths()[-1]
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    latest.write_bytes(content)
    resumed.run()
    assert any("damaged" in text and latest.name in text for text in reporter.messages)
    assert states_equal(resumed.state(), reference[0])
    assert without_timings(read_metrics(resumed.context.folder.metrics)) == reference[1]


def test_changed_data_is_refused(tmp_path):
    config = make_config(tmp_path)
    with pytest.raises(Killed):
        make_trainer(config, reporter=KillAt(4)).run()
    with pytest.raises(CheckpointError, match="images was 42 and is 48"):
        make_trainer(config, source=array_source(48)).run()


def test_the_latest_states_and_the_best_can_be_loaded(tmp_path):
    trainer = make_trainer(make_config(tmp_path))
    trainer.run()
    names = {path.name for path in trainer.store.folder.iterdir()}
    kept = {6, 9, trainer.progress.best_step}
    assert names == {f"step-{step:08d}.pt{end}" for step in kept for end in ("", ".sha256")}
    for path in trainer.store.paths():
        torch.load(path, weights_only=True)
