"""Loading processes that die, hang or fail: an error that names the image, or a restart at the exact batch."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.data.test_sources import GOOD, fill

from widekernel.data import (
    BatchPlan,
    DataConfig,
    EvaluationLoader,
    EvaluationSamples,
    LoaderError,
    LoaderOptions,
    Shard,
    TrainingLoader,
    TrainingSamples,
    open_split,
)
from widekernel.errors import ConfigError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

BAD = 13


def exhaust_memory() -> None:
    raise MemoryError


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"),
    "segmentation fault": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "was killed by SIGSEGV"),
    "exits": (lambda: os._exit(0), "ended with exit code 0"),
    "hangs": (lambda: time.sleep(1000), r"has not finished for \d seconds \(data.timeout is 0.5\)"),
    "stopped": (stop_itself, r"has not finished for \d seconds \(data.timeout is 0.5\)"),
}


class Faulty:
    """A source of numbers, one of which brings down the process that loads it, as often as there are marks in a folder."""

    def __init__(self, fault, marks: Path, times: int) -> None:
        self.fault, self.marks = fault, marks
        for number in range(times):
            (marks / str(number)).touch()

    def __len__(self) -> int:
        return 24

    def load(self, index: int) -> float:
        left = sorted(self.marks.iterdir()) if index == BAD else []
        if left:
            left[0].unlink()
            self.fault()
        return float(index)

    def sample_name(self, index: int) -> str:
        return f"class/{index}.png"


def same(item: float) -> float:
    return item


def noisy(item: float) -> torch.Tensor:
    return item + torch.rand(2)


def loader(kind: str, source, options: LoaderOptions):
    """Return a function that yields the batches of one epoch, by training or by evaluation."""
    if kind == "training":
        training = TrainingLoader(TrainingSamples(source, noisy, 2), options, BatchPlan(6, 3))
        return lambda: training.epoch(1, skip_steps=1)
    return EvaluationLoader(EvaluationSamples(source, same), 3, options, Shard()).__iter__


@pytest.mark.parametrize(
    ("kind", "name"), [("training", "killed"), ("training", "hangs"), *(("evaluation", name) for name in FAULTS)]
)
def test_a_worker_that_dies_or_hangs_is_reported_with_its_image(kind: str, name: str, tmp_path: Path) -> None:
    fault, words = FAULTS[name]
    batches = loader(kind, Faulty(fault, tmp_path, 1), LoaderOptions(2, timeout=0.5))
    began = time.monotonic()
    with pytest.raises(LoaderError, match=rf"^Loading process \d \(number \d+\), which was loading class/13\.png, {words}"):
        list(batches())
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("kind", "name"), [("training", "killed"), ("evaluation", "killed"), ("training", "stopped")])
def test_after_a_restart_the_batches_are_the_same(kind: str, name: str, tmp_path: Path) -> None:
    undisturbed = list(loader(kind, Faulty(None, tmp_path, 0), LoaderOptions())())
    messages: list[str] = []
    options = LoaderOptions(2, timeout=0.5, restarts=2, notify=messages.append)
    batches = loader(kind, Faulty(FAULTS[name][0], tmp_path, 2), options)
    assert all(torch.equal(*pair) for pair in zip(contents(batches()), map(content, undisturbed), strict=True))
    assert [re.findall(r"class/\d+\.png|restart . of .", message) for message in messages] == [
        ["class/13.png", "restart 1 of 2"],
        ["class/13.png", "restart 2 of 2"],
    ]
    assert all(torch.equal(*pair) for pair in zip(contents(batches()), map(content, undisturbed), strict=True))


def content(batch) -> torch.Tensor:
    return batch.content


def contents(batches):
    return map(content, batches)


def test_the_number_of_restarts_is_bounded(tmp_path: Path) -> None:
    messages: list[str] = []
    options = LoaderOptions(1, timeout=0.5, restarts=1, notify=messages.append)
    batches = loader("evaluation", Faulty(FAULTS["killed"][0], tmp_path, 9), options)
    with pytest.raises(LoaderError, match=r"class/13\.png.* 1 restart\(s\) did not help"):
        list(batches())
    assert len(messages) == 1 and len(list(tmp_path.iterdir())) == 7


@pytest.mark.parametrize("workers", [0, 1])
def test_running_out_of_memory_names_the_image(workers: int, tmp_path: Path) -> None:
    batches = loader("evaluation", Faulty(exhaust_memory, tmp_path, 1), LoaderOptions(workers))
    place = "a loading process" if workers else "the training process"
    with pytest.raises(
        LoaderError, match=rf"^Loading class/13\.png failed in {place} \(MemoryError\)\. .* lower data"
    ) as info:
        list(batches())
    assert "in exhaust_memory" in str(info.value.__cause__)


def test_errors_of_transforms_name_the_image_and_show_their_place(tmp_path: Path) -> None:
    def broken(item):
        return item / 0 if item == BAD else item

    batches = EvaluationLoader(EvaluationSamples(Faulty(None, tmp_path, 0), broken), 3, LoaderOptions(1), Shard())
    with pytest.raises(LoaderError, match=r"class/13\.png failed .*ZeroDivisionError: ") as info:
        list(batches)
    assert "in broken" in str(info.value.__cause__)


def test_items_that_do_not_fit_together_are_reported(tmp_path: Path) -> None:
    def growing(item):
        return torch.zeros(int(item))

    batches = EvaluationLoader(EvaluationSamples(Faulty(None, tmp_path, 0), growing), 3, LoaderOptions(), Shard())
    with pytest.raises(LoaderError, match=r"^Loading a batch of 3 failed in the training process \(RuntimeError: stack"):
        list(batches)


class Slow(Faulty):
    def load(self, index: int) -> float:
        time.sleep(0.2)
        return float(index)


def test_slow_images_are_no_hang_and_an_epoch_may_be_left(tmp_path: Path) -> None:
    batches = loader("evaluation", Slow(None, tmp_path, 0), LoaderOptions(2, timeout=0.4))
    first = next(batches())  # a batch takes 0.6 s, an image 0.2 s
    assert first.content.tolist() == [0, 1, 2]
    assert next(batches()).content.tolist() == [0, 1, 2]  # while the workers still load what was left


def test_a_worker_that_dies_between_two_batches_does_not_interrupt_the_training(tmp_path: Path) -> None:
    before = set(torch.multiprocessing.active_children())
    batches = loader("evaluation", Faulty(None, tmp_path, 0), LoaderOptions(1, timeout=0.5, restarts=1))
    iterator = batches()
    assert next(iterator).content.tolist() == [0, 1, 2]
    (worker,) = set(torch.multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(5)  # PyTorch's handler would raise an error in this process about here
    for _ in range(1000):
        torch.ones(10).sum()
    assert [value for batch in iterator for value in batch.content.tolist()] == list(range(3, 24))


def test_settings(tmp_path: Path) -> None:
    options = LoaderOptions.configured(DataConfig(workers=3, timeout=7.0, worker_restarts=5), pin_memory=True)
    assert (options.workers, options.pin_memory, options.timeout, options.restarts) == (3, True, 7.0, 5)
    for changes, key in (({"timeout": 0.0}, r"data\.timeout"), ({"worker_restarts": -1}, r"data\.worker_restarts")):
        with pytest.raises(ConfigError, match=f"{key} is .* must be"):
            DataConfig(**changes)
    assert len(open_split(fill(tmp_path, GOOD), "train")) == 5


def test_no_process_is_left_behind(tmp_path: Path) -> None:
    before = set(torch.multiprocessing.active_children())
    batches = loader("evaluation", Faulty(None, tmp_path, 0), LoaderOptions(2))
    next(batches())
    assert len(set(torch.multiprocessing.active_children()) - before) == 2
    del batches
    gc.collect()
    assert not set(torch.multiprocessing.active_children()) - before
