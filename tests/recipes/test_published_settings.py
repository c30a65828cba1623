"""Recipes against the published runs: batches, optimizer groups, schedules and augmentation of the full-size networks."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import timm
import torch
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from tests.recipes.published import BASELINES, DISTILLED, IMAGES, MASKED, OTHERS, TRAINED, Run
from widekernel.cli.parsing import build
from widekernel.data import BatchPlan, Preprocessing
from widekernel.engine.optimization import create_optimizer
from widekernel.engine.reporter import RunLength
from widekernel.engine.schedule import create_schedule
from widekernel.recipes import Recipe, list_recipes, load_recipe
from widekernel.settings import flatten
from widekernel.tasks.classification.config import TrainConfig

EVERY_SIZE = [
    "convnext_tiny_in1k_300e_224",
    "replknet_31b_in1k_30e_384_from_in22k",
    "slak_tiny_in1k_300e_224",
    "shiftwise_tiny_in1k_300e_224",
    "unireplknet_a_in1k_300e_224",
]
"""Recipes whose full-size networks are built in the short form of the tests."""


def config_of(recipe: Recipe) -> TrainConfig:
    """Return the settings of a recipe, without the command line, which takes longer."""
    return build(TrainConfig, recipe.settings)


def sampled(names: Any, sample: list[str]) -> list[Any]:
    return [name if name in sample else pytest.param(name, marks=pytest.mark.slow) for name in names]


def test_every_published_run_has_a_recipe() -> None:
    classified = {name for name in list_recipes() if load_recipe(name).task == "classification"}
    assert classified == {*TRAINED, *MASKED, *BASELINES, *DISTILLED, *OTHERS}


@pytest.mark.parametrize("name", TRAINED)
def test_settings(name: str) -> None:
    run, recipe = TRAINED[name], load_recipe(name)
    config = config_of(recipe)
    args = {"drop_path_rate": run.drop_path, **run.args}
    assert (config.model.name, config.model.args, config.model.weights) == (run.model, args, run.start)
    assert config.model.num_classes == (21841 if run.data == "ImageNet-22K" else None)
    assert config.model.head_init_scale == run.head_scale
    assert (recipe.dataset, recipe.published) == (run.data, None if run.top1 is None else {"top1": run.top1})
    assert config.data.val_split == ("val" if run.data == "ImageNet-1K" else None)
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == ("adamw", run.lr, run.weight_decay)
    assert (config.optimizer.clip_grad, config.optimizer.weight_decay_end) == (None, None)
    assert config.ema.decay == (0.9999 if run.ema else None) and not config.ema.warmup
    assert (config.label_smoothing, config.loop.precision) == (run.smoothing, "fp32")
    assert (config.model.grad_checkpointing, config.optimizer.decay_response_norms) == (False, run.response_norms)
    dynamic = config.sparsity.dynamic
    if run.sparsity is None:
        assert config.sparsity.method == "none"
    else:
        found = dynamic.sparsity, dynamic.update_interval, dynamic.prune_fraction, dynamic.block, dynamic.layers
        assert found == run.sparsity and config.sparsity.method == "dynamic"
        assert (dynamic.init, dynamic.growth, dynamic.prune_schedule, dynamic.regrow) == ("snip", "random", "cosine", True)
        assert (dynamic.rule, dynamic.share_every) == ("published", run.share_every)


@pytest.mark.parametrize("name", TRAINED)
def test_batches(name: str) -> None:
    run, recipe = TRAINED[name], load_recipe(name)
    nodes, gpus, batch, accumulation = run.devices
    assert nodes * gpus * batch * accumulation == run.total == recipe.total_batch
    loop = config_of(recipe).loop
    plan = BatchPlan(loop.batch_size, loop.micro_batch, nodes * gpus)
    assert (plan.batch_size, plan.per_pass, plan.accumulate) == (run.total, batch, accumulation)
    assert recipe.devices is not None and vars(recipe.devices) == dict(
        zip(("nodes", "gpus", "batch", "accumulation"), run.devices)
    )


@pytest.mark.parametrize("name", TRAINED)
def test_augmentation(name: str) -> None:
    run, config = TRAINED[name], config_of(load_recipe(name))
    preprocessing = Preprocessing.resolve(config.data, {})
    assert (preprocessing.input_size, preprocessing.interpolation) == (run.size, "bicubic")
    assert preprocessing.mean == (0.485, 0.456, 0.406) and preprocessing.std == (0.229, 0.224, 0.225)
    assert preprocessing.crop_pct == (0.875 if run.size < 384 else 1.0)
    augment = config.augment
    mixing = run.mixing if run.mixes else (0.0, 0.0)
    assert (augment.mixup, augment.cutmix, augment.mix_prob, augment.switch_prob) == (*mixing, 1.0, 0.5)
    transform = preprocessing.train_transform(augment)
    steps = {type(step): step for step in transform.transforms}
    assert steps[RandAugment].ops[0].magnitude == 9 and steps[RandAugment].ops[0].magnitude_std == 0.5
    assert (steps[RandomErasing].probability, steps[RandomErasing].rand_color) == (0.25, False)
    assert steps[RandomErasing].per_pixel and steps[RandomErasing].max_count == 1
    crop = transform.transforms[0]
    assert (crop.size, crop.scale, crop.ratio) == ((run.size, run.size), (0.08, 1.0), (3 / 4, 4 / 3))


def official_rate(run: Run, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step: in a warm-up that includes both ends, or on half a cosine."""
    warmup, total = run.warmup * steps_per_epoch, run.epochs * steps_per_epoch
    if step < warmup:
        return run.lr * step / (warmup - 1)
    angle = math.pi * (step - warmup) / (total - warmup)
    return run.min_lr + (run.lr - run.min_lr) * (1 + math.cos(angle)) / 2


