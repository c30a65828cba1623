"""Recipes on a small scale: the settings of a recipe, with a nano network on few small images and two steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from PIL import Image

import widekernel  # noqa: F401 - registers the models
from widekernel.recipes import load_recipe

CLASSES, SIZE = 4, 32
OTHER_CLASSES = 7
_KERNELS = {"kernel_sizes": [9, 7, 5, 9], "small_kernel": 3, "width_factor": 1.0}
_SHALLOW = {"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16]}
_RESNET = {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 16]}
_NANO: list[tuple[str, str | None, dict[str, Any]]] = [
    (r"convnext_isotropic_", "convnext_isotropic_nano", {"depth": 2, "dim": 16}),
    (r"convnext_", "convnext_atto", _SHALLOW),
    (r"roadmap_", None, {"depths": [1, 1, 2, 1], "width": 8}),
    (r"replknet_", "replknet_nano", {**_SHALLOW, "kernel_sizes": [9, 7, 5, 5], "small_kernel": 3}),
    (r"shiftwise_", "shiftwise_nano", {**_SHALLOW, **_KERNELS}),
    (r"unireplknet_", "unireplknet_nano", _SHALLOW),
    (r"slak_pww_", "slak_pww_nano", {**_SHALLOW, **_KERNELS}),
    (r"slak_pw_", "slak_pw_nano", {**_SHALLOW, **_KERNELS}),
    (r"slak_", "slak_nano", {**_SHALLOW, **_KERNELS}),
    (r"resnet", None, _RESNET),
]
"""Beginning of a name, the nano network of that family (`None` for the network itself), and arguments that make it small."""


def write_images(root: Path) -> Path:
    """Write 64 training and 16 held-out images of random colors, in four classes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def nano_model(name: str, args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the small network in place of a recipe's, with the arguments of the recipe that do not set its size."""
    nano, small = next((nano, small) for pattern, nano, small in _NANO if re.match(pattern, name))
    kept = dict(args)
    if kept.get("decomposed") is False:  # the kernels of ConvNeXt are small as they are
        small = _SHALLOW
    return nano or name, {**kept, **small}


def write_settings(name: str, images: Path, folder: Path) -> Path:
    """Write the settings that scale the recipe called `name` down, and return their file.

    A recipe that starts from weights gets weights of the small network, for other classes unless the network is frozen. A
    teacher becomes a small one, with random weights.
    """
    settings = load_recipe(name).settings
    model, args = nano_model(settings["model"]["name"], settings["model"].get("args") or {})
    scaled: dict[str, Any] = {
        "model": {"name": model, "args": args, "num_classes": None},
        "data": {"root": str(images), "input_size": SIZE, "workers": 0},
        "loop": {"batch_size": 32, "micro_batch": 16, "device": "cpu", "log_every": 1},
        "schedule": {"steps": 2},
        "sparsity": {"dynamic": {"update_interval": 1}},
    }
    if settings["ema"]["decay"] is not None:  # two steps are too few for an average that starts with the initial weights
        scaled["ema"] = {"warmup": True}
    if settings["model"].get("weights") is not None:
        frozen = settings.get("sparsity", {}).get("method") == "semi_structured"
        start = timm.create_model(model, num_classes=CLASSES if frozen else OTHER_CLASSES, **args)
        torch.save(start.state_dict(), folder / "start.pth")
        scaled["model"]["weights"] = str(folder / "start.pth")
    if "distillation" in settings:
        teacher, of_teacher = nano_model("slak_tiny", {})
        network = timm.create_model(teacher, num_classes=CLASSES, **of_teacher)
        torch.save(network.state_dict(), folder / "teacher.pth")
        described = {"weights": str(folder / "teacher.pth"), "name": teacher, "args": of_teacher, "num_classes": CLASSES}
        scaled["distillation"] = {"teacher": described}
    file = folder / "scaled.yaml"
    file.write_text(yaml.safe_dump(scaled))
    return file


def write_dense_settings(name: str, scenes: Path, folder: Path) -> Path:
    """Write the settings that scale a recipe of segmentation or detection down, and return their file.

    Args:
        name: the recipe, which gets weights of the small network as a classifier, some of which are zero.
        scenes: folder of generated scenes.
        folder: where the files go.
    """
    recipe = load_recipe(name)
    model, args = nano_model(recipe.model, recipe.settings["model"]["args"])
    start = timm.create_model(model, num_classes=OTHER_CLASSES, **args)
    _zero_some(start)
    torch.save(start.state_dict(), folder / "start.pth")
    scaled: dict[str, Any] = {
        "model": {"name": model, "args": args, "weights": str(folder / "start.pth")},
        "loop": {"batch_size": 4, "micro_batch": 2, "device": "cpu", "precision": "fp32", "log_every": 1},
        "schedule": {"steps": 2, "warmup_steps": 1},
        "evaluation": {"every_steps": 2},
    }
    if recipe.task == "segmentation":
        scaled["model"] |= {"channels": 16, "auxiliary_channels": 8}
        scaled["data"] = {"format": "folder", "root": str(scenes / "folder"), "image_scale": [64, 48], "crop_size": 48}
        scaled["test"] = {"crop": [48, 48], "stride": [32, 32]}
    else:
        sides = {"image_scale": [64, 48], "short_sides": [48], "crop_short_sides": [40], "crop_range": [32, 40]}
        # Group norms of 32 groups need several values of each group, also in maps of one pixel.
        scaled["model"] |= {"channels": 64, "fc_channels": 32, "roi_samples": 32, "proposals": 50}
        scaled["data"] = {"format": "coco_json", "root": str(scenes / "coco"), "images": "pictures", **sides}
    scaled["data"]["workers"] = 0
    file = folder / "scaled.yaml"
    file.write_text(yaml.safe_dump(scaled))
    return file


def _zero_some(network: torch.nn.Module) -> None:
    """Set a part of each matrix and kernel to zero; whole tiles, which sparse networks leave out, among it."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                kept = torch.rand(parameter.shape[:2] if parameter.ndim > 2 else parameter.shape) > 0.3
                parameter.mul_(kept.view(kept.shape + (1,) * (parameter.ndim - kept.ndim)))
