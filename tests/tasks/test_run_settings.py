"""Effects of the settings of complete runs: what is evaluated, where the classifier starts, determinism, repeats."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.tasks.images import make_images

from widekernel.data import AugmentConfig, DataConfig
from widekernel.engine import EmaConfig, LoopConfig, OptimizerConfig, Processes, RunFolder, ScheduleConfig, SilentReporter
from widekernel.engine.checkpoint import CheckpointStore
from widekernel.engine.config import EvaluationConfig
from widekernel.engine.metrics_log import read_metrics
from widekernel.errors import CheckpointError, ConfigError
from widekernel.tasks.assembly import build_model, classifier_of
from widekernel.tasks.classification.class_map import read_class_map
from widekernel.tasks.classification.config import ModelConfig, TrainConfig
from widekernel.tasks.classification.run import ClassificationParts, train
from widekernel.tasks.loading import load
from widekernel.tasks.model_source import ModelSource

Make = Callable[..., TrainConfig]
LIGHT = AugmentConfig(auto_augment=None, erase_prob=0.0)


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    images = make_images(tmp_path / "images", classes=("a", "b"))

    def make(name: str = "run", **changes: object) -> TrainConfig:
        settings = {
            "model": ModelConfig("test_resnet"),
            "data": DataConfig(root=str(images), input_size=32, workers=0),
            "augment": LIGHT,
            "schedule": ScheduleConfig(epochs=2, warmup_epochs=0),
            "ema": EmaConfig(decay=0.5),
            "loop": LoopConfig(batch_size=8, device="cpu"),
        }
        return TrainConfig(output=str(tmp_path / name), **{**settings, **changes})

    return make


# -- without held-out images -----------------------------------------------------------------------------------------


def test_without_held_out_images(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = make()
    blind = make("blind", data=replace(config.data, val_split=None))
    first, second = train(config), train(blind)
    rows = read_metrics(second.folder.metrics)
    assert rows[-1]["step"] == first.summary["step"]
    assert "train_loss" in rows[-1]
    assert not any("val" in key or "ema" in key for row in rows for key in row)
    assert second.summary.keys() == {"epochs", "step", "train_loss", "train_unreadable", "data", "code"}
    for name in ("model.safetensors", "model_ema.safetensors"):  # evaluations change nothing
        left, right = (load_file(result.folder.path / name) for result in (first, second))
        assert all(torch.equal(left[key], right[key]) for key in left)
    again = train(blind)
    assert again.was_finished and again.summary == second.summary
    states = CheckpointStore(second.folder.checkpoints)
    assert states.load_latest()["progress"]["step"] == second.summary["step"]
    with pytest.raises(CheckpointError, match="has no best state"):
        load(ModelSource(second.folder.path, state="best"))
    from widekernel.cli.train import print_result

    print_result(again)
    assert "nothing was evaluated" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_without_held_out_images_resumes(make: Make) -> None:
    config = make(
        data=replace(make().data, val_split=None),
        loop=LoopConfig(batch_size=4, device="cpu", log_every=1),
        augment=replace(LIGHT, repeats=2, auto_augment="ta_wide", train_crop="random"),
        optimizer=OptimizerConfig(lr=0.01, weight_decay=0.1, weight_decay_end=0.5, bias_weight_decay=0.2),
        schedule=ScheduleConfig(epochs=2, warmup_steps=2, warmup_kind="linspace", kind="step", decay_epochs=1),
    )
    whole = train(config)
    other = replace(config, output=str(Path(config.output or "").with_name("other")))

    class Stop(BaseException):
        pass

    class Stopping(SilentReporter):
        def step(self, step: int, figures: object) -> None:
            if step == 3:
                raise Stop

    with pytest.raises(Stop):
        train(other, Stopping())
    resumed = train(other)
    left, right = (load_file(result.folder.model) for result in (whole, resumed))
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert resumed.summary["train_loss"] == whole.summary["train_loss"]


# -- evaluated weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "prefixes"),
    [
        pytest.param("both", ("", "ema_"), marks=pytest.mark.slow),
        ("ema", ("ema_",)),
        pytest.param("raw", ("",), marks=pytest.mark.slow),
    ],
)
def test_evaluated_weights(make: Make, weights: str, prefixes: tuple[str, ...]) -> None:
    config = make(evaluation=EvaluationConfig(weights=weights))
    result = train(config)
    rows = [row for row in read_metrics(result.folder.metrics) if "val_top1" in row or "ema_val_top1" in row]
    assert len(rows) == 2
    for prefix in ("", "ema_"):
        assert all((f"{prefix}val_top1" in row) == (prefix in prefixes) for row in rows)
        assert (f"{prefix}val_loss" in result.summary) == (prefix in prefixes)
    assert result.summary["best_top1"] == max(row[f"{prefixes[-1]}val_top1"] for row in rows)
    assert (result.folder.path / "model_ema.safetensors").exists()
    assert train(config).was_finished


def test_an_average_that_does_not_exist_is_not_evaluated(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"evaluation.weights is 'ema', but nothing is averaged"):
        make(ema=EmaConfig(decay=None), evaluation=EvaluationConfig(weights="ema"))


# -- learning rate for another batch ---------------------------------------------------------------------------------


def test_learning_rate_is_scaled_to_the_batch(make: Make) -> None:
    schedule = ScheduleConfig(epochs=1, warmup_epochs=0, kind="constant", lr_scale_batch=64)
    scaled = make(optimizer=OptimizerConfig(lr=0.08), schedule=schedule)
    listener = Listener()
    result = train(scaled, listener)
    assert read_metrics(result.folder.metrics)[-1]["lr"] == pytest.approx(0.01, rel=1e-12)
    assert any(
        "0.01: optimizer.lr (0.08) × loop.batch_size (8) / schedule.lr_scale_batch (64)" in m for m in listener.messages
    )
    plain = make("plain", optimizer=OptimizerConfig(lr=0.01), schedule=replace(schedule, lr_scale_batch=None))
    left, right = (load_file(each.folder.model) for each in (result, train(plain)))
    assert all(torch.equal(left[key], right[key]) for key in left)


# -- classifier ------------------------------------------------------------------------------------------------------


def started(config: TrainConfig, listener: Listener | None = None) -> torch.nn.Module:
    """Return the network of a run before its first step."""
    chosen = None if config.data.class_map is None else read_class_map(config.data.class_map, ("a", "b"))
    parts = ClassificationParts(config, Processes(), (listener or Listener()).message)
    parts._chosen = chosen
    return parts.network(("a", "b"), starts=True)


def test_initial_classifier_is_scaled(make: Make) -> None:
    usual = classifier_of(started(make(model=ModelConfig("test_convnext"))))
    scaled = classifier_of(started(make(model=ModelConfig("test_convnext", head_init_scale=0.001))))
    assert usual.weight.abs().max() > 0
    assert torch.equal(scaled.weight, 0.001 * usual.weight)


def test_a_classifier_from_weights_is_not_scaled_and_another_one_is_replaced(make: Make, tmp_path: Path) -> None:
    files = {classes: str(tmp_path / f"{classes}.pth") for classes in (2, 5)}
    for classes, file in files.items():
        torch.save({"model": build_model("test_convnext", classes, {}).state_dict()}, file)
    kept = started(make(model=ModelConfig("test_convnext", weights=files[2], head_init_scale=0.001)))
    assert torch.equal(classifier_of(kept).weight, torch.load(files[2])["model"]["head.fc.weight"])
    listener = Listener()
    replaced = started(make(model=ModelConfig("test_convnext", weights=files[5], head_init_scale=0.001)), listener)
    assert any("for 5 classes" in message and "this run trains it" in message for message in listener.messages)
    fresh = started(make(model=ModelConfig("test_convnext")))
    assert torch.equal(classifier_of(replaced).weight, 0.001 * classifier_of(fresh).weight)
    assert torch.equal(replaced.stem[0].weight, torch.load(files[5])["model"]["stem.0.weight"])


def test_classifier_starts_from_some_outputs_of_another(make: Make, tmp_path: Path) -> None:
    torch.save({"model": build_model("test_convnext", 7, {}).state_dict()}, tmp_path / "7.pth")
    data = replace(make().data, class_map=str(tmp_path / "map.txt"))
    config = make(model=ModelConfig("test_convnext", weights=str(tmp_path / "7.pth"), head_init_scale=0.5), data=data)
    wide = torch.load(tmp_path / "7.pth")["model"]
    (tmp_path / "map.txt").write_text("4\n1\n")
    listener = Listener()
    found = classifier_of(started(config, listener))
    assert torch.equal(found.weight, wide["head.fc.weight"][[4, 1]])
    assert torch.equal(found.bias, wide["head.fc.bias"][[4, 1]])
    assert any("2 outputs are used" in message for message in listener.messages)
    (tmp_path / "map.txt").write_text("4\n-1\n")
    partly = classifier_of(started(config)).weight
    assert torch.equal(partly[0], wide["head.fc.weight"][4])
    fresh = started(make(model=ModelConfig("test_convnext")))
    assert torch.equal(partly[1], 0.5 * classifier_of(fresh).weight[1])
    (tmp_path / "map.txt").write_text("4\n7\n")
    with pytest.raises(ConfigError, match="chooses output 7, but the network has 7 outputs"):
        started(config)
    with pytest.raises(ConfigError, match=r"set model.weights to a checkpoint"):
        make(data=data)


def test_a_network_without_a_linear_classifier_cannot_be_scaled() -> None:
    with pytest.raises(ConfigError, match="has no linear classifier"):
        classifier_of(torch.nn.Sequential(torch.nn.Linear(2, 2)))


# -- determinism and repeats -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_deterministic_algorithms_hold_during_the_run_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen = []

    class Watching(SilentReporter):
        def step(self, step: int, figures: object) -> None:
            algorithms = torch.are_deterministic_algorithms_enabled()
            seen.append((algorithms, torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")))

    short = {"schedule": ScheduleConfig(epochs=1, warmup_epochs=0), "ema": EmaConfig()}
    train(make(loop=LoopConfig(batch_size=8, device="cpu", deterministic=True), **short), Watching())
    assert set(seen) == {(True, False, ":4096:8")}
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    seen.clear()
    train(make("free", **short), Watching())
    assert set(seen) == {(False, True, None)}


@pytest.mark.slow
def test_repeated_augmentation_trains_on_fewer_images_per_epoch(make: Make) -> None:
    short = {"schedule": ScheduleConfig(epochs=1, warmup_epochs=0), "ema": EmaConfig()}
    seen = [train(make(str(n), augment=replace(LIGHT, repeats=n), **short)).summary for n in (1, 2)]
    assert seen[0]["step"] == seen[1]["step"]
    assert seen[0]["val_loss"] != seen[1]["val_loss"]


# -- run folders of earlier versions ---------------------------------------------------------------------------------

NEW = {
    "optimizer": ("momentum", "weight_decay_end", "norm_weight_decay", "bias_weight_decay", "decay_response_norms",
                  "layer_groups"),
    "schedule": ("kind", "decay_epochs", "gamma", "warmup_kind", "lr_scale_batch"),
    "augment": ("train_crop", "repeats"),
    "data": ("class_map", "test_crop"),
    "model": ("head_init_scale",),
    "loop": ("deterministic",),
    "evaluation": ("weights",),
}  # fmt: skip


def test_run_folders_of_earlier_versions_resume(make: Make) -> None:
    config = make()
    result = train(config)
    path = result.folder.path / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    for section, keys in NEW.items():
        for key in keys:
            del stored[section][key]
    path.write_text(yaml.safe_dump(stored))
    assert train(config).was_finished
    (result.folder.path / "summary.json").unlink()
    (result.folder.path / "model.safetensors").unlink()
    assert train(config).summary["val_loss"] == result.summary["val_loss"]
    assert RunFolder(config.output or "").model.exists()