@pytest.mark.parametrize("name", TRAINED)
def test_schedule(name: str) -> None:
    run, config = TRAINED[name], config_of(load_recipe(name))
    per_epoch = IMAGES[run.data] // run.total
    length = RunLength(config.schedule.total_steps(per_epoch), per_epoch)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=config.optimizer.lr)
    schedule = create_schedule(optimizer, config.schedule, length)
    assert length.steps == run.epochs * per_epoch
    warmup = run.warmup * per_epoch
    for step in {0, 1, warmup // 3, warmup - 1, warmup, warmup + 1, length.steps // 2, length.steps - 1} - {-1}:
        schedule.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(official_rate(run, step, per_epoch), abs=1e-12), step


@pytest.mark.parametrize("name", sampled(TRAINED, EVERY_SIZE))
def test_optimizer_groups(name: str) -> None:
    run, config = TRAINED[name], config_of(load_recipe(name))
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        model = timm.create_model(config.model.name, num_classes=1000, **config.model.args)
    optimizer = create_optimizer(model, config.optimizer)
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)
    of = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    norms = [each for each in model.modules() if isinstance(each, GlobalResponseNorm)]
    response = {id(parameter) for norm in norms for parameter in norm.parameters()}
    assert bool(response) == run.response_norms
    scales = set()
    for key, parameter in model.named_parameters():
        group = of[id(parameter)]
        decays = (parameter.ndim > 1 and not key.endswith(".bias")) or id(parameter) in response
        assert group["weight_decay"] == (run.weight_decay if decays else 0.0), key
        assert group["lr"] == run.lr, key
        scales.add(group.get("lr_scale", 1.0))
        if run.layer_decay is not None and key.startswith(("stem.", "head.", "stages.3.blocks.")):
            layer = {"stem": 0, "head": 13, "stages": 12}[key.split(".")[0]]
            assert group["lr_scale"] == pytest.approx(run.layer_decay ** (13 - layer), rel=1e-12), key
    if run.layer_decay is None:
        assert scales == {1.0}
    else:
        assert sorted(scales) == pytest.approx([run.layer_decay ** (13 - layer) for layer in range(14)], rel=1e-12)


