"""Evaluation by several processes, of averaged weights and folded networks, and through a map of classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from timm.data import ImageNetInfo

from widekernel.cli.eval import make_parser
from widekernel.cli.main import main
from widekernel.cli.options import parse_with_data_of_the_run
from widekernel.cli.parsing import parse
from widekernel.data import Preprocessing
from widekernel.tasks.assembly import build_model
from widekernel.tasks.saved import SavedModel, save_model

ARGS = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
PREPROCESSING = Preprocessing(32, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of ten classes whose batch norms have seen something."""
    torch.manual_seed(0)
    model = build_model("slak_nano", 10, ARGS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1.0)
        model.get_classifier().weight.mul_(30)
    model.train()
    for _ in range(3):
        model(torch.randn(16, 3, 32, 32))
    path = tmp_path_factory.mktemp("network") / "model.safetensors"
    names = tuple(str(number) for number in range(10))
    save_model(model.eval(), path, SavedModel("slak_nano", ARGS, "training", 10, names, PREPROCESSING))
    return path


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    options = ("--device", "cpu", "--data.workers", "0", "--json")
    assert main(["eval", *map(str, arguments), *options]) == 0
    return json.loads(capsys.readouterr().out)


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["eval", *map(str, arguments), "--device", "cpu", "--data.workers", "0"]) != 0
    return " ".join(capsys.readouterr().err.split())


