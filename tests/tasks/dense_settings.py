"""Settings of tiny segmentation and detection runs on generated scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from tests.data.scenes import make_scenes, write_coco_json, write_folder

_SHARED: dict[str, Any] = {
    "optimizer": {"lr": 0.01},
    "loop": {"batch_size": 4, "device": "cpu", "log_every": 1},
    "checkpoint": {"every_steps": 1, "keep": 10},
}


def write_scenes(root: Path, train: int = 8, val: int = 3) -> Path:
    """Write the same scenes as `root/folder` for segmentation and as `root/coco` for detection."""
    scenes = make_scenes(train), make_scenes(val, first=1000)
    write_folder(root / "folder", *scenes)
    write_coco_json(root / "coco", *scenes)
    return root


def settings_of(kind: str, scenes: Path, steps: int = 2, **changes: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings of a run of `steps` optimizer steps."""
    small: dict[str, Any] = {"name": "test_convnext"}
    schedule = {"steps": steps, "warmup_steps": 1}
    if kind == "segmentation":
        settings = {
            "task": "segmentation",
            "model": {**small, "channels": 16, "auxiliary_channels": 8},
            "data": {"root": str(scenes / "folder"), "image_scale": [64, 48], "crop_size": 48, "workers": 0},
        }
    else:
        # A group norm of FCOS needs more than one value, also where the coarsest map is one pixel.
        sizes = {
            "channels": 64 if kind == "fcos" else 32,
            "fc_channels": 32,
            "roi_samples": 32,
            "proposals": 50,
            "score_threshold": 0.0,
        }
        images = {"images": "pictures", "image_scale": [64, 48], "short_sides": [48], "crop": False, "workers": 0}
        data = {"format": "coco_json", "root": str(scenes / "coco"), "masks": kind != "fcos", **images}
        settings = {"task": "detection", "model": {**small, "detector": kind, **sizes}, "data": data}
    settings = {**settings, **_SHARED, "schedule": schedule}
    for key, values in changes.items():
        settings[key] = {**settings.get(key, {}), **values}
    return settings


def write_settings(path: Path, settings: dict[str, Any]) -> str:
    """Write settings as a YAML file, and return its path."""
    path.write_text(yaml.safe_dump(settings))
    return str(path)
