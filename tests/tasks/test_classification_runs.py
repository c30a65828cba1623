"""Complete runs of a tiny network, repeated after changes to their folders."""

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tests.tasks.images import make_images

import widekernel
from widekernel.data import AugmentConfig, DataConfig, Preprocessing
from widekernel.engine import (
    EmaConfig,
    LoopConfig,
    OptimizerConfig,
    RunFolder,
    RunFolderError,
    ScheduleConfig,
    SilentReporter,
)
from widekernel.engine.metrics_log import read_metrics
from widekernel.errors import CheckpointError, ConfigError, WidekernelError
from widekernel.files import sha256_of
from widekernel.tasks import run as complete_run
from widekernel.tasks.assembly import build_model
from widekernel.tasks.classification import run as classification
from widekernel.tasks.classification.config import ModelConfig, TrainConfig
from widekernel.tasks.classification.run import train
from widekernel.tasks.classification.task import Classification
from widekernel.tasks.fingerprint import fingerprint
from widekernel.tasks.results import summary_keys
from widekernel.tasks.saved import SavedModel, save_model

MODEL = "test_resnet"


class Killed(BaseException):
    """Simulates the death of the process: nothing may catch it."""


class Listener(SilentReporter):
    def __init__(self, kill_at=None):
        self.kill_at, self.messages = kill_at, []

    def message(self, text):
        self.messages.append(text)

    def step(self, step, figures):
        if step == self.kill_at:
            raise Killed


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images", classes=("a", "b"))


@pytest.fixture
def make(tmp_path, images):
    def make(**changes):
        settings = {
            "model": ModelConfig(MODEL),
            "data": DataConfig(root=str(images), input_size=32, workers=0),
            "schedule": ScheduleConfig(epochs=2, warmup_epochs=0),
            "ema": EmaConfig(decay=0.9),
            "loop": LoopConfig(batch_size=8, device="cpu"),
        }
        return TrainConfig(output=str(tmp_path / "run"), **{**settings, **changes})

    return make


def die_at(step, config):
    with pytest.raises(Killed):
        train(config, Listener(step))


@pytest.mark.parametrize(
    ("split", "change"),
    [
        ("train", "rename"),
        ("val", "move"),
        pytest.param("train", "move", marks=pytest.mark.slow),
        pytest.param("val", "rename", marks=pytest.mark.slow),
    ],
)
def test_changed_images_are_noticed_at_resume(make, images, split, change):
    config = make()
    die_at(3, config)
    before, after = images / split / "a" / "0.png", images / split / ("a" if change == "rename" else "b") / "new.png"
    before.rename(after)
    part = {"train": "training", "val": "held-out"}[split]
    with pytest.raises(CheckpointError, match=f"digest of the {part} images was"):
        train(config)
    after.rename(before)
    train(config)


def test_moved_images_are_the_same_images(make, images):
    die_at(3, make())
    images.rename(images.with_name("elsewhere"))
    data = DataConfig(root=str(images.with_name("elsewhere")), input_size=32, workers=0, max_unreadable=3)
    assert not train(make(data=data)).was_finished


def test_images_with_changed_content_are_noticed(make, images):
    config = make()
    die_at(3, config)
    Image.new("RGB", (200, 100), (1, 2, 3)).save(images / "train" / "a" / "0.png")
    with pytest.raises(CheckpointError, match="digest of the sizes of training files was"):
        train(config)


def test_skipped_files_are_reported(make, images):
    (images / "train" / "a" / "notes.txt").write_text("x")
    (images / "val" / "b" / "list.csv").write_text("x")
    listener = Listener(kill_at=1)
    with pytest.raises(Killed):
        train(make(), listener)
    told = [message for message in listener.messages if "left out" in message]
    assert ["a/notes.txt" in told[0], "b/list.csv" in told[1], len(told)] == [True, True, 2]


def test_a_classifier_of_other_classes_is_reported(make, tmp_path):
    path, preprocessing = tmp_path / "other.safetensors", Preprocessing.resolve(DataConfig(), {})
    save_model(build_model(MODEL, 2, {}), path, SavedModel(MODEL, {}, "training", 2, ("b", "c"), preprocessing))
    listener = Listener(kill_at=1)
    with pytest.raises(Killed):
        train(make(model=ModelConfig(MODEL, weights=str(path))), listener)
    assert sum("was trained on b, c, and the classes here are a, b" in message for message in listener.messages) == 1