def test_fold_check(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = evaluated(capsys, source, "--data.name", "digits")
    both = evaluated(capsys, source, "--data.name", "digits", "--fold-check")
    assert {key: both[key] for key in plain} == plain
    assert both["folded"]["images"] == plain["images"] > 300
    assert both["folded"]["top1"] == pytest.approx(plain["top1"], abs=0.6)
    assert 0 < both["max_difference"] < 1e-3 * both["max_logit"]
    options = ["--data.name", "digits", "--fold-check", "--device", "cpu", "--data.workers", "0"]
    assert main(["eval", str(source), *options]) == 0
    text = capsys.readouterr().out
    assert "network" in text and "folded" in text and "difference" in text and text.count(f"{plain['top1']:.2f} %") == 2


def test_fold_check_finds_a_difference(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        other = build_model("slak_nano", 10, ARGS)
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            other.get_classifier().bias[3] += 100.0
        return other

    monkeypatch.setattr("widekernel.fold", wrong)
    both = evaluated(capsys, source, "--data.name", "digits", "--fold-check")
    assert both["max_difference"] == pytest.approx(100, abs=1e-3)
    assert both["folded"]["top1"] != both["top1"]


def test_a_folded_network_has_nothing_to_compare(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fold", str(source), "--output", str(tmp_path / "folded.safetensors")]) == 0
    capsys.readouterr()
    assert "this one is folded" in failed(capsys, tmp_path / "folded.safetensors", "--data.name", "digits", "--fold-check")


def test_crop_of_the_test(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    center = evaluated(capsys, source, "--data.name", "digits")
    cropped = evaluated(capsys, source, "--data.name", "digits", "--data.crop_pct", "0.5")
    warped = evaluated(capsys, source, "--data.name", "digits", "--test_crop", "warp")
    assert cropped["loss"] != center["loss"]
    assert warped["loss"] == center["loss"]  # the images are square
    assert "'warp' crops nothing" in failed(
        capsys, source, "--data.name", "digits", "--test_crop", "warp", "--data.crop_pct", "0.5"
    )


def test_ema_chooses_the_weights(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--ema is false, but --weights is ema" in failed(
        capsys, source, "--data.name", "digits", "--ema", "false", "--weights", "ema"
    )
    assert "holds one set of weights" in failed(capsys, source, "--data.name", "digits", "--ema", "true")
    network = build_model("slak_nano", 10, ARGS)
    other = build_model("slak_nano", 10, ARGS)
    path = source.parent / "official.pth"
    torch.save({"model": network.state_dict(), "model_ema": other.state_dict()}, path)
    described = ["--model", "slak_nano", "--num_classes", "10", "--data.name", "digits", "--data.input_size", "32"]
    described += [f"--model_args.{key}={json.dumps(value)}" for key, value in ARGS.items()]
    raw, averaged = (evaluated(capsys, path, *described, "--ema", value) for value in ("false", "true"))
    assert raw["loss"] != averaged["loss"]
    assert evaluated(capsys, path, *described) == raw


# -- several processes -----------------------------------------------------------------------------------------------


def printed(command: list[str]) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["--processes", "torchrun"])
def test_two_processes_count_each_image_once(source: Path, capsys: pytest.CaptureFixture[str], launcher: str) -> None:
    alone = evaluated(capsys, source, "--data.name", "digits", "--fold-check", "--batch_size", "50")
    options = [str(source), "--data.name", "digits", "--device", "cpu", "--data.workers", "0", "--json", "--fold-check"]
    options += ["--batch_size", "50"]
    if launcher == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "widekernel"]
        together = printed([*start, "eval", *options])
    else:
        together = printed([sys.executable, "-m", "widekernel", "eval", *options, "--processes", "2"])
    for key in ("top1", "top5", "images", "unreadable"):
        assert together[key] == alone[key]
        assert together["folded"][key] == alone["folded"][key]
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert 0 < together["max_difference"] < 1e-3 * together["max_logit"]


def test_too_many_processes_are_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--processes is 9999, but must be at most" in failed(
        capsys, source, "--processes", "9999", "--data.name", "digits"
    )


# -- maps of classes -------------------------------------------------------------------------------------------------

SYNSETS = ("n01440764", "n02123045", "n04399382", "n07920052")  # the third is not in ImageNet-22K


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synsets")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, name in enumerate(SYNSETS):
            (root / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = generator.integers(0, 60, (32, 32, 3), dtype=np.uint8) + np.uint8(60 * number)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def wide_network(outputs: int, path: Path) -> torch.nn.Module:
    torch.manual_seed(1)
    model = build_model("slak_nano", outputs, ARGS)
    with torch.no_grad():
        model.get_classifier().bias.normal_()
    torch.save({"model": model.state_dict()}, path)
    return model


def describing(outputs: int) -> list[str]:
    sizes = [f"--model_args.{key}={json.dumps(value)}" for key, value in ARGS.items()]
    return ["--model", "slak_nano", "--num_classes", str(outputs), *sizes, "--data.input_size", "32"]


def test_a_classifier_of_22k_classes_on_some_of_1k(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in22k.pth"
    model = wide_network(21841, path).eval()
    options = [path, *describing(21841), "--data.root", images]
    found = evaluated(capsys, *options, "--data.class_map", "imagenet-22k")
    names = ImageNetInfo("imagenet-22k").label_names()
    rows = [names.index(name) for name in SYNSETS if name in names]
    assert len(rows) == 3
    transform = Preprocessing(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875).eval_transform()
    right = 0
    for number, name in enumerate(SYNSETS):
        for file in sorted((images / "val" / name).iterdir()):
            with torch.inference_mode():
                logits = model(transform(Image.open(file).convert("RGB"))[None])[0, rows]
            right += [0, 1, 3][logits.argmax()] == number
    assert found["top1"] == pytest.approx(100 * right / 16)
    assert found["loss"] < 50
    assert (
        main(["eval", *map(str, options), "--data.class_map", "imagenet-22k", "--device", "cpu", "--data.workers", "0"]) == 0
    )
    told = " ".join(capsys.readouterr().err.split())
    assert "3 outputs are used" in told and "1 of 4 classes have none: n04399382" in told
    assert "--data.class_map" in failed(capsys, *options)


def test_map_from_a_file(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide_network(20, tmp_path / "wide.pth")
    options = [tmp_path / "wide.pth", *describing(20), "--data.root", images, "--data.class_map", tmp_path / "map.txt"]
    (tmp_path / "map.txt").write_text("3\n1\n-1\n17\n")
    assert evaluated(capsys, *options)["images"] == 16
    for text, error in (
        ("3\n1\n2\n", "holds 3 outputs, but the data has 4 classes"),
        ("3\n1\nx\n7\n", "holds 'x'"),
        ("3\n1\n2\n20\n", "chooses output 20, but the network has 20 outputs"),
    ):
        (tmp_path / "map.txt").write_text(text)
        assert error in failed(capsys, *options)
    assert "neither a readable file" in failed(capsys, *options[:-1], "imagenet-23k")


def test_the_map_of_a_run_was_for_the_weights_that_it_started_from(tmp_path: Path) -> None:
    settings = {"data": {"name": "digits", "class_map": "imagenet-22k", "val_split": None, "test_crop": "warp"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    values, has_data = parse_with_data_of_the_run(make_parser(), [str(tmp_path)])
    data = values["data"]
    assert has_data
    assert (data["name"], data["class_map"], data["val_split"], data["test_crop"]) == ("digits", None, None, "warp")


def test_options_of_the_command() -> None:
    values = parse(make_parser(), ["runs/x", "--fold-check", "--ema", "true", "--test_crop", "warp", "--processes", "2"])
    assert (values["fold_check"], values["ema"], values["test_crop"], values["processes"]) == (True, True, "warp", 2)
