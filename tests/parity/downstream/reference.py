"""Official segmentation and detection networks: their weights by name, and ours for their configurations."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.conftest import shared_folder
from tests.parity.reference import NAMES, arguments
from widekernel.dense.backbone import Pyramid, build_pyramid
from widekernel.dense.segmentation import Segmenter, SegmenterOptions

# Arguments of the official backbones without an equivalent in ours: how training runs, and what every pyramid has.
LEFT_OUT = ("type", "out_indices", "sparse")
RENAMED = {"LoRA": "decomposed"}


def folder(shared: Path) -> Path:
    return shared / "parity" / "downstream"


def rows(kind: str) -> list[dict[str, Any]]:
    """Return the cases of a kind; none where the reference numbers are missing."""
    shared = shared_folder()
    if shared is None:
        return []
    index = json.loads((folder(shared) / "golden" / "index.json").read_text())
    return [row for row in index if row["kind"] == kind]


def manifest_names() -> list[str]:
    shared = shared_folder()
    return [] if shared is None else sorted(path.stem for path in (folder(shared) / "manifests").glob("*.json"))


def manifest(shared: Path, name: str) -> dict[str, Any]:
    return json.loads((folder(shared) / "manifests" / f"{name}.json").read_text())


@cache
def filler(shared: Path) -> ModuleType:
    """Import the generator of weights, images and labels."""
    spec = importlib.util.spec_from_file_location("parity_fill_downstream", folder(shared) / "fill_downstream.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.path[:]
    spec.loader.exec_module(module)  # it imports its neighbor by the path
    sys.path[:] = before
    return module


def weights(shared: Path, name: str, seed: int) -> dict[str, Tensor]:
    """Generate the official state dict of a manifest."""
    described = manifest(shared, name)
    state = filler(shared).fill_state(described["keys"], seed, described["overrides"])
    return {key: torch.from_numpy(np.array(value)) for key, value in state.items()}


def official_file(shared: Path, target: Path, name: str, seed: int) -> Path:
    """Write a network's weights as the authors' training scripts would."""
    path = target / f"{name}.pth"
    torch.save({"meta": {"iter": 160000}, "state_dict": weights(shared, name, seed), "optimizer": {}}, path)
    return path


def images(shared: Path, seed: int, shape: list[int]) -> Tensor:
    return torch.from_numpy(filler(shared).make_input(seed, shape))


def pyramid(config: dict[str, Any]) -> Pyramid:
    """Build our pyramid for the configuration of an official backbone."""
    kwargs = {RENAMED.get(key, key): value for key, value in config.items() if key not in LEFT_OUT}
    args = arguments(config["type"], kwargs)
    if config["type"] == "ConvNeXt":
        args["ls_init_value"] = args.pop("layer_scale")
    return build_pyramid(NAMES[config["type"]], args)


def segmenter(config: dict[str, Any], **changes: Any) -> Segmenter:
    """Build our network for the configuration of an official one."""
    head, auxiliary = config["decode_head"], config["auxiliary_head"]
    options = {
        "num_classes": head["num_classes"],
        "channels": head["channels"],
        "pool_scales": tuple(head["pool_scales"]),
        "dropout": head["dropout_ratio"],
        "align_corners": head["align_corners"],
        "auxiliary_channels": auxiliary["channels"],
        "auxiliary_weight": auxiliary["loss_decode"]["loss_weight"],
        **changes,
    }
    return Segmenter(pyramid(config["backbone"]), SegmenterOptions(**options))