@pytest.mark.parametrize("name", MASKED)
def test_learned_masks(name: str) -> None:
    model, batch, epochs = MASKED[name]
    recipe = load_recipe(name)
    config = config_of(recipe)
    assert (config.model.name, config.model.weights) == (model, f"{model}.tv_in1k")
    assert (config.loop.batch_size, config.loop.micro_batch, recipe.total_batch) == (batch, None, batch)
    assert (config.optimizer.name, config.optimizer.lr, config.label_smoothing) == ("adamw", 1.0, 0.0)
    assert (config.schedule.epochs, config.schedule.kind, config.schedule.warmup_epochs) == (epochs, "step", 0)
    preprocessing = Preprocessing.resolve(config.data, {})
    assert (preprocessing.input_size, preprocessing.crop_pct, preprocessing.interpolation) == (224, 0.875, "bilinear")
    steps = [type(step).__name__ for step in preprocessing.train_transform(config.augment).transforms]
    assert steps[:2] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip"]
    assert not {"RandAugment", "RandomErasing"} & set(steps) and not config.augment.mixes
    masks = config.sparsity.semi_structured
    assert (config.sparsity.method, masks.method, masks.axis) == ("semi_structured", "learned", "im2col")
    assert (masks.tau_start, masks.tau_end, masks.kappa_start, masks.kappa_end) == (1.0, 1.0, 1.0, 1.0)
    assert (masks.prior_strength, masks.entropy_penalty, masks.weight_regularization) == (0.0, 0.0, 0.0)

    per_epoch = IMAGES["ImageNet-1K"] // batch
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = create_schedule(optimizer, config.schedule, RunLength(epochs * per_epoch, per_epoch))
    for epoch in range(epochs):
        schedule.step_update(epoch * per_epoch)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 ** (epoch // 3), rel=1e-12), epoch


@pytest.mark.parametrize("name", BASELINES)
def test_masks_by_magnitude(name: str) -> None:
    model, method = BASELINES[name]
    recipe = load_recipe(name)
    settings = recipe.settings_for("sparsify")
    assert (recipe.command, settings["model"], settings["method"]) == ("sparsify", model, method)
    assert (settings["block"], settings["axis"]) == ("semi_structured", "channels")
    assert (settings["data"]["interpolation"], settings["data"]["crop_pct"]) == ("bilinear", 0.875)


@pytest.mark.parametrize("name", DISTILLED)
def test_distillation(name: str) -> None:
    student, devices, total, epochs, top1 = DISTILLED[name]
    recipe = load_recipe(name)
    settings = flatten(recipe.settings)
    assert recipe.devices is not None and (recipe.total_batch, recipe.devices.total) == (total, total)
    assert (recipe.model, recipe.epochs, (recipe.published or {}).get("top1")) == (student, epochs, top1)
    assert vars(recipe.devices) == dict(zip(("nodes", "gpus", "batch", "accumulation"), devices))
    assert (settings["optimizer.lr"], settings["schedule.warmup_epochs"], settings["ema.decay"]) == (4e-3, 20, 0.9999)
    expected = ("kd", 3.0, 0.1) if student == "resnet50" else ("nkd", 1.0, 1.0)
    assert tuple(settings[f"distillation.{key}"] for key in ("kind", "temperature", "alpha")) == expected


def test_evaluation_of_the_largest_replknet() -> None:
    recipe = load_recipe("replknet_xl_in1k_320_eval")
    settings = recipe.settings_for("eval")
    assert (recipe.published, settings["model"], settings["data"]["input_size"]) == ({"top1": 87.8}, "replknet_xl", 320)
    assert settings["data"]["mean"] == settings["data"]["std"] == [0.5, 0.5, 0.5]
