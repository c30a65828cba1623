"""Disks that are full, read-only, defective or gone, and what is left on them.

python -m pytest -m "slow or not slow" -s -n 0 tests/faults/test_disk_faults.py
"""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from widekernel.engine import state_file
from widekernel.engine.checkpoint import CheckpointStore
from widekernel.engine.metrics_log import MetricsLog, read_metrics
from widekernel.engine.write_policy import WritePolicy
from widekernel.errors import CheckpointError, WidekernelError
from widekernel.files import write_file

Fault = Callable[[pytest.MonkeyPatch, Path], Any]


def state(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((100_000,), float(step))}}


def failing(operation: Callable[..., Any], number: int, after: int = 0) -> Callable[..., Any]:
    """Return the operation, which fails with this error from call `after` on."""
    calls = []

    def patched(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        return operation(*arguments, **options)

    return patched


class Disk:
    """A device with room for a number of bytes, on which a write may store a part of what it is given."""

    def __init__(self, room: int) -> None:
        self.room = room

    def install(self, patch: pytest.MonkeyPatch) -> None:
        disk, open_file = self, Path.open

        class File:
            def __init__(self, file: Any) -> None:
                self.file = file

            def __enter__(self) -> File:
                return self

            def __exit__(self, *_: object) -> None:
                self.file.close()

            def write(self, data: Any) -> int:
                if not disk.room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written = self.file.write(memoryview(data).cast("B")[: disk.room])
                disk.room -= written
                return int(written)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

        def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            file = open_file(path, mode, *arguments, **options)
            return File(file) if mode in ("wb", "ab") and options.get("buffering") == 0 else file

        patch.setattr(Path, "open", opened)


def full(patch: pytest.MonkeyPatch, folder: Path) -> None:
    Disk(150_000).install(patch)


def over_quota(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(state_file._DigestingFile, "write", failing(state_file._DigestingFile.write, errno.EDQUOT, after=20))


def defective(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(os, "fsync", failing(os.fsync, errno.EIO))


def defective_for_the_digest(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(os, "fsync", failing(os.fsync, errno.EIO, after=1))


def defective_to_read(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(state_file, "sha256_of", failing(state_file.sha256_of, errno.EIO))


def read_only(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(Path, "touch", failing(Path.touch, errno.EROFS))


def without_permission(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(Path, "replace", failing(Path.replace, errno.EACCES))


def stale(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(Path, "iterdir", failing(Path.iterdir, errno.ESTALE))


FAULTS: dict[str, tuple[Fault, str]] = {
    "full": (full, "No space left on device. Free some space"),
    "quota": (over_quota, "Disk quota exceeded. Free some space"),
    "fsync": (defective, "Input/output error. Check the disk"),
    "fsync of the digest": (defective_for_the_digest, "Input/output error. Check the disk"),
    "reading back": (defective_to_read, "Input/output error. Check the disk"),
    "read-only": (read_only, "Read-only file system. Make the folder writable"),
    "permission": (without_permission, "Permission denied. Make the folder writable"),
    "stale": (stale, "Stale file handle. Restore the folder"),
}


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest) -> tuple[Fault, str]:
    return FAULTS[request.param]


def test_an_error_names_the_reason_and_earlier_states_are_intact(
    fault: tuple[Fault, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (1, 2):
        assert store.save_now(state(step), step, None)
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    with monkeypatch.context() as patch:
        fault[0](patch, store.folder)
        with pytest.raises(CheckpointError, match=fault[1]) as caught:
            store.save_now(state(3), 3, None)
    assert "after step 3 cannot be written" in str(caught.value) and "Traceback" not in str(caught.value)
    after = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    assert {name: after.get(name) for name in before} == before
    # A digest without a state may be left, because it is written first; a part of a state may not.
    assert set(after) - set(before) <= {"step-00000003.pt.sha256"}
    assert CheckpointStore(store.folder).load_latest()["header"]["step"] == 2
    assert store.save_now(state(4), 4, None) and len(list(store.folder.iterdir())) == 4


def train(store: CheckpointStore, log: MetricsLog, policy: WritePolicy, steps: range, curves: Path) -> None:
    """Write what a training loop writes after each step."""
    for step in steps:
        with policy.attempt("metrics.jsonl"):
            log.append({"step": step, "train_loss": 1.0 / step})
        with policy.attempt("metrics.jsonl"):
            log.sync()
        store.save(state(step) | {"metrics_rows": log.rows}, step, None)
    with policy.attempt("curves.png"):
        write_file(curves, b"picture")
    store.wait()


@pytest.mark.parametrize("name", ["full", "fsync of the digest", "read-only"])
def test_by_policy_training_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    messages: list[str] = []
    policy = WritePolicy("continue", 5, messages.append)
    store = CheckpointStore(tmp_path / "checkpoints", policy=policy)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate(0)
    train(store, log, policy, range(1, 4), tmp_path / "curves.png")
    assert messages == []
    with monkeypatch.context() as patch:
        fault[0](patch, store.folder)
        train(store, log, policy, range(4, 7), tmp_path / "curves.png")
    assert [text for text in messages if fault[1] in text and "training state after step 4" in text]
    assert sum("The training state" in text for text in messages) == 3
    assert CheckpointStore(store.folder).load_latest(resume=True)["header"]["step"] == 3
    train(store, log, policy, range(7, 9), tmp_path / "curves.png")
    assert CheckpointStore(store.folder).load_latest(resume=True)["metrics_rows"] == 8
    assert [row["step"] for row in read_metrics(log.path)] == list(range(1, 9))


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False).returncode
    except FileNotFoundError:
        done = 1
    if done:
        pytest.skip("this user cannot mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_small_file_system(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "2m"):
        store = CheckpointStore(tmp_path / "disk" / "checkpoints")
        for step in (1, 2):
            assert store.save_now(state(step), step, None)
        rest = tmp_path / "disk" / "rest"
        rest.write_bytes(bytes(1_000_000))
        with pytest.raises(CheckpointError, match="No space left on device"):
            store.save_now(state(3), 3, None)
        assert CheckpointStore(store.folder).load_latest()["header"]["step"] == 2
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        with pytest.raises(CheckpointError, match="Read-only file system"):
            store.save_now(state(3), 3, None)
        assert CheckpointStore(store.folder).load_latest()["header"]["step"] == 2
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path / "disk")], check=True)
        rest.unlink()
        assert store.save_now(state(4), 4, None)


def test_states_that_cannot_be_removed_do_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    store = CheckpointStore(tmp_path / "checkpoints", report=messages.append)
    for step in (1, 2):
        assert store.save_now(state(step), step, None)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing(Path.unlink, errno.EACCES))
        assert store.save_now(state(3), 3, None)
    assert len(store.paths()) == 3 and len(messages) == 1
    assert "Older training states in" in messages[0] and "cannot be removed: Permission denied" in messages[0]
    assert store.save_now(state(4), 4, None) and len(store.paths()) == 2 and len(messages) == 1


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    store = CheckpointStore(run / "checkpoints", policy=WritePolicy("continue", 3))
    log = MetricsLog(run / "metrics.jsonl")
    log.append({"step": 1})
    assert store.save_now(state(1), 1, None)
    shutil.rmtree(store.folder)
    assert store.save_now(state(2), 2, None)  # only the folder of the states vanished
    shutil.rmtree(run)
    assert [store.save_now(state(step), step, None) for step in (3, 4)] == [False, False]
    with pytest.raises(WidekernelError, match="could not be written 3 times in a row"):
        store.save_now(state(5), 5, None)
    with pytest.raises(WidekernelError, match="No such file or directory"):
        log.append({"step": 5})
    run.mkdir()
    with pytest.raises(WidekernelError, match=r"has 0 bytes, but 12 were written: the file was changed or removed"):
        log.append({"step": 5})


def test_rows_that_could_not_be_written_come_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    with monkeypatch.context() as patch:
        Disk(7).install(patch)
        for step in (2, 3):
            with pytest.raises(WidekernelError, match=r"metrics\.jsonl cannot be written: No space left on device"):
                log.append({"step": step})
        with pytest.raises(WidekernelError, match="No space left"):
            log.sync()
        assert log.rows == 1 and log.path.read_bytes() == b'{"step": 1}\n'  # without the part that was written
    log.append({"step": 4})
    assert log.rows == 4 and [row["step"] for row in read_metrics(log.path)] == [1, 2, 3, 4]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_200_saves_leak_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    model = {"model": {f"w{number}": torch.randn(1_000_000) for number in range(4)}}
    memory = []
    for step in range(200):
        store.save(model, step, None)
        if step in (20, 199):
            assert store.wait()
            gc.collect()
            memory.append((resident(), len(list(Path("/proc/self/fd").iterdir())), threading.active_count()))
    (first, descriptors, threads), (last, *rest) = memory
    print(f"\n180 saves of 16 MB: {(last - first) / 1e6:+.1f} MB, {rest[0] - descriptors:+d} file descriptors")
    assert rest == [descriptors, threads]
    assert last - first < 5e6
    assert len(list(store.folder.iterdir())) == 4
