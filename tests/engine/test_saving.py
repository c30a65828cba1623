"""Saves in the background: what is written, when, and what is refused."""

from __future__ import annotations

import argparse
import collections
import gc
import os
import shutil
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tests.engine.tiny import states_equal
from torch import nn

from widekernel.engine import state_file
from widekernel.engine.checkpoint import CheckpointStore, StateReference, load_state
from widekernel.engine.snapshot import UnsavableError
from widekernel.engine.state_file import FormatError
from widekernel.engine.write_policy import WritePolicy
from widekernel.errors import CheckpointError, WidekernelError
from widekernel.files import remove_leftovers, sha256_of, write_atomically


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


class Gate:
    """Stops the writer of states until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        write = state_file._DigestingFile.write

        def slowly(file: state_file._DigestingFile, data: object) -> int:
            self.reached.set()
            assert self.open.wait(60)
            return write(file, data)

        monkeypatch.setattr(state_file._DigestingFile, "write", slowly)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 8))
    model[4].weight = model[3].weight
    return model.to(memory_format=torch.channels_last)


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": {"names": {"b", "a"}, "step": 3}}


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model(torch.randn(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_training_goes_on_while_a_state_is_written(store: CheckpointStore, gate: Gate) -> None:
    model, optimizer = trained()
    wanted = torch.load(saved_plainly(full_state(model, optimizer), store.folder.parent), weights_only=True)
    state = full_state(model, optimizer)
    store.save(state, 3, None)
    assert gate.reached.wait(60) and not list(store.folder.glob("*.pt"))
    optimizer.step()  # the copy, which is being written, does not change
    state["progress"]["names"].add("c")
    optimizer.state_dict()["param_groups"][0]["lr"] = 7
    gate.open.set()
    assert store.wait()
    found = load_state(store.folder / "step-00000003.pt")
    assert states_equal({key: found[key] for key in wanted}, wanted)
    assert not states_equal(found["model"], model.state_dict())


def saved_plainly(state: dict, folder: Path) -> Path:
    torch.save(state, folder / "plain.pt")
    return folder / "plain.pt"


def test_the_file_holds_what_torch_would_write(store: CheckpointStore) -> None:
    model, optimizer = trained()
    store.save_now(full_state(model, optimizer), 1, None)
    found = store.load_step(1)["model"]
    assert found["3.weight"].data_ptr() == found["4.weight"].data_ptr()  # tied weights are stored once
    assert found["0.weight"].stride() == model[0].weight.stride()
    assert found._metadata == model.state_dict()._metadata  # versions of modules
    assert network().load_state_dict(found, strict=True)


def test_every_plain_value_survives(store: CheckpointStore) -> None:
    text = "ü" * 300
    shared = [1, 2]
    component = {
        "values": [None, True, 2**80, -1.5, 1e400, 1 + 2j, text, b"\x00\xff", bytearray(b"ab"), torch.bfloat16],
        "device": torch.device("cuda", 1),
        "size": torch.Size([2, 3]),
        "counter": collections.Counter({"a": 2}),
        "ordered": collections.OrderedDict(z=1, a=2),
        ("a", 1): {3: (4, {5, 6})},
        "twice": [shared, shared],
        "types": [torch.ones(2, dtype=dtype) for dtype in (torch.bool, torch.uint8, torch.float16, torch.complex64)],
        "empty": [torch.empty(0), torch.empty(2, 0, 3), torch.tensor(1.0)],
        "parameter": nn.Parameter(torch.ones(2)),
        "views": [torch.ones(4).view(torch.int32), torch.arange(6).view(2, 3).T, torch.arange(9)[3:5]],
        "expanded": torch.ones(1).expand(3, 4),
        "conjugated": torch.tensor([1 + 1j]).conj(),
    }
    store.save_now({"part": component}, 1, None)
    found = store.load_step(1)["part"]
    assert states_equal(found, component)
    assert type(found["counter"]) is collections.Counter and type(found["ordered"]) is collections.OrderedDict
    assert found["twice"][0] is found["twice"][1]


def test_two_types_of_elements_over_one_storage(store: CheckpointStore) -> None:
    whole = torch.arange(4, dtype=torch.int32)
    store.save_now({"part": [whole, whole.view(torch.float32)]}, 1, None)
    first, second = store.load_step(1)["part"]
    assert torch.equal(first, whole) and torch.equal(second.view(torch.int32), whole)


class Pair(NamedTuple):
    a: int


@pytest.mark.parametrize(
    ("value", "kind", "place"),
    [
        (np.float64(1), r"numpy\.float64", "sampler.rate"),
        (np.ones(2), r"numpy\.ndarray", "sampler.rate"),
        (argparse.Namespace(), r"argparse\.Namespace", "sampler.rate"),
        (Pair(1), "Pair", "sampler.rate"),
        (collections.defaultdict(list), r"collections\.defaultdict", "sampler.rate"),
        (Path(), r"pathlib\.\w*Path", "sampler.rate"),
        ([{"x": len}], "builtin_function_or_method", r"sampler\.rate\.0\.x"),
        ({np.int64(1): 1}, r"numpy\.int64", "sampler.rate.key '1'"),
        (torch.ones(2).to_sparse(), "torch.sparse_coo tensor", "sampler.rate"),
        (torch.ones(2, device="meta"), "torch.strided tensor on meta", "sampler.rate"),
    ],
)
def test_what_cannot_be_read_again_is_refused_at_once(value: object, kind: str, place: str, store: CheckpointStore) -> None:
    store.save_now({"model": {}}, 1, None)
    with pytest.raises(
        UnsavableError, match=rf"(?s)(?=.*{kind})(?=.*{place})Component 'sampler' of the training state cannot"
    ):
        store.save({"model": {}, "sampler": {"rate": value}}, 2, None)
    assert store.wait() and [path.name for path in store.paths()] == ["step-00000001.pt"]


def test_a_circle_is_refused(store: CheckpointStore) -> None:
    deep: list = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(UnsavableError, match=r"'part'.*nested more than 100 levels deep"):
        store.save({"part": deep}, 1, None)


def test_the_header(tmp_path: Path) -> None:
    stores = [CheckpointStore(tmp_path / "a", world_size=3, settings={"x": x, "y": 1}) for x in (1, 1, 2)]
    headers = []
    for store in stores:
        store.save_now({}, 7, None)
        state = store.load_step(7)
        assert state["format"] == 2
        headers.append(state["header"])
    assert headers[0]["step"] == 7 and headers[0]["world_size"] == 3 and headers[0]["version"]
    assert headers[0] == headers[1] != headers[2]


def test_a_pair_of_files_under_another_name_is_not_used(store: CheckpointStore) -> None:
    for step in (1, 2):
        store.save_now({"step": step}, step, None)
    for end in ("", ".sha256"):
        shutil.copy(store.folder / f"step-00000001.pt{end}", store.folder / f"step-00000009.pt{end}")
    messages: list[str] = []
    state = CheckpointStore(store.folder, report=messages.append).load_latest()
    assert state is not None and state["step"] == 2
    assert "holds the state after step 1: it was renamed or copied" in messages[0]


def test_states_of_the_former_format_are_read_but_not_resumed(store: CheckpointStore) -> None:
    store.folder.mkdir()
    path = store.folder / "step-00000005.pt"
    torch.save({"format": 1, "model": {"w": torch.ones(2)}}, path)
    (store.folder / f"{path.name}.sha256").write_text(f"{sha256_of(path)}  {path.name}\n")
    assert load_state(path)["format"] == 1
    assert store.load_latest()["model"]["w"][0] == 1
    with pytest.raises(FormatError, match=rf"Finish it with widekernel 0\.5, or start .* --model\.weights {path}"):
        store.load_latest(resume=True)


def test_weights_that_are_not_numbers_are_passed_over_only_to_resume(store: CheckpointStore) -> None:
    for step, value in ((1, 1.0), (2, float("nan"))):
        store.save_now({"model": {"w": torch.tensor([value])}, "ema": {"w": torch.tensor([float("inf")])}}, step, None)
    assert store.choose(resume=False).name == "step-00000002.pt"
    assert store.load_latest(resume=True)["header"]["step"] == 1


# -- several processes -----------------------------------------------------------------------------------------------


def test_all_processes_load_the_state_that_was_chosen(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save_now({"x": 1}, 1, None)
    reference = store.choose(resume=True)
    assert reference == StateReference("step-00000001.pt", sha256_of(store.folder / "step-00000001.pt"))
    other = CheckpointStore(store.folder)
    assert other.load(tuple(reference))["x"] == 1
    with monkeypatch.context() as patch:  # the process that has chosen does not read the file for its digest again
        patch.setattr("widekernel.engine.checkpoint.sha256_of", None)
        assert store.load(reference)["x"] == 1
    with pytest.raises(CheckpointError, match="must be on a file system that all processes see"):
        CheckpointStore(store.folder.parent / "elsewhere").load(reference)
    store.save_now({"x": 2}, 1, None)
    for process in (store, other):
        with pytest.raises(CheckpointError, match="it has another SHA-256 digest here"):
            process.load(reference)


# -- failures --------------------------------------------------------------------------------------------------------


def full(_descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_an_error_surfaces_at_the_next_save(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        store.save({}, 1, None)
        store._background._thread.join()
    with pytest.raises(CheckpointError, match=r"after step 1 cannot be written .*No space left on device. Free some space"):
        store.save({}, 2, None)
    assert store.save_now({}, 3, None)


def test_by_policy_training_goes_on_for_some_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    policy = WritePolicy("continue", 3, messages.append)
    store = CheckpointStore(tmp_path / "checkpoints", policy=policy)
    assert store.save_now({"x": 1}, 1, None)
    for end in (12, 22):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            assert [store.save_now({"x": step}, step, None) for step in range(end - 2, end)] == [False, False]
        assert CheckpointStore(store.folder).load_latest()["x"] == (1 if end == 12 else 13)
        assert store.save_now({"x": end + 1}, end + 1, None)  # and failures are counted from 0 again
    assert [message.split("Training ")[1] for message in messages] == [
        f"goes on without it (failure {number} of at most 3 in a row)." for number in (1, 2, 1, 2)
    ]
    monkeypatch.setattr(os, "fsync", full)
    for step in (31, 32, 33):
        store.save({}, step, None)
    with pytest.raises(
        WidekernelError, match=r"after step 33 .*stops, because the training state could not be written 3 times"
    ):
        store.wait()
    assert len(messages) == 6


def test_other_errors_are_not_subject_to_the_policy() -> None:
    with pytest.raises(KeyError), WritePolicy("continue", 3).attempt("a file"):
        raise KeyError


def test_what_is_read_back_is_compared(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        store.save_now({"x": step}, step, None)
    monkeypatch.setattr(state_file, "sha256_of", lambda path: "0" * 64)
    with pytest.raises(CheckpointError, match="was not stored correctly"):
        store.save_now({"x": 3}, 3, None)
    monkeypatch.undo()
    assert len(list(store.folder.iterdir())) == 4  # two states and their digests
    assert CheckpointStore(store.folder).load_latest()["x"] == 2


def test_a_run_folder_that_vanished_is_not_made_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"No such file or directory. Restore the folder"):
        store.save_now({}, 1, None)
    assert list(tmp_path.iterdir()) == []


# -- resources -------------------------------------------------------------------------------------------------------


def test_memory_is_reused_and_nothing_leaks(store: CheckpointStore) -> None:
    state = {"model": {f"w{number}": torch.ones(1000, number) for number in range(5)}}
    store.save_now(state, 0, None)
    memory = store._snapshot._memory
    descriptors, threads = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    for step in range(1, 20):
        store.save(state, step, None)
    assert store.wait() and store._snapshot._memory is memory
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors and threading.active_count() <= threads
    assert len(list(store.folder.iterdir())) == 4


def test_a_process_forked_during_a_write_neither_hangs_nor_writes(store: CheckpointStore, gate: Gate) -> None:
    store.save({"x": torch.ones(100)}, 1, None)
    assert gate.reached.wait(60)
    child = os.fork()
    if child == 0:
        gc.collect()
        threading.Thread(target=lambda: None).start()
        os._exit(int(torch.ones(10).sum()) + 30)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 40
    gate.open.set()
    assert store.wait() and store.load_latest()["x"].sum() == 100


def test_temporary_files_of_dead_writers_are_removed(tmp_path: Path) -> None:
    own = []
    write_atomically(tmp_path / "a", lambda file: own.append(Path(file.name)))
    start, token = own[0].name.rsplit(".", 2)[0], "0123abcd"
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    dead, living = tmp_path / f"{start}.{child}.{token}", tmp_path / f"{start}.1.{token}"
    restarted = tmp_path / f"{start}.{os.getpid()}.{token}"
    elsewhere, long_ago = tmp_path / f"a.tmp.other.1.{token}", tmp_path / f"a.tmp.other.2.{token}"
    old_version, foreign = tmp_path / "a.tmp.1.140230184130368", tmp_path / "notes.tmp.txt"
    for path in (dead, living, restarted, elsewhere, long_ago, old_version, foreign):
        path.touch()
    for path in (long_ago, old_version, foreign):
        os.utime(path, (0, 0))

    def while_writing(file: object) -> None:
        remove_leftovers(tmp_path)

    write_atomically(tmp_path / "a", while_writing)  # does not remove its own file
    assert {path.name for path in tmp_path.iterdir()} == {"a", living.name, elsewhere.name, foreign.name}
