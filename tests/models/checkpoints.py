"""Helpers of the checkpoint tests: saving, loading, and the assertion that a file is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import widekernel
from tests.models.zoo import assert_same_state, images, snapshot
from widekernel.errors import CheckpointError
from widekernel.models.checkpoint import LoadReport

both_layouts = pytest.mark.parametrize("layout", ["native", "official"])
TABLES = ("tile_at", "centre", "selected", "ghosts")


def logits(model: nn.Module, size: int = 64) -> Tensor:
    with torch.no_grad():
        return model.eval()(images(size))


def save_as(model: nn.Module, folder: Path, layout: Any) -> Path:
    """Save a network in a layout, under a name that fits the layout."""
    return widekernel.save_checkpoint(model, folder / ("a.safetensors" if layout == "native" else "a.pth"), layout=layout)


def state_of(model: nn.Module, folder: Path, layout: str = "native") -> dict[str, Tensor]:
    """Return the state dict of a network in a layout."""
    if layout == "native":
        return dict(model.state_dict())
    path = widekernel.save_checkpoint(model, folder / "official.pth", layout="official")
    return torch.load(path, weights_only=True)["model"]


def load_content(model: nn.Module, folder: Path, content: Any, **kwargs: Any) -> LoadReport:
    """Load a checkpoint file with the given content."""
    torch.save(content, folder / "file.pth")
    return widekernel.load_checkpoint(model, folder / "file.pth", **kwargs)


def assert_refused(model: nn.Module, path: Path, message: str, **kwargs: Any) -> str:
    """Assert that loading fails with a message that names the file, and changes nothing; return the message."""
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        widekernel.load_checkpoint(model, path, **kwargs)
    assert_same_state(model.state_dict(), before)
    assert str(path) in str(caught.value) or kwargs
    return str(caught.value)


def assert_content_refused(model: nn.Module, folder: Path, content: Any, message: str, **kwargs: Any) -> str:
    """Assert the same of a file with the given content, and that the network computes what it did before."""
    torch.save(content, folder / "file.pth")
    before = logits(model, 32)
    refusal = assert_refused(model, folder / "file.pth", message, **kwargs)
    assert torch.equal(logits(model, 32), before)
    return refusal


def pop_batch_norm(state: dict[str, Tensor], bn: str) -> tuple[Tensor, Tensor]:
    """Remove a batch norm from a state dict; return the factors and summands per channel that it stands for."""
    scale = state.pop(f"{bn}.weight") / (state.pop(f"{bn}.running_var") + 1e-5).sqrt()
    shift = state.pop(f"{bn}.bias") - state.pop(f"{bn}.running_mean") * scale
    del state[f"{bn}.num_batches_tracked"]
    return scale, shift


def merge_branches(state: dict[str, Tensor]) -> int:
    """Merge both branches of each large kernel as the authors' `structural_reparam` does; return the number of layers."""
    keys = [key for key in state if key.endswith("large_kernel.lkb_origin.conv.weight")]
    for key in keys:
        layer = key.removesuffix(".lkb_origin.conv.weight")
        scale, bias = pop_batch_norm(state, f"{layer}.lkb_origin.bn")
        kernel = state.pop(key) * scale.view(-1, 1, 1, 1)
        if f"{layer}.small_conv.conv.weight" in state:
            scale, shift = pop_batch_norm(state, f"{layer}.small_conv.bn")
            small = state.pop(f"{layer}.small_conv.conv.weight") * scale.view(-1, 1, 1, 1)
            margin = (kernel.shape[-1] - small.shape[-1]) // 2
            kernel, bias = kernel + nn.functional.pad(small, [margin] * 4), bias + shift
        state[f"{layer}.lkb_reparam.weight"], state[f"{layer}.lkb_reparam.bias"] = kernel, bias
    return len(keys)


def fuse_batch_norms(state: dict[str, Tensor]) -> None:
    """Fuse every batch norm right after a convolution as the authors' `deep_fuse_BN` does."""
    for key in [key for key in state if key.endswith(".conv.weight")]:
        prefix = key.removesuffix(".conv.weight")
        scale, state[f"{prefix}.conv.bias"] = pop_batch_norm(state, f"{prefix}.bn")
        state[key] = state[key] * scale.view(-1, 1, 1, 1)
