"""A process that is killed while it saves a training state.

    python -m pytest -m "slow or not slow" -s -n 0 tests/faults/test_kills_in_save.py

prints how many of the kills left a state that cannot be read or lost more than one interval.

Each kill happens in a forked process, before one of the operations that change files, or in the middle of a write.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from widekernel.engine import state_file
from widekernel.engine.checkpoint import CheckpointStore

INTERVAL, LIMIT = 8, 60


def state(step: int, again: bool = False) -> dict[str, Any]:
    value = step + 0.5 * again
    return {"model": {f"layer.{number}": torch.full((700,), value) for number in range(4)}, "progress": {"step": step}}


def is_exact(found: dict[str, Any]) -> bool:
    """Return whether a state is one of those that were saved for its step, and not a mixture."""
    wanted = [state(found["header"]["step"], again)["model"] for again in (False, True)]
    return any(all(torch.equal(found["model"][name], value) for name, value in model.items()) for model in wanted)


class KillSwitch:
    """Kills this process with SIGKILL at the operation with the given number; without one, counts the operations."""

    def __init__(self, number: int | None) -> None:
        self.number = number
        self.kinds: list[str] = []

    def point(self, kind: str) -> bool:
        """Note an operation, and return whether it is the one at which to die."""
        self.kinds.append(kind)
        return len(self.kinds) - 1 == self.number

    def before(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def patched(*arguments: Any, **options: Any) -> Any:
            if self.point(operation.__name__):
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **options)

        return patched

    def within(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def patched(file: Any, data: Any) -> Any:
            if self.point("write"):
                file._raw.write(memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(file, data)

        return patched

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("touch", "chmod", "replace", "unlink", "mkdir"):
            patch.setattr(Path, name, self.before(getattr(Path, name)))
        patch.setattr(os, "fsync", self.before(os.fsync))
        write = state_file._DigestingFile.write
        patch.setattr(state_file._DigestingFile, "write", self.within(self.before(write)))


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process and return its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return wait_for(child)


def wait_for(child: int) -> int:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError("the process that saves hangs")


def save_next(folder: Path, resumed_step: int, step: int) -> CheckpointStore:
    store = CheckpointStore(folder)
    found = store.load_latest(resume=True)
    assert found is not None and found["header"]["step"] == resumed_step
    assert store.save_now(state(step, again=step == resumed_step), step, best_step=8)
    return store


class Situation:
    """States on disk, and the next save.

    Args:
        folder: a new folder
        damaged: whether the newest state is damaged, so that it is renamed by the next save
        again: whether the next save replaces the newest state
    """

    def __init__(self, folder: Path, damaged: bool = False, again: bool = False) -> None:
        folder.mkdir()
        self.folder, self.former = folder / "checkpoints", 24
        store = CheckpointStore(self.folder)
        for step in (8, 16, 24):
            assert store.save_now(state(step), step, best_step=8)
        self.next = 24 if again else 32
        if damaged:
            (self.folder / "step-00000024.pt").write_bytes(b"damaged")
            self.former = 16

    def save(self, folder: Path) -> None:
        save_next(folder, self.former, self.next)

    def operations(self, copy: Path) -> list[str]:
        """Return the operations of the next save in order."""
        shutil.copytree(self.folder, copy)
        switch = KillSwitch(None)
        with pytest.MonkeyPatch.context() as patch:
            switch.install(patch)
            self.save(copy)
        shutil.rmtree(copy)
        return switch.kinds

    def survives(self, copy: Path, die: Callable[[Callable[[], object]], int]) -> bool:
        """Return whether a kill leaves a readable newest state that is at most one interval old, and all goes on."""
        shutil.copytree(self.folder, copy)
        code = die(lambda: self.save(copy))
        assert code in (0, -signal.SIGKILL), code
        found = CheckpointStore(copy).load_latest(resume=True)
        assert found is not None
        step = found["header"]["step"]
        recent = step in (self.former, self.next)
        best = CheckpointStore(copy).load_step(8)["header"]["step"] == 8
        store = save_next(copy, step, 40)
        clean = not list(copy.glob("*.tmp.*")) and store.load_latest()["header"]["step"] == 40
        shutil.rmtree(copy)
        return is_exact(found) and recent and best and clean


SITUATIONS = {"usual": {}, "the newest is damaged": {"damaged": True}, "the newest is replaced": {"again": True}}


def killed_at(number: int) -> Callable[[Callable[[], object]], int]:
    def die(save: Callable[[], object]) -> int:
        def work() -> None:
            with pytest.MonkeyPatch.context() as patch:
                KillSwitch(number).install(patch)
                save()

        code = in_child(work)
        assert code == -signal.SIGKILL, f"operation {number} was not reached"
        return code

    return die


def killed_after(seconds: float) -> Callable[[Callable[[], object]], int]:
    def die(save: Callable[[], object]) -> int:
        child = os.fork()
        if child == 0:
            try:
                save()
            finally:
                os._exit(0)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        return wait_for(child)

    return die


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_kill_at_each_operation(situation: str, every: int, tmp_path: Path) -> None:
    case = Situation(tmp_path / "start", **SITUATIONS[situation])
    operations = case.operations(tmp_path / "count")
    assert len(operations) >= 50 and {"write", "fsync", "replace"} <= set(operations)
    # The short form has few kills within writes, and all those between operations on whole files for one situation only.
    points = [
        number
        for number, kind in enumerate(operations)
        if number % every == 0 or (situation == "the newest is replaced" and kind != "write")
    ]
    bad = [number for number in points if not case.survives(tmp_path / str(number), killed_at(number))]
    print(f"\n{situation}: {len(bad)} of {len(points)} kills within a save did harm")
    assert bad == []


@pytest.mark.slow
def test_kill_at_random_times(tmp_path: Path) -> None:
    case = Situation(tmp_path / "start")
    shutil.copytree(case.folder, tmp_path / "timed")
    start = time.perf_counter()
    assert in_child(lambda: case.save(tmp_path / "timed")) == 0
    longest = 1.2 * (time.perf_counter() - start)
    draw = random.Random(0)
    bad = sum(not case.survives(tmp_path / str(n), killed_after(draw.uniform(0, longest))) for n in range(200))
    print(f"\n{bad} of 200 kills at random times did harm")
    assert bad == 0
