"""Weights by name, and the official networks under our names."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import timm
import torch

import widekernel  # noqa: F401

# What the authors' constructors are called here; mini networks are the smallest size with every dimension given.
NAMES = {
    "ConvNeXt": "convnext_tiny",
    "convnext_tiny": "convnext_tiny",
    "convnext_base": "convnext_base",
    "convnext_isotropic_small": "convnext_isotropic_small",
    "RepLKNet": "replknet_31b",
    "create_RepLKNet31B": "replknet_31b",
    "SLaK": "slak_tiny",
    "SLaK_tiny": "slak_tiny",
    "SLaK_reg": "slak_reg_tiny",
    "SLaK_reg_tiny": "slak_reg_tiny",
    "SLaK_pww": "slak_pww_tiny",
    "SLaK_pww_tiny": "slak_pww_tiny",
    "ShiftWise_v1": "shiftwise_v1_tiny",
    "ShiftWise_v2": "shiftwise_tiny",
    "ShiftWise_v2_tiny": "shiftwise_tiny",
}
RENAMED = {
    "large_kernel_sizes": "kernel_sizes",
    "layers": "depths",
    "channels": "dims",
    "Decom": "decomposed",
    "N_path": "paths",
    "N_rep": "groups",
    "layer_scale_init_value": "layer_scale",
}
WITHOUT_MEANING_HERE = ("use_checkpoint", "use_sync_bn", "out_indices", "small_kernel_merged")
FIVE_NUMBERS = ("SLaK", "ShiftWise")


def arguments(constructor: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Translate the official keyword arguments into ours."""
    out = {}
    for key, value in kwargs.items():
        if key == "kernel_size" and constructor.startswith(FIVE_NUMBERS):
            out["kernel_sizes"] = tuple(value[:4])
            # The fifth number suppresses the small kernel where it is not smaller than the large one.
            out["small_kernel"] = value[4] if value[4] < max(value[:4]) else 0
        elif key == "num_classes" and value is None:
            out["num_classes"] = 0
        elif key not in WITHOUT_MEANING_HERE:
            out[RENAMED.get(key, key)] = tuple(value) if isinstance(value, list) else value
    if out.get("small_kernel", 0) is None:
        out["small_kernel"] = 0
    return out


def create(manifest: dict[str, Any]) -> torch.nn.Module:
    """Build our network for an official constructor call."""
    constructor = manifest["constructor"]
    return timm.create_model(NAMES[constructor], **arguments(constructor, manifest["kwargs"]))


def manifest(shared: Path, name: str) -> dict[str, Any]:
    return json.loads((shared / "parity" / "manifests" / f"{name}.json").read_text())


@cache
def filler(shared: Path) -> ModuleType:
    """Import the reference folder's own generator of weights."""
    spec = importlib.util.spec_from_file_location("parity_fill", shared / "parity" / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(shared: Path, keys: list[Any], seed: int) -> dict[str, torch.Tensor]:
    """Draw an official state dict."""
    return {key: torch.from_numpy(np.array(value)) for key, value in filler(shared).fill_state(keys, seed).items()}


def official_file(shared: Path, folder: Path, name: str, seed: int) -> Path:
    """Write a network's weights as the authors' scripts would."""
    path = folder / f"{name}.pth"
    torch.save({"model": weights(shared, manifest(shared, name)["keys"], seed), "epoch": 299}, path)
    return path


def images(shared: Path, seed: int, shape: list[int]) -> torch.Tensor:
    return torch.from_numpy(filler(shared).make_input(seed, shape))


def assert_close(ours: torch.Tensor, reference: np.ndarray, relative: float = 1e-5, absolute: float = 1e-6) -> None:
    """The bound of the reference numbers: |a - b| <= relative * max|b| + absolute."""
    theirs = torch.from_numpy(np.asarray(reference)).to(ours.dtype)
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max().item()
    bound = relative * theirs.abs().max().item() + absolute
    assert error <= bound, f"largest difference {error:.3g}, allowed {bound:.3g}"
