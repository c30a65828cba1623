import os
import pickle
import random
from contextlib import contextmanager

import pytest
import torch

from widekernel.engine.checkpoint import CheckpointStore, load_state
from widekernel.errors import CheckpointError
from widekernel.files import sha256_of


def saved(store, state, step, best_step=None):
    """Save a state, wait for it, and return its path."""
    assert store.save_now(state, step, best_step)
    return store.folder / f"step-{step:08d}.pt"


def small_state(value: float = 1.0):
    return {"model": {"w": torch.full((300,), value)}}


class PowerCut(BaseException):
    """Simulates a power failure: nothing may catch it."""


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


def test_the_last_two_states_and_the_best_are_kept(store):
    for step in (1, 2, 3, 4, 10):
        saved(store, small_state(step), step, best_step=2)
    assert [path.name for path in store.paths()] == [f"step-{step:08d}.pt" for step in (2, 4, 10)]
    assert store.load_latest()["model"]["w"][0] == 10
    assert store.load_step(2)["model"]["w"][0] == 2


def test_empty_folder_has_no_state(store):
    assert store.load_latest() is None


def test_every_single_bit_flip_is_noticed(store):
    path = saved(store, small_state(), 1)
    content = path.read_bytes()
    generator = random.Random(0)
    for _ in range(100):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="digest"):
            load_state(path)
    path.write_bytes(content)
    load_state(path)


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_truncation_is_noticed(store, share):
    path = saved(store, small_state(), 1)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError):
        load_state(path)


def test_if_all_states_are_damaged_the_run_does_not_start_again(store):
    for step in (1, 2):
        saved(store, small_state(), step).write_bytes(b"")
    with pytest.raises(CheckpointError, match="None of the 2 training states"):
        store.load_latest()


def test_a_state_without_digest_is_not_used(store):
    saved(store, small_state(1), 1)
    path = saved(store, small_state(2), 2)
    path.with_name(f"{path.name}.sha256").unlink()
    assert store.load_latest()["model"]["w"][0] == 1


def test_a_crash_while_replacing_a_state_leaves_the_old_one_usable(store, monkeypatch):
    path = saved(store, small_state(1), 1)
    replace = type(path).replace

    def crash(self, target):
        if target.suffix == ".pt":
            raise PowerCut
        return replace(self, target)

    monkeypatch.setattr(type(path), "replace", crash)
    with pytest.raises(PowerCut):
        saved(store, small_state(2), 1)
    assert store.load_latest()["model"]["w"][0] == 1


def test_disk_error_is_explained_and_leaves_earlier_states(store, monkeypatch):
    saved(store, small_state(1), 1)

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        saved(store, small_state(2), 2)
    monkeypatch.undo()
    assert store.load_latest()["model"]["w"][0] == 1
    assert not list(store.folder.glob("*.tmp.*"))


@contextmanager
def file_size_limit(size):
    resource = pytest.importorskip("resource")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_write_that_fails_within_torch_is_explained(store):
    saved(store, small_state(1), 1)
    with file_size_limit(1 << 20), pytest.raises(CheckpointError, match="File too large"):
        saved(store, {"model": {"w": torch.zeros(1 << 20)}}, 2)
    assert store.load_latest()["model"]["w"][0] == 1
    assert not list(store.folder.glob("*.tmp.*"))


@pytest.mark.parametrize("step", [42, 50, 55, 70])
def test_damaged_states_do_not_push_out_good_ones(store, step):
    saved(store, small_state(40), 40)
    digest = store.folder / "step-00000040.pt.sha256"
    for damaged in (50, 60):
        (store.folder / f"step-{damaged:08d}.pt").write_bytes(b"damaged")
        (store.folder / f"step-{damaged:08d}.pt.sha256").write_bytes(digest.read_bytes())
    resumed = CheckpointStore(store.folder)
    assert resumed.load_latest()["model"]["w"][0] == 40
    saved(resumed, small_state(step), step)
    assert [path.name for path in resumed.paths()] == ["step-00000040.pt", f"step-{step:08d}.pt"]
    assert CheckpointStore(store.folder).load_latest()["model"]["w"][0] == step
    assert {path.name for path in store.folder.glob("*.pt.damaged")} == {
        "step-00000050.pt.damaged",
        "step-00000060.pt.damaged",
    }


def test_a_newer_state_never_pushes_out_the_one_just_written(store):
    for step in (40, 50, 60):
        saved(store, small_state(step), step)
    saved(CheckpointStore(store.folder), small_state(42), 42)
    assert CheckpointStore(store.folder).load_latest()["model"]["w"][0] == 42


def test_a_foreign_file_is_not_a_state(store):
    path = saved(store, small_state(1), 1)
    torch.save([1, 2], path)
    path.with_name(f"{path.name}.sha256").write_text(f"{sha256_of(path)}  {path.name}\n")
    with pytest.raises(CheckpointError, match="not a training state: it holds a list"):
        load_state(path)


def test_leftovers_of_a_crash_are_removed(store):
    saved(store, small_state(1), 1)
    abandoned = store.folder / "step-00000002.pt.tmp.99.140230184130368"
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    saved(store, small_state(2), 2)
    assert not list(store.folder.glob("*.tmp.*"))


def test_foreign_pickle_is_not_executed(store, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = saved(store, small_state(1), 1)
    with path.open("wb") as file:
        pickle.dump(Payload(), file)
    path.with_name(f"{path.name}.sha256").write_text(f"{sha256_of(path)}  {path.name}\n")
    with pytest.raises(CheckpointError, match="not a training state"):
        load_state(path)
    assert not (tmp_path / "executed").exists()
