"""Records of a run about its data and settings, and messages when these have changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from tests.tasks.images import make_images

from widekernel.cli.main import main
from widekernel.data import AugmentConfig, DataConfig, open_split
from widekernel.data.config import processors
from widekernel.engine import EmaConfig, LoopConfig, ScheduleConfig, SilentReporter
from widekernel.engine.checkpoint import load_state
from widekernel.engine.interrupts import Interrupted, InterruptGuard
from widekernel.errors import CheckpointError, ConfigError, WidekernelError
from widekernel.tasks.classification.config import ModelConfig, TrainConfig
from widekernel.tasks.classification.run import train


class Listener(SilentReporter):
    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, step: int, figures: object) -> None:
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGHUP)


def config(output: Path | str, root: str, **changes: object) -> TrainConfig:
    settings: dict = {
        "model": ModelConfig("test_resnet"),
        "data": DataConfig(root=root, input_size=32, workers=0),
        "schedule": ScheduleConfig(epochs=2, warmup_epochs=0),
        "ema": EmaConfig(decay=None),
        "loop": LoopConfig(batch_size=8, device="cpu"),
        "augment": AugmentConfig(auto_augment=None, mixup=0.0, cutmix=0.0),
    }
    return TrainConfig(output=str(output), **{**settings, **changes})


def test_a_relative_root_is_valid_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    images = make_images(tmp_path / "here" / "d")
    make_images(tmp_path / "there" / "d", seed=1)
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path / "here")
    train(config(run, "d"))
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["root"] == str(images)
    for root in ("d", str(images), "../here/d"):
        assert train(config(run, root)).was_finished
    monkeypatch.chdir(tmp_path / "there")
    assert main(["eval", str(run), "--json"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert f"Evaluating on {images}/val" in told.replace("/ ", "/") and "Warning" not in told
    # other images in the place of the run's
    (images / "val" / "cat" / "0.png").rename(images / "val" / "cat" / "new.png")
    assert main(["eval", str(run), "--json"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "are not those of the run" in told and "digest of the held-out images" in told
    # other images on purpose
    assert main(["eval", str(run), "--json", "--data.root", "d"]) == 0
    assert "not those of the run" not in capsys.readouterr().err


@pytest.fixture
def hangs_up() -> Iterator[None]:
    """Restore the default handling of SIGHUP, which nohup ignores."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangs_up")
def test_an_interrupted_run_is_reported_and_refuses_foreign_states(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = make_images(tmp_path / "d")
    run, other = tmp_path / "run", tmp_path / "other"
    with pytest.raises(Interrupted) as stopped:  # by a closing terminal
        train(config(run, str(images)), Listener(stop_at=3))
    assert stopped.value.signal_number == signal.SIGHUP
    for command in (["eval", str(run)], ["fold", str(run)], ["complexity", str(run)], ["sparsify", str(run)]):
        main(command)
        told = " ".join(capsys.readouterr().err.split())
        assert "is unfinished: 3 of 4 steps are done." in told, (command, told)
    with pytest.raises(Interrupted):
        train(config(other, str(images), label_smoothing=0.2), Listener(stop_at=2))
    shutil.rmtree(other / "checkpoints")
    shutil.copytree(run / "checkpoints", other / "checkpoints")
    with pytest.raises(CheckpointError, match=r"label_smoothing: 0\.1 in the state, 0\.2 in the run"):
        train(config(other, str(images), label_smoothing=0.2))
    assert main(["eval", str(other)]) == 2 and "other settings" in capsys.readouterr().err
    # a state without its digest file is not called damaged
    state = max((run / "checkpoints").glob("step-*.pt"))
    state.with_name(f"{state.name}.sha256").unlink()
    with pytest.raises(CheckpointError, match=rf"digest file {state.name}.sha256 is missing.*`sha256sum") as lost:
        load_state(state)
    assert "damaged" not in str(lost.value)


def test_a_class_without_readable_images_is_reported(tmp_path: Path) -> None:
    images = make_images(tmp_path / "d")
    for path in (images / "train" / "dog").iterdir():
        path.write_bytes(b"damaged")
    listener = Listener()
    train(config(tmp_path / "run", str(images)), listener)
    assert "Warning: class dog: none of its 8 images can be read." in listener.messages
    assert not any("class cat" in text for text in listener.messages)


def test_a_folder_whose_name_is_not_text(tmp_path: Path, capsysbinary: pytest.CaptureFixture) -> None:
    images = make_images(tmp_path / "d")
    run = tmp_path / os.fsdecode(b"run\xff")
    try:
        run.mkdir()
    except OSError:
        pytest.skip("this file system takes no such names")
    train(config(run, str(images)))
    assert (run / "model.safetensors").is_file()
    for command in ("eval", "fold", "complexity", "sparsify"):
        assert main([command, str(run)]) == 0, capsysbinary.readouterr().err
    sparse = next(path for path in run.glob("model_*.safetensors") if "_mag" in path.name and "masks" not in path.name)
    assert main(["eval", str(sparse), "--json"]) == 0
    assert json.loads(capsysbinary.readouterr().out.splitlines()[-1])["images"] == 6


def test_a_checkpoint_of_other_classes_gets_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    from widekernel.tasks.assembly import build_model

    state = build_model("slak_nano", 3, {}).state_dict()
    torch.save(state, tmp_path / "three.pth")
    torch.save({key: value for key, value in state.items() if not key.startswith("head.fc")}, tmp_path / "none.pth")
    assert main(["complexity", str(tmp_path / "three.pth"), "--model", "slak_nano"]) == 2
    told = capsys.readouterr().err
    assert "Add --num_classes 3." in told and told.count("three.pth") == 1
    assert main(["complexity", str(tmp_path / "none.pth"), "--model", "slak_nano"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "holds no classifier" in told and "num_classes" not in told
    assert not [warning for warning in recwarn if "untrained" in str(warning.message)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (123.0, 116.0, 103.0)}, r"data\.mean .* pixels are scaled to 0\.\.1, so divide by 255"),
        ({"std": (58.0, 57.0, 57.0)}, r"data\.std .* pixels are scaled to 0\.\.1, so divide by 255"),
        ({"std": (0.0, 0.5, 0.5)}, r"data\.std .* above 0"),
        ({"mean": (0.0, 0.0)}, r"data\.mean .* three numbers, or null"),
    ],
)
def test_statistics_must_be_for_pixels_from_0_to_1(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


def test_two_numbers_for_the_mean_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--data.mean", "[0,0]"]) == 2
    assert "three numbers, or null" in capsys.readouterr().err


def test_a_root_without_effect_is_reported() -> None:
    pytest.importorskip("sklearn")
    assert any("data.root (d1) has no effect" in note for note in open_split(DataConfig("digits", "d1"), "val").notes)
    assert open_split(DataConfig("digits"), "val").notes == ()


def test_the_default_number_of_workers() -> None:
    assert DataConfig().workers == min(4, processors())


def test_an_ignored_hangup_stays_ignored() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with InterruptGuard() as guard:
            os.kill(os.getpid(), signal.SIGHUP)
            assert guard.received is None
    finally:
        signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize("rate", [3, -1, 1.0, "x"])
@pytest.mark.parametrize("name", ["drop_rate", "drop_path_rate"])
def test_drop_rates_must_be_from_0_to_1(name: str, rate: object) -> None:
    from widekernel.tasks.assembly import build_model

    with pytest.raises(WidekernelError, match=f"{name}.*{rate}"):
        build_model("slak_tiny", 3, {name: rate})
