"""Segmentation and detection through the command line: training, resuming, evaluation and folding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from tests.engine.test_resume import KillAt, Killed
from tests.engine.tiny import without_timings
from tests.tasks.dense_settings import settings_of, write_scenes, write_settings

import widekernel
from widekernel.cli.main import main
from widekernel.cli.train import parse_config
from widekernel.engine.metrics_log import read_metrics
from widekernel.engine.run_folder import RunFolder
from widekernel.tasks.registry import task_entry
from widekernel.tasks.saved import read_saved, restore_model


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    """Return what `widekernel eval --json` prints."""
    capsys.readouterr()
    code = main(["eval", *map(str, arguments), "--json", "--device", "cpu"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return json.loads(shown.out)


@pytest.mark.parametrize(
    "kind",
    [
        "segmentation",
        "fcos",
        pytest.param("cascade_rcnn", marks=pytest.mark.slow),
        pytest.param("mask_rcnn", marks=pytest.mark.slow),
    ],
)
def test_a_run_and_its_evaluation(kind: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = write_settings(tmp_path / "run.yaml", settings_of(kind, scenes)), tmp_path / "run"
    arguments = ["train", "--config", file, "--output", str(run)]
    assert main(arguments) == 0, capsys.readouterr().err
    folder = RunFolder(run)
    summary = folder.read_summary()
    assert summary is not None and summary["step"] == 2
    assert main(arguments) == 0
    assert "was already finished" in capsys.readouterr().out
    saved = read_saved(folder.model)
    assert saved.task == ("segmentation" if kind == "segmentation" else "detection")
    first = "miou" if kind == "segmentation" else "box_ap"
    for source in (run, folder.model):
        found = evaluated(capsys, source, "--data.workers", "0")
        same = summary[f"val_{first}"]
        assert found[first] == pytest.approx(same, abs=1e-6)
        assert [line["name"] for line in found["classes"]] == list(saved.class_names)
    assert main(["fold", str(run)]) == 0, capsys.readouterr().err
    folded = evaluated(capsys, run / "model_folded.safetensors", "--data.workers", "0")
    assert folded[first] == pytest.approx(found[first], abs=2.0)


@pytest.mark.parametrize(
    "kind",
    [
        "segmentation",
        pytest.param("fcos", marks=pytest.mark.slow),
        pytest.param("cascade_rcnn", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_twice_resumes_bit_for_bit(kind: str, scenes: Path, tmp_path: Path) -> None:
    changes = {"model": {"args": {"drop_path_rate": 0.2}}, "ema": {"decay": 0.5}}
    model = {**settings_of(kind, scenes)["model"], **changes["model"]}
    file = write_settings(tmp_path / "run.yaml", settings_of(kind, scenes, 4, model=model, ema=changes["ema"]))
    whole, killed = (parse_config(["--config", file, "--output", str(tmp_path / name)]) for name in ("whole", "killed"))
    train = task_entry(whole.task).train_function()
    train(whole)
    for step in (1, 3):
        with pytest.raises(Killed):
            train(killed, KillAt(step))
    train(killed)
    folders = [RunFolder(str(config.output)) for config in (whole, killed)]
    for ours, theirs in zip(*([each.model, each.model_ema] for each in folders), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    rows = [without_timings(read_metrics(each.metrics)) for each in folders]
    assert str(rows[0]) == str(rows[1]) and len(rows[0]) == 4


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["segmentation", "fcos", "cascade_rcnn"])
def test_two_processes_equal_one(kind: str, scenes: Path, tmp_path: Path) -> None:
    """Plain SGD with clipped gradients keeps the growth of rounding small; AdamW would divide by roots of tiny numbers.

    The cascade uses all of its proposals, none of which overlap much: which of several with nearly equal scores are chosen
    depends on the last digit. `test_detection_processes.py` has neither limit, in double precision.
    """
    settings = settings_of(kind, scenes, 10)
    changes: dict[str, Any] = {"optimizer": {"name": "sgd", "lr": 1e-3, "clip_grad": 1.0}, "evaluation": {"every_steps": 10}}
    if kind == "segmentation":
        changes["model"] = {"dropout": 0.0}  # its random numbers depend on the division of a batch
    else:
        changes["data"] = {"image_scale": [96, 48], "short_sides": [32, 48]}  # images of different sizes
    if kind == "cascade_rcnn":
        changes["optimizer"]["lr"] = 3e-4
        changes["model"] = {"anchor_scale": 2.0, "proposals": 600, "roi_samples": 1200, "channels": 16}
        changes["data"]["short_sides"] = [24, 32]
    settings |= {key: {**settings.get(key, {}), **values} for key, values in changes.items()}
    file, folders = write_settings(tmp_path / "run.yaml", settings), []
    for number in (1, 2):
        run = tmp_path / str(number)
        assert main(["train", "--config", file, "--output", str(run), "--processes", str(number)]) == 0
        folders.append(RunFolder(run))
    one, two = ([row["train_loss"] for row in read_metrics(each.metrics)] for each in folders)
    assert len(one) == 10 and two == pytest.approx(one, rel=1e-4)
    weights = [load_file(each.model) for each in folders]
    for name, value in weights[0].items():
        # Statistics of features in the cascade's box heads; in double precision they are equal too.
        bound = 1e-2 if "bbox_head" in name and "running_" in name else 1e-4
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=bound, msg=f"{name} differs")


@pytest.mark.slow
def test_training_starts_from_a_classifier_or_a_whole_network(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = timm.create_model("slak_nano", num_classes=7)
    widekernel.save_checkpoint(classifier, tmp_path / "classifier.safetensors")
    model = {"name": "slak_nano", "weights": str(tmp_path / "classifier.safetensors")}
    settings = settings_of("segmentation", scenes, 2, model=model, loop={"batch_size": 2})
    assert main(["train", "--config", write_settings(tmp_path / "a.yaml", settings), "--output", str(tmp_path / "a")]) == 0
    assert "loaded into the backbone" in capsys.readouterr().err
    settings["model"]["weights"] = str(tmp_path / "a" / "model.safetensors")
    file = write_settings(tmp_path / "b.yaml", settings)
    assert main(["train", "--config", file, "--output", str(tmp_path / "b")]) == 0
    assert "loaded into the whole network" in capsys.readouterr().err


def test_official_files_are_evaluated(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    settings = settings_of("segmentation", scenes)
    file = write_settings(tmp_path / "run.yaml", settings)
    assert main(["train", "--config", file, "--output", str(run)]) == 0
    model, _ = restore_model(run / "model.safetensors")
    official = widekernel.save_checkpoint(model, tmp_path / "official.pth", layout="official")
    options = {**{f"model.{key}": value for key, value in settings["model"].items()}, "data.workers": 0}
    options |= {f"data.{key}": settings["data"][key] for key in ("root", "image_scale")}
    arguments = [f"--{key}={value}" for key, value in options.items()]
    found = evaluated(capsys, official, "--task", "segmentation", *arguments)
    assert found["miou"] == pytest.approx(evaluated(capsys, run, "--data.workers", "0")["miou"], abs=1e-4)
    backbone = widekernel.save_checkpoint(model.backbone, tmp_path / "backbone.safetensors")
    assert main(["eval", str(backbone), "--task", "segmentation", *arguments]) == 2
    assert "holds no heads for segmentation" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_with_a_remedy(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = settings_of("segmentation", scenes, evaluation={"every_steps": 100})
    assert main(["train", "--config", write_settings(tmp_path / "run.yaml", settings), "--output", str(run)]) == 0
    assert main(["eval", str(run), "--model.channels", "7"]) == 2
    assert "--model.channels cannot be used with" in capsys.readouterr().err
    settings = settings_of("segmentation", scenes, data={"crop_size": 16})
    assert main(["train", "--config", write_settings(tmp_path / "b.yaml", settings), "--output", str(tmp_path / "b")]) == 2
    assert "raise data.crop_size." in capsys.readouterr().err
    slide = ["--test.mode", "slide", "--test.crop", "[16,16]", "--test.stride", "[16,16]"]
    assert main(["eval", str(run), "--device", "cpu", *slide]) == 2
    assert "raise data.test_scale or test.crop." in capsys.readouterr().err
    (tmp_path / "classes.txt").write_text("\n".join("abcdefg"))
    model = {"weights": str(run / "model.safetensors")}
    settings = settings_of("segmentation", scenes, model=model, data={"classes": str(tmp_path / "classes.txt")})
    assert main(["train", "--config", write_settings(tmp_path / "c.yaml", settings), "--output", str(tmp_path / "c")]) == 2
    assert "set model.load to backbone" in capsys.readouterr().err


def test_other_commands_refuse_a_network_of_another_task(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = settings_of("segmentation", scenes, evaluation={"every_steps": 100})
    assert main(["train", "--config", write_settings(tmp_path / "run.yaml", settings), "--output", str(run)]) == 0
    for arguments in (["sparsify", str(run)], ["complexity", str(run)], ["eval", str(run), "--task", "detection"]):
        capsys.readouterr()
        assert main(arguments) == 2
        assert "holds a network for segmentation, but" in capsys.readouterr().err
    model, saved = restore_model(run / "model.safetensors")
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, len(saved.class_names), 16, 16)