def test_images_in_memory_are_compared_by_content():
    from tests.engine.tiny import array_source

    left, right = array_source(), array_source()
    assert fingerprint(left, left) == fingerprint(right, right)
    right.images = right.images.copy()
    right.images[3, 0, 0, 0] += 1
    differing = {key for key, value in fingerprint(left, right).items() if value != fingerprint(left, left)[key]}
    assert differing == {"digest of the held-out images"}


def test_a_folder_in_use_is_refused(make):
    config = make()
    folder = RunFolder(config.output)
    folder.make_writable()
    with folder.locked(), pytest.raises(RunFolderError, match=f"Another process is training in {folder.path}"):
        train(config)


def test_resuming_needs_no_initial_weights(make, tmp_path):
    model = classification.build_model(MODEL, 2, {})
    widekernel.save_checkpoint(model, tmp_path / "first.safetensors")
    config = make(model=ModelConfig(MODEL, weights=str(tmp_path / "first.safetensors")))
    die_at(3, config)
    (tmp_path / "first.safetensors").unlink()
    train(config)


def test_resuming_fetches_no_pretrained_weights(make, monkeypatch):
    fetched = []
    build = classification.build_model

    def watched(name, num_classes, args, pretrained=False):
        fetched.append(pretrained)
        return build(name, num_classes, args)

    monkeypatch.setattr(classification, "build_model", watched)
    config = make(model=ModelConfig(MODEL, pretrained=True))
    die_at(3, config)
    train(config)
    assert fetched == [True, False]


@pytest.mark.parametrize("name", ["model", "model_ema"])
def test_a_deleted_model_is_written_again(make, name):
    config = make()
    first = train(config)
    path = getattr(first.folder, name)
    weights = load_file(path)
    rows = read_metrics(first.folder.metrics)
    path.unlink()
    listener = Listener(kill_at=1)
    again = train(config, listener)
    assert again.was_finished
    assert again.summary == first.summary
    assert any(str(path) in text for text in listener.messages)
    assert all(torch.equal(value, weights[key]) for key, value in load_file(path).items())
    assert read_metrics(first.folder.metrics) == rows


def test_a_deleted_model_without_training_states_is_explained(make):
    config = make()
    folder = train(config).folder
    folder.model.unlink()
    for path in folder.checkpoints.iterdir():
        path.unlink()
    with pytest.raises(RunFolderError, match=r"finished, but model\.safetensors is missing"):
        train(config)
    assert read_metrics(folder.metrics)


def test_curves_are_drawn_even_if_the_last_epoch_ended_abruptly(make, monkeypatch):
    config = make()
    folder = RunFolder(config.output)

    def die(rows, metrics, path):
        if rows[-1]["epoch"] == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("widekernel.engine.loop.save_curves", die)
        die_at(None, config)
    assert not folder.curves.exists()
    train(config)
    assert folder.curves.exists()


def test_an_empty_summary_is_explained(make):
    config = make()
    folder = train(config).folder
    folder.summary.write_text("{}")
    with pytest.raises(WidekernelError, match=r"summary\.json is damaged .*it lacks epochs"):
        train(config)
    folder.summary.unlink()
    train(config)
    assert folder.read_summary(summary_keys(Classification))


class Breaking(SilentReporter):
    """Simulates any error before the first step."""

    def start_training(self, length, first_step):
        raise Killed


def test_the_corrected_command_follows_a_first_attempt_that_failed(make, images, tmp_path):
    folder = RunFolder(tmp_path / "run")
    for config, words in (
        (make(data=DataConfig(root=str(images / "nowhere"), workers=0)), "nowhere"),
        (make(loop=LoopConfig(batch_size=4000, device="cpu")), "4000"),
        (make(ema=EmaConfig(decay=0.99999)), r"ema\.decay is 0\.99999"),
        (
            make(loop=LoopConfig(batch_size=1, device="cpu"), augment=AugmentConfig(mixup=0, cutmix=0)),
            "raise loop.batch_size",
        ),
    ):
        with pytest.raises(WidekernelError, match=words):
            train(config)
        assert not folder.path.exists()
    with pytest.raises(Killed):
        train(make(schedule=ScheduleConfig(epochs=3, warmup_epochs=0)), Breaking())
    assert not folder.path.exists()
    assert train(make()).summary["epochs"] == 2


