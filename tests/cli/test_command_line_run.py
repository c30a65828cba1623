"""Train, evaluate, fold and resume from the command line, on a folder of images."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tests import pictures
from tests.engine.tiny import without_timings

from widekernel.cli.main import main
from widekernel.engine.metrics_log import read_metrics

SETTINGS = {
    "model": {"name": "slak_nano", "args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}},
    "data": {"input_size": 32, "workers": 0},
    "augment": {"auto_augment": None, "erase_prob": 0.0},
    "optimizer": {"lr": 0.01},
    "schedule": {"epochs": 2, "warmup_epochs": 0},
    "ema": {"decay": 0.8},
    "loop": {"batch_size": 12, "micro_batch": 6, "device": "cpu", "log_every": 1},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write red and green images, and one damaged file in each split."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 13), ("val", 7)):
        for channel, name in enumerate(("red", "green")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 100, (20, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / f"{index:02}.png")
        (root / split / "red" / "00.png").write_bytes(b"damaged")
    return root


def write_config(folder, images, **changes):
    settings = {**SETTINGS, "data": {**SETTINGS["data"], "root": str(images)}, **changes}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pictures.drawn():
        assert main(["train", "--config", str(write_config(folder, images)), "--output", str(folder / "run")]) == 0
    return folder / "run"


def evaluate(capsys, *arguments):
    capsys.readouterr()
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_run_folder(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml", "metrics.jsonl", "checkpoints", "curves.png", "model.safetensors", "model_ema.safetensors",
        "summary.json", ".lock",
    }  # fmt: skip
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["epoch"] for row in rows] == [1, 1, 2, 2]
    assert all({"epoch", "step", "train_loss", "lr"} <= row.keys() for row in rows)
    assert all({"val_top1", "val_loss", "ema_val_top1", "ema_val_loss"} < row.keys() for row in (rows[1], rows[3]))
    with Image.open(finished / "curves.png") as picture:
        assert picture.size[0] > 500


def test_unreadable_images_are_counted(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["val_unreadable"] == 1
    assert summary["val_images"] == 13
    assert summary["train_unreadable"] == 1


def test_evaluation_agrees_with_training(finished, capsys):
    last = read_metrics(finished / "metrics.jsonl")[-1]
    for weights, prefix in (("model", ""), ("ema", "ema_")):
        result = evaluate(capsys, "--weights", weights, finished)
        assert result["images"] == 13
        assert result["unreadable"] == 1
        assert result["top1"] == last[f"{prefix}val_top1"]
        assert result["loss"] == pytest.approx(last[f"{prefix}val_loss"], rel=1e-5)
        state = evaluate(capsys, finished, "--weights", weights, "--state", "best")
        best = max(read_metrics(finished / "metrics.jsonl"), key=lambda row: row.get("ema_val_top1", -1))
        assert state["top1"] == best[f"{prefix}val_top1"]
    from_file = evaluate(capsys, finished / "model.safetensors", "--batch_size", "3")
    assert from_file["top1"] == last["val_top1"]


def test_evaluation_of_a_model_file_outside_its_run(finished, images, capsys, tmp_path):
    shutil.copy(finished / "model.safetensors", tmp_path / "net.safetensors")
    assert main(["eval", str(tmp_path / "net.safetensors")]) == 2
    assert "data.root is not set" in capsys.readouterr().err
    shutil.copytree(images / "val" / "green", tmp_path / "data" / "val" / "green")
    # the only class here is one of the model's two: it is matched by name
    subset = evaluate(capsys, tmp_path / "net.safetensors", "--data.root", tmp_path / "data", "--data.workers", "0")
    assert subset["images"] == 7
    (tmp_path / "data" / "val" / "green").rename(tmp_path / "data" / "val" / "blue")
    assert main(["eval", str(tmp_path / "net.safetensors"), "--data.root", str(tmp_path / "data")]) == 2
    assert "'blue'" in capsys.readouterr().err


def test_too_many_unreadable_images_stop_the_evaluation(finished, capsys):
    assert main(["eval", str(finished), "--data.max_unreadable", "0"]) == 2
    assert "data.max_unreadable (0)" in capsys.readouterr().err


def test_too_many_unreadable_images_stop_the_training(images, tmp_path, capsys):
    config = write_config(tmp_path, images)
    arguments = ["train", "--config", str(config), "--output", str(tmp_path / "run"), "--data.max_unreadable", "0"]
    assert main(arguments) == 2
    assert "1 training images cannot be read, more than data.max_unreadable (0)" in capsys.readouterr().err


def test_fold(finished, capsys, tmp_path):
    output = tmp_path / "folded.safetensors"
    assert main(["fold", str(finished), "--output", str(output)]) == 0
    assert "largest error" in capsys.readouterr().out
    data = ["--data.root", yaml.safe_load((finished / "config.yaml").read_text())["data"]["root"], "--data.workers", "0"]
    assert evaluate(capsys, output, *data)["top1"] == evaluate(capsys, finished)["top1"]
    assert main(["fold", str(finished), "--output", str(output)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["fold", str(finished), "--output", str(output), "--overwrite", "--weights", "ema"]) == 0
    assert main(["fold", str(output), "--output", str(tmp_path / "twice.safetensors")]) == 2
    assert "already folded" in capsys.readouterr().err


def test_a_wrong_fold_is_not_saved(finished, tmp_path, capsys, monkeypatch):
    import widekernel

    right = widekernel.fold

    def wrong(model):
        folded = right(model)
        with torch.no_grad():
            next(p for name, p in folded.named_parameters() if name.endswith("kernels.0")).mul_(3)
            folded.head.fc.bias.add_(0.5)
        return folded

    monkeypatch.setattr(widekernel, "fold", wrong)
    assert main(["fold", str(finished), "--output", str(tmp_path / "folded.safetensors")]) == 2
    assert "Nothing was saved" in capsys.readouterr().err
    assert not (tmp_path / "folded.safetensors").exists()


def test_finished_run_is_reported_not_repeated(finished, images, tmp_path, capsys):
    config = write_config(tmp_path, images)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main(["train", "--config", str(config), "--output", str(finished), "--data.workers", "1"]) == 0
    assert "already finished" in capsys.readouterr().out
    changed = [path.name for path in before if path.is_file() and path.stat().st_mtime_ns != before[path]]
    assert not changed


def test_other_configuration_in_the_same_folder(finished, images, tmp_path, capsys):
    config = write_config(tmp_path, images)
    arguments = ["train", "--config", str(config), "--output", str(finished)]
    assert main([*arguments, "--optimizer.lr", "0.5", "--seed", "4"]) == 2
    message = capsys.readouterr().err
    assert "optimizer.lr: 0.01 there, 0.5 now" in message
    assert "seed: 0 there, 4 now" in message
    assert "schedule" not in message


def test_damaged_model_file(finished, tmp_path, capsys):
    content = (finished / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("cut", "text"):
        assert main(["eval", str(tmp_path / f"{name}.safetensors")]) == 2
        assert f"{name}.safetensors" in capsys.readouterr().err


def test_a_checkpoint_in_an_official_layout(images, tmp_path, capsys):
    import timm

    import widekernel

    model = timm.create_model("replknet_nano", num_classes=2)
    widekernel.save_checkpoint(model, tmp_path / "net.pth", layout="official")
    data = ["--data.root", str(images), "--data.workers", "0", "--data.input_size", "64"]
    assert main(["eval", str(tmp_path / "net.pth"), *data]) == 2
    assert "--model NAME" in capsys.readouterr().err
    arguments = [tmp_path / "net.pth", "--model", "replknet_nano", "--num_classes", "2", *data]
    assert evaluate(capsys, *arguments)["images"] == 13
    assert main(["eval", *map(str, arguments), "--weights", "ema"]) == 2
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "net.pth"), "--model", "replknet_nano", *data]) == 2
    assert "--num_classes" in capsys.readouterr().err


def test_fine_tuning_starts_from_weights(finished, images, tmp_path):
    config = write_config(tmp_path, images, optimizer={"lr": 1e-12, "weight_decay": 0.0}, ema={"decay": None})
    arguments = ["train", "--config", str(config), "--output", str(tmp_path / "run")]
    assert main([*arguments, "--model.weights", str(finished / "model.safetensors"), "--schedule.epochs", "1"]) == 0
    from safetensors.torch import load_file

    before, after = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path / "run"))
    assert torch.allclose(before["head.fc.weight"], after["head.fc.weight"], atol=1e-6)


def test_models_of_timm_can_be_trained(images, tmp_path, capsys):
    config = write_config(tmp_path, images, model={"name": "test_resnet"}, ema={"decay": None})
    assert main(["train", "--config", str(config), "--output", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert evaluate(capsys, tmp_path / "run")["top1"] == summary["val_top1"]
    assert main(["eval", str(tmp_path / "run"), "--weights", "ema"]) == 2
    assert "ema.decay is null" in capsys.readouterr().err


def test_interrupted_process_saves_and_resumes(finished, images, tmp_path):
    config = write_config(tmp_path, images)
    command = [sys.executable, "-c", "from widekernel.cli.main import main; raise SystemExit(main())", "train",
               "--config", str(config), "--output", str(tmp_path / "run"), "--data.workers", "1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not read_metrics(metrics) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group, workers included
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "The same command resumes" in errors
    assert main(command[3:]) == 0
    whole, resumed = (without_timings(read_metrics(folder / "metrics.jsonl")) for folder in (finished, tmp_path / "run"))
    assert [row["step"] for row in whole] == [row["step"] for row in resumed]
    for left, right in zip(whole, resumed, strict=True):
        assert left == pytest.approx(right, rel=1e-4), "resumed in another process"
