"""A run folder belongs to a run once its first step is done."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from widekernel.engine import RunFolder, RunFolderError
from widekernel.engine.metrics_log import MetricsLog
from widekernel.errors import CheckpointError
from widekernel.files import write_atomically


def fail(folder: RunFolder, after_a_step: bool = False) -> None:
    with folder.reserved():
        assert folder.lock.exists()
        folder.prepare({"a": 1})
        if after_a_step:
            folder.begin()
            MetricsLog(folder.metrics).append({"step": 1})
        raise KeyError


def test_a_run_that_fails_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fail(RunFolder(tmp_path / "a" / "b" / "run"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_unchanged(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(KeyError):
        fail(RunFolder(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_that_has_begun_keeps_its_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KeyError):
        fail(folder, after_a_step=True)
    assert folder.lock.exists() and folder.read_config() == {"a": 1} and folder.has_begun()
    with pytest.raises(RunFolderError, match="a: 1 there, 2 now"):
        RunFolder(folder.path).prepare({"a": 2})


@pytest.mark.parametrize("names", [[], ["step-00000000.pt", "step-00000000.pt.sha256"]])
def test_other_settings_replace_a_run_that_never_began(names: list[str], tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    first.prepare({"a": 1})
    first.begin()
    first.checkpoints.mkdir()
    for name in names:
        (first.checkpoints / name).write_bytes(b"state")
    first.metrics.write_bytes(b"")
    assert not first.has_begun()
    second = RunFolder(tmp_path)
    second.prepare({"a": 2})
    assert second.read_config() == {"a": 1}
    second.begin()
    assert second.read_config() == {"a": 2} and list(second.checkpoints.iterdir()) == []
    assert (tmp_path / "config.yaml.replaced").read_text() == "a: 1\n"


def test_files_like_those_of_a_run_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"somebody's")
    with pytest.raises(RunFolderError, match=r"holds model\.safetensors without its config\.yaml"):
        RunFolder(tmp_path).prepare({"a": 1})


def test_how_to_continue(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.how_to_continue() == ""
    folder.checkpoints.mkdir()
    (folder.checkpoints / "step-00000007.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"images was 3 and is 4\..* --model\.weights .*step-00000007\.pt"):
        folder.check_same_data({"images": 3}, {"images": 4})
    folder.model.write_bytes(b"")
    assert f"--model.weights {folder.model}" in folder.how_to_continue()


def test_a_lock_on_a_removed_file_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The former holder removes the file between the next holder's opening and locking it."""
    folder, real, calls = RunFolder(tmp_path), fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        real(descriptor, how)
        if how & fcntl.LOCK_EX:
            calls.append(descriptor)
            if len(calls) == 1:
                folder.lock.unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder.locked():
        assert folder.lock.exists()
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "model_ema.safetensors", "masks.safetensors"])
def test_a_result_that_was_copied_with_its_settings_belongs_to_them(name: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.config.write_text("a: 1\n")
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(RunFolderError, match="a: 1 there, 2 now"):
        folder.prepare({"a": 2})
    assert folder.config.read_text() == "a: 1\n" and (tmp_path / name).read_bytes() == b"weights"


def test_what_a_killed_process_left_is_removed_when_the_folder_is_locked(tmp_path: Path) -> None:
    """A name with this host's name and the number of a process that has ended, or of this one before a restart."""
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    names: list[str] = []
    write_atomically(tmp_path / "summary.json", lambda file: names.append(Path(file.name).name))
    left = [tmp_path / names[0], folder.checkpoints / names[0], tmp_path / "notes.tmp.txt"]
    for path in left:
        path.write_bytes(b"half")
    with folder.locked():
        assert [path.exists() for path in left] == [False, False, True]