def test_a_run_killed_before_its_first_step_does_not_count(make, tmp_path):
    """Such a run cannot clean up."""
    folder = RunFolder(tmp_path / "run")
    folder.prepare(make(schedule=ScheduleConfig(epochs=3, warmup_epochs=0)).to_dict())
    folder.begin()
    folder.lock.touch()
    assert train(make()).summary["epochs"] == 2


def test_a_result_on_other_images_is_not_reported(make, images):
    config = make()
    summary = train(config).summary
    assert summary["data"]["images"] == 16 and summary["code"]["widekernel"] == widekernel.__version__
    (images / "val" / "a" / "0.png").rename(images / "val" / "a" / "new.png")
    with pytest.raises(CheckpointError, match=r"digest of the held-out images was .* --model\.weights"):
        train(config)
    # earlier versions kept the description of the data in training states only
    folder = RunFolder(config.output)
    folder.write_summary({key: value for key, value in summary.items() if key not in ("data", "code")})
    with pytest.raises(CheckpointError, match="digest of the held-out images was"):
        train(config)
    (images / "val" / "a" / "new.png").rename(images / "val" / "a" / "0.png")
    again = train(config)
    assert again.was_finished and "did not record its code" in again.other_code


def test_a_result_of_other_code_is_marked_as_such(make, monkeypatch):
    config = make()
    assert train(config).other_code == ""
    assert train(config).other_code == ""
    monkeypatch.setattr(complete_run, "code_fingerprint", lambda: {"widekernel": "9.9", "torch": "x"})
    again = train(config)
    assert again.was_finished
    assert f"widekernel {widekernel.__version__} (now 9.9)" in again.other_code


def test_more_epochs_are_refused_with_a_way_to_continue(make):
    result = train(make())
    with pytest.raises(RunFolderError, match=r"schedule\.epochs: 2 there, 3 now") as caught:
        train(make(schedule=ScheduleConfig(epochs=3, warmup_epochs=0)))
    assert f"--model.weights {result.folder.model}" in str(caught.value)


def test_a_truncated_model_is_written_again(make):
    folder = train(make()).folder
    whole = folder.model.read_bytes()
    folder.model.write_bytes(whole[: len(whole) // 2])
    assert train(make()).was_finished
    assert folder.model.read_bytes() == whole


def test_a_finished_run_of_version_0_5_is_finished_and_an_unfinished_one_is_refused(make):
    """Then, loop.batch_size was the size of a forward pass, and many settings did not exist."""
    config = make(loop=LoopConfig(batch_size=8, micro_batch=4, device="cpu"))
    train(config)
    folder = RunFolder(config.output)
    settings = folder.read_config()
    for section in ("evaluation", "faults", "logging"):
        del settings[section]
    new = settings["loop"]
    settings["loop"] = {"batch_size": 4, "accumulate": 2, **{key: new[key] for key in ("precision", "device", "log_every")}}
    folder.config.write_text(yaml.safe_dump(settings))
    assert train(config).was_finished
    with pytest.raises(RunFolderError, match=r"loop\.batch_size: 8 there, 6 now"):
        train(make(loop=LoopConfig(batch_size=6, device="cpu")))
    folder.summary.unlink()
    for path in folder.checkpoints.glob("step-*.pt"):
        state = torch.load(path, weights_only=True)
        torch.save({**state, "format": 1, "settings": settings}, path)
        path.with_name(f"{path.name}.sha256").write_text(f"{sha256_of(path)}  {path.name}\n")
    with pytest.raises(CheckpointError, match=r"0\.5"):
        train(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelConfig("test_resnett")}, "test_resnett"),
        ({"optimizer": OptimizerConfig(name="adamww")}, "Did you mean 'adamw'"),
        ({"loop": LoopConfig(batch_size=8, device="cpu", precision="fp16")}, r"loop\.precision is 'fp16'"),
        ({"loop": LoopConfig(batch_size=8, micro_batch=6, device="cpu")}, r"loop\.micro_batch is 6"),
    ],
    ids=["model", "optimizer", "precision", "batch"],
)
def test_what_cannot_work_is_refused_before_the_data_are_opened(make, changes, message, monkeypatch):
    monkeypatch.setattr(classification, "open_train_and_val", lambda _: pytest.fail("opened the data"))
    with pytest.raises(ConfigError, match=message):
        train(make(**changes))
