"""Two optimizer steps of every recipe with a nano network on 64 images, on one and on two processes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes.scaled import CLASSES, nano_model, write_images, write_settings
from widekernel.cli.main import main
from widekernel.cli.train import parse_config
from widekernel.engine.metrics_log import read_metrics
from widekernel.recipes import list_recipes, load_recipe
from widekernel.sparsity import load_masks
from widekernel.tasks.assembly import build_model
from widekernel.tasks.classification.config import TrainConfig
from widekernel.tasks.classification.run import train
from widekernel.tasks.config import FIRST_TASK

SAMPLE = ["convnext_base_in22k_90e_224", "convnext_tiny_in1k_10e_224_2to4", "slak_tiny_in1k_300e_224"]
"""Recipes that run in the short form of the tests."""

TWO_PROCESSES = [
    "convnext_tiny_in1k_300e_224",
    "convnext_xlarge_in1k_30e_384_from_in22k",
    "replknet_31b_in1k_30e_384_from_in22k",
    "resnet50_in1k_1e_224_2to4",
    "roadmap_00_resnet50_in1k_300e_224",
    "shiftwise_tiny_in1k_300e_224",
    "slak_pw_tiny_in1k_120e_224_coarse_pad_half_k",
    "slak_tiny_in1k_300e_224",
]
WITHOUT_BATCH_NORM = {"convnext_tiny_in1k_300e_224", "convnext_xlarge_in1k_30e_384_from_in22k"}

FIELDS = {field.name for field in dataclasses.fields(TrainConfig)}
TRAINED = [
    name
    for name in list_recipes()
    if (recipe := load_recipe(name)).command == "train"
    and recipe.settings.keys() <= FIELDS
    and recipe.family != "demo"
    and recipe.task == FIRST_TASK
]
BASELINES = [name for name in list_recipes() if load_recipe(name).command == "sparsify"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("name", [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.slow) for n in TRAINED])
def test_two_steps(name: str, images: Path, tmp_path: Path) -> None:
    config = parse_config(
        ["--recipe", name, "--config", str(write_settings(name, images, tmp_path)), "--output", str(tmp_path / "run")]
    )
    original = load_recipe(name).settings
    assert config.optimizer.lr == original["optimizer"]["lr"] and config.schedule.epochs == original["schedule"]["epochs"]
    result = train(config)
    run = tmp_path / "run"
    assert result.summary["step"] == 2
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "train_loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(torch.isfinite(torch.tensor(row["train_loss"])) for row in rows)
    weights = load_file(run / "model.safetensors")
    assert (run / "model_ema.safetensors").exists() == (config.ema.decay is not None)
    evaluated = any("top1" in key for row in read_metrics(run / "metrics.jsonl") for key in row)
    assert evaluated == (config.data.val_split is not None)
    if config.sparsity.method != "none":
        masks = load_masks(run / "masks.safetensors")
        assert masks and all(not weights[key][~mask].any() for key, mask in masks.items())
        live, masked = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
        if config.sparsity.method == "semi_structured":
            assert 2 * live == masked
        elif config.sparsity.dynamic.block == "element":
            # The published rule leaves layers dense that would be almost dense, so zeros are counted among all weights.
            weight_count = sum(weight.numel() for weight in weights.values() if weight.ndim > 1)
            assert (masked - live) / weight_count == pytest.approx(config.sparsity.dynamic.sparsity, abs=0.05)
        else:
            assert 0 < live < masked and {key for key in masks if "mixer" not in key} == set()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes(name: str, images: Path, tmp_path: Path) -> None:
    settings = ["--recipe", name, "--config", str(write_settings(name, images, tmp_path))]
    if name not in WITHOUT_BATCH_NORM:
        # Batch norms see the images of both processes, as in one process that takes all of them at once. What is drawn for
        # each forward pass then differs.
        settings += ["--augment.mixup=0", "--augment.cutmix=0", "--loop.sync_batch_norm=true", "--loop.micro_batch=null"]
        settings += ["--model.args.drop_path_rate=0"]
    environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "widekernel", "train", *settings, "--processes", "2", "--output", str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    alone = train(parse_config([*settings, "--output", str(tmp_path / "one")]))
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert two["step"] == alone.summary["step"] == 2
    rows = [
        [row["train_loss"] for row in read_metrics(tmp_path / run / "metrics.jsonl") if "train_loss" in row]
        for run in ("one", "two")
    ]
    assert rows[1] == pytest.approx(rows[0], rel=1e-4)
    one, other = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    assert one.keys() == other.keys()
    # AdamW's first steps have the size of the learning rate and the sign of the gradient, which may be that of a rounding
    # error: few weights may differ, and by two steps.
    rate = load_recipe(name).settings["optimizer"]["lr"]
    away = torch.cat([(other[key].double() - value.double()).abs().flatten() for key, value in one.items() if value.ndim])
    assert away.max() <= 4 * rate and (away > 0.01 * rate).double().mean() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_masks_by_magnitude(name: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = load_recipe(name)
    model, args = nano_model(recipe.model, {})
    torch.save(build_model(model, CLASSES, args).state_dict(), tmp_path / "dense.pth")
    given = [f"--model_args.{key}={json.dumps(value)}" for key, value in args.items()]
    command = [
        "sparsify",
        str(tmp_path / "dense.pth"),
        "--recipe",
        name,
        "--model",
        model,
        f"--num_classes={CLASSES}",
        *given,
    ]
    assert main([*command, "--data.root", str(images), "--data.input_size=32", "--data.workers=0", "--device=cpu"]) == 0
    assert "top-1" in capsys.readouterr().out
    masks = load_masks(next(tmp_path.glob("*_masks.safetensors")))
    assert masks and all(2 * int(mask.sum()) == mask.numel() for mask in masks.values())
