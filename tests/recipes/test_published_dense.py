"""Recipes of segmentation and detection against the published runs: settings, batches, schedules, groups and sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.parity.downstream.reference import folder
from tests.parity.downstream.test_parameter_groups import expected_options, found_options
from tests.recipes.published_dense import IMAGES, Dense
from tests.recipes.published_detection import DETECTION, Detected
from tests.recipes.published_segmentation import SEGMENTATION, Segmented
from widekernel.cli.parsing import build
from widekernel.data import BatchPlan
from widekernel.engine.parameter_groups import parameter_groups
from widekernel.engine.reporter import RunLength
from widekernel.engine.schedule import create_schedule
from widekernel.recipes import list_recipes, load_recipe, recipe_of_checkpoint
from widekernel.recipes.networks import build_published
from widekernel.tasks.networks import build_detector, build_segmenter
from widekernel.tasks.registry import task_entry
from widekernel.weights import find_checkpoint, list_checkpoints

DENSE: dict[str, Segmented | Detected] = {**SEGMENTATION, **DETECTION}
SAMPLE = ["convnext_tiny_ade20k_160k_512", "replknet_31b_coco_24e_800_fcos"]
"""Recipes whose full-size networks are built in the short form of the tests."""

GROUPS = {
    "convnext_tiny_ade20k_160k_512": "convnext_tiny_ade",
    "convnext_tiny_coco_36e_800_cascade": "convnext_tiny_coco",
    "slak_tiny_ade20k_160k_512": "slak_tiny_ade",
    "slak_tiny_ade20k_80k_512": "slak_tiny_ade_80k",
    "replknet_31b_coco_24e_800_fcos": "replknet31b_fcos",
}
"""Recipes whose groups of parameters are among the reference numbers."""

NETWORKS: dict[str, nn.Module] = {}


def config_of(name: str) -> Any:
    """Return the settings of a recipe, without the command line, which takes longer."""
    recipe = load_recipe(name)
    return build(task_entry(recipe.task).settings_class(), recipe.settings)


def network(name: str) -> nn.Module:
    """Build the full-size network of a recipe, without memory for its weights."""
    if name not in NETWORKS:
        config = config_of(name)
        with torch.device("meta"):
            if config.task == "segmentation":
                classes = {"ADE20K": 150, "Cityscapes": 19}[load_recipe(name).dataset]
                NETWORKS[name] = build_segmenter(config.model, classes)
            else:
                NETWORKS[name] = build_detector(config.model, 80, config.data.masks)
    return NETWORKS[name]


def sampled(names: Any) -> list[Any]:
    return [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in names]


def golden(shared: Path, file: str) -> Any:
    return json.loads((folder(shared) / "golden" / file).read_text())


# -- settings -------------------------------------------------------------------------------------------------------------


def test_every_published_run_has_a_recipe() -> None:
    found = {name for name in list_recipes() if load_recipe(name).task != "classification"}
    assert found == set(DENSE)
    assert all(load_recipe(name).task == "segmentation" for name in SEGMENTATION)
    assert all(load_recipe(name).task == "detection" for name in DETECTION)


def test_every_supported_checkpoint_has_a_recipe() -> None:
    for checkpoint in list_checkpoints():
        recipe = recipe_of_checkpoint(checkpoint.name)
        assert (recipe is not None) == (checkpoint.task != "classification"), checkpoint.name
        if recipe is not None:
            assert (recipe.task, recipe.model) == (checkpoint.task, checkpoint.model)
            assert recipe.published == dict(checkpoint.metrics)
            assert checkpoint.data is not None and checkpoint.data.startswith(recipe.dataset)
            assert tuple(recipe.settings["data"]["mean"]) == checkpoint.preprocessing["mean"]


@pytest.mark.parametrize("name", DENSE)
def test_shared_settings(name: str) -> None:
    run, recipe, config = DENSE[name], load_recipe(name), config_of(name)
    model = config.model
    assert (model.name, model.args, model.weights) == (run.model, {"drop_path_rate": run.drop_path, **run.args}, run.start)
    assert find_checkpoint(run.start).task == "classification"
    assert (recipe.published, recipe.checkpoint, recipe.verified) == (run.published, run.checkpoint, "none")
    assert (model.load, model.grad_checkpointing) == ("auto", run.checkpointing or run.model.startswith("replknet"))
    assert (config.data.mean, config.data.std) == (
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if run.mean is None else ((run.mean,) * 3, (run.mean,) * 3)
    )
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adamw", run.lr, 0.05)
    assert (optimizer.betas, optimizer.eps) == ((0.9, 0.999), None)
    assert (optimizer.clip_grad, optimizer.clip_mode) == (getattr(run, "clip", None), "norm")
    assert (config.loop.precision, config.loop.sync_batch_norm) == ("fp16" if run.fp16 else "fp32", True)
    assert (config.ema.decay, config.seed) == (0.9999 if run.ema else None, 0)
    assert optimizer.decay_response_norms == run.response_norms
    assert config.sparsity.method == ("dynamic" if run.fixed_zeros else "none")
    if run.fixed_zeros:
        assert (config.sparsity.dynamic.init, config.sparsity.dynamic.growth) == ("from_weights", "none")


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_settings(name: str) -> None:
    run, recipe, config = SEGMENTATION[name], load_recipe(name), config_of(name)
    data, test = config.data, config.test
    assert (recipe.dataset, data.format) == (run.data, run.data.lower())
    assert data.reduces_zero_label == (run.data == "ADE20K")
    assert (data.image_scale, data.crop_size, data.ratio_range) == (run.scale, run.crop, (0.5, 2.0))
    assert (data.cat_max_ratio, data.flip, data.photometric, data.ignore_index) == (0.75, 0.5, True, 255)
    assert (data.test_scale, data.test_ratios, test.flip) == (None, (1.0,), False)
    if run.window is None:
        assert test.mode == "whole"
    else:
        side, stride = run.window
        assert (test.mode, test.crop, test.stride) == ("slide", (side, side), (stride, stride))
    heads = config.model
    assert (heads.channels, heads.pool_scales, heads.dropout, heads.align_corners) == (512, (1, 2, 3, 6), 0.1, run.align)
    assert (heads.auxiliary_channels, heads.auxiliary_weight, config.loss_average) == (256, 0.4, "all")


@pytest.mark.parametrize("name", DETECTION)
def test_detection_settings(name: str) -> None:
    run, recipe, config = DETECTION[name], load_recipe(name), config_of(name)
    data, several = config.data, tuple(range(480, 801, 32))
    boxes_only = run.detector == "fcos"
    assert (recipe.dataset, data.format, data.masks) == ("COCO", "coco", not boxes_only)
    assert (data.image_scale, data.short_sides, data.flip) == ((1333, 800), (640, 800) if boxes_only else several, 0.5)
    assert (data.crop, data.crop_short_sides, data.crop_range) == (not boxes_only, (400, 500, 600), (384, 600))
    assert (data.size_divisor, data.min_size, data.skip_empty) == (32, 32, True)
    model = config.model
    assert (model.detector, model.channels, model.fc_channels) == (run.detector, 256, 1024)
    assert (model.score_threshold, model.overlap_threshold, model.max_detections) == (0.05, 0.5, 100)


# -- batches and schedules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_batches(name: str) -> None:
    run, recipe = DENSE[name], load_recipe(name)
    nodes, gpus, batch = run.devices
    assert recipe.total_batch == run.total == nodes * gpus * batch
    assert recipe.devices is not None and vars(recipe.devices) == {
        "nodes": nodes,
        "gpus": gpus,
        "batch": batch,
        "accumulation": 1,
    }
    loop = config_of(name).loop
    plan = BatchPlan(loop.batch_size, loop.micro_batch, nodes * gpus)
    assert (plan.batch_size, plan.per_pass, plan.accumulate) == (run.total, batch, 1)


def rates(config: Any, length: RunLength, steps: list[int]) -> list[float]:
    """Return the learning rate at each of `steps`."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=config.optimizer.lr)
    schedule = create_schedule(optimizer, config.schedule, length)
    found = []
    for step in steps:
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def official_rate(run: Dense, step: int, per_epoch: int) -> float:
    """Return the learning rate of a step: the course, times the factor of the warm-up."""
    if isinstance(run, Segmented):
        course, warmup, first = run.lr * (1 - step / run.steps), run.warmup, 1e-6
    else:
        assert isinstance(run, Detected)
        passed = sum(step // per_epoch >= milestone for milestone in run.milestones)
        course, warmup, first = run.lr * 0.1**passed, 500, 1 / 3 if run.detector == "fcos" else 1e-3
    if step >= warmup:
        return course
    if isinstance(run, Detected) and run.detector == "fcos":
        return course * first
    return course * (1 - (1 - step / warmup) * (1 - first))


@pytest.mark.parametrize("name", DENSE)
def test_schedule(name: str) -> None:
    run, config = DENSE[name], config_of(name)
    per_epoch = IMAGES[load_recipe(name).dataset] // run.total
    length = RunLength(config.schedule.total_steps(per_epoch), per_epoch)
    if isinstance(run, Segmented):
        assert length.steps == run.steps
        warmup, turns = run.warmup, [length.steps // 3]
    else:
        assert length.steps == run.epochs * per_epoch
        warmup, turns = 500, [milestone * per_epoch for milestone in run.milestones]
    steps = sorted({0, 1, warmup // 2, warmup - 1, warmup, *turns, *(turn - 1 for turn in turns), length.steps - 1})
    expected = [official_rate(run, step, per_epoch) for step in steps]
    assert rates(config, length, steps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", [name for name, run in DENSE.items() if run.schedule is not None])
def test_rates_equal_the_official_ones(name: str, shared: Path) -> None:
    run, config = DENSE[name], config_of(name)
    row = next(row for row in golden(shared, "lr_schedules.json") if row["name"] == run.schedule)
    per_epoch = row.get("iterations_per_epoch", 1000)
    length = RunLength(config.schedule.total_steps(per_epoch), per_epoch)
    factor = run.lr / row["lr"]  # runs of one schedule have several rates
    expected = [factor * value for value in row["values"]]
    assert rates(config, length, row["iterations"]) == pytest.approx(expected, rel=1e-10)
    if isinstance(run, Segmented):
        assert max(row["iterations"]) == length.steps - 1


# -- full-size networks ---------------------------------------------------------------------------------------------------


def official_share(name: str, layers: tuple[float, str]) -> float:
    """Return the share of the learning rate of a parameter."""
    rate, groups = layers
    by, _, number = groups.partition("_wise")
    last = int(number) + 1
    found = re.match(r"backbone\.body\.(?:stem|stages\.(\d)\.(downsample|blocks\.(\d+)))\.", name)
    if found is None:
        return 1.0
    stage, samples = int(found[1] or 0), found[1] is None or found[2] == "downsample"
    if by == "stage":
        group = 0 if samples else stage + 1
    elif samples:
        group = {0: 0, 1: 2, 2: 3, 3: last - 1}[stage]
    else:
        group = {0: 1, 1: 2, 2: 3 + int(found[3]) // 3, 3: last - 1}[stage]
    return float(rate ** (last - group))


@pytest.mark.parametrize("name", sampled(DENSE))
def test_optimizer_groups(name: str) -> None:
    run, config, model = DENSE[name], config_of(name), network(name)
    groups = parameter_groups(model, config.optimizer)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    normed = {
        f"{prefix}.{short}"
        for prefix, module in model.named_modules()
        if isinstance(module, (_BatchNorm, nn.GroupNorm))
        for short, _ in module.named_parameters(recurse=False)
    }
    response = {
        id(parameter) for part in model.modules() if isinstance(part, GlobalResponseNorm) for parameter in part.parameters()
    }
    parameters = dict(model.named_parameters())
    assert len(found) == len(parameters)
    for key, parameter in parameters.items():
        if run.layers is None:
            expected = 1.0, 0.0 if key in normed else 0.05
        else:
            decays = parameter.ndim > 1 and not key.endswith(".bias")
            decays = decays or (run.response_norms and id(parameter) in response)
            expected = official_share(key, run.layers), 0.05 if decays else 0.0
        group = found[id(parameter)]
        assert (group.get("lr_scale", 1.0), group["weight_decay"]) == (pytest.approx(expected[0], rel=1e-12), expected[1]), (
            key
        )


@pytest.mark.parametrize("name", sampled(GROUPS))
def test_groups_equal_the_official_ones(name: str, shared: Path) -> None:
    row = next(row for row in golden(shared, "param_groups.json") if row["name"] == GROUPS[name])
    config = config_of(name)
    assert (row["lr"], row["weight_decay"]) == (config.optimizer.lr, config.optimizer.weight_decay)
    found = found_options(network(name), config.optimizer)
    expected = expected_options(row, set(found))
    assert len(found) == row["parameters"] and found.keys() == expected.keys()
    for key, (share, decay) in expected.items():
        assert found[key] == (pytest.approx(share, rel=1e-12), decay), key


@pytest.mark.parametrize("name", sampled([name for name, run in DENSE.items() if run.size is not None]))
def test_sizes_equal_the_official_ones(name: str, shared: Path) -> None:
    rows = {row["name"]: row for row in golden(shared, "params_flops.json")["rows"]}
    row = rows[DENSE[name].size or ""]
    counts = {key: sum(each.numel() for each in part.parameters()) for key, part in network(name).named_children()}
    assert counts == row["parts"]
    checkpoint = load_recipe(name).checkpoint
    if checkpoint is not None:
        with torch.device("meta"):
            published = build_published(checkpoint)
        assert sum(each.numel() for each in published.parameters()) == row["params"]


def test_every_stored_size_is_compared(shared: Path) -> None:
    rows = {row["name"] for row in golden(shared, "params_flops.json")["rows"]}
    assert rows == {run.size for run in DENSE.values() if run.size is not None}
