"""Two optimizer steps of every recipe for segmentation and detection, with a nano network on generated scenes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes.scaled import write_dense_settings
from tests.tasks.dense_settings import write_scenes
from widekernel.cli.train import parse_config
from widekernel.engine.metrics_log import read_metrics
from widekernel.recipes import list_recipes, load_recipe
from widekernel.sparsity import load_masks
from widekernel.tasks.registry import task_entry

DENSE = [name for name in list_recipes() if load_recipe(name).task != "classification"]
SAMPLE = ["slak_tiny_ade20k_160k_512", "replknet_31b_coco_24e_800_fcos"]
"""Recipes that run in the short form of the tests."""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=8, val=2)


@pytest.mark.parametrize("name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in DENSE])
def test_two_steps(name: str, scenes: Path, tmp_path: Path) -> None:
    recipe, run = load_recipe(name), tmp_path / "run"
    file = write_dense_settings(name, scenes, tmp_path)
    config = parse_config(["--recipe", name, "--config", str(file), "--output", str(run)])
    assert config.task == recipe.task and config.optimizer.lr == recipe.settings["optimizer"]["lr"]
    assert config.schedule.kind == recipe.settings["schedule"]["kind"]
    result = task_entry(config.task).train_function()(config)
    assert result.summary["step"] == 2
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "train_loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(torch.isfinite(torch.tensor(row["train_loss"])) for row in rows)
    key = "val_miou" if recipe.task == "segmentation" else "val_box_ap"
    assert key in result.summary
    assert ("val_mask_ap" in result.summary) == (recipe.task == "detection" and config.data.masks)
    weights = load_file(run / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    if config.sparsity.method == "none":
        assert not (run / "masks.safetensors").exists()
        return
    masks = load_masks(run / "masks.safetensors")
    start = torch.load(tmp_path / "start.pth", weights_only=True)
    body = {f"backbone.body.{key}": value for key, value in start.items()}
    dead = sum(int((~mask).sum()) for mask in masks.values())
    assert dead > 0
    for key, mask in masks.items():
        assert not weights[key][~mask].any()
        if key in body and config.sparsity.dynamic.block == "element":
            assert torch.equal(mask, body[key] != 0), key
