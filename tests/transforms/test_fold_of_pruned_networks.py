"""Folding of layers whose weights are computed by hooks: pruning, and the old weight and spectral norms."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import widekernel
from tests.layers.helpers import assert_close, randomized
from tests.models.zoo import alive, assert_same_state, create
from widekernel.errors import ArgumentError, CheckpointError

PARTS = {"slak_nano": "mlp.fc2", "replknet_nano": "pw1.conv", "shiftwise_nano": "mlp.fc2", "roadmap_nano": "mlp.fc2"}
HOW = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned_twice": lambda layer: (
        prune.l1_unstructured(layer, "weight", 0.3),
        prune.random_unstructured(layer, "weight", 0.3),
    ),
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "parametrized_spectral_norm": parametrizations.spectral_norm,
}


def _altered(name: str, how: Any) -> tuple[nn.Module, list[nn.Module]]:
    model = randomized(timm.create_model(name, num_classes=5))
    part = PARTS[name]
    layers = [m.get_submodule(part) for m in model.modules() if hasattr(m, part.split(".")[0])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old norms are deprecated
        for layer in layers:
            how(layer)
    return model, layers


def _images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def _step(model: nn.Module, x: torch.Tensor) -> None:
    """Train one step, so that computed weights are stale and no longer leaves."""
    model.train()
    model(x).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    model.eval()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", PARTS)
def test_trained_layers_with_hooks(name: str, how: str) -> None:
    model, layers = _altered(name, HOW[how])
    x = _images()
    _step(model, x)
    folded = widekernel.fold(model)
    with torch.no_grad():
        assert_close(folded(x), model(x), 1e-10)
    assert not any(key.endswith(("_orig", "_mask", "_g", "_u")) for key in folded.state_dict())
    assert all(layer._forward_pre_hooks or hasattr(layer, "parametrizations") for layer in layers)


def test_the_zeros_stay_zero() -> None:
    model, layers = _altered("slak_nano", HOW["pruned"])
    _step(model, _images())
    folded = widekernel.fold(model)
    zeros = [(layer.weight == 0).sum() for layer in folded.modules() if isinstance(layer, nn.Linear)]
    assert sum(int(count) for count in zeros) >= sum(layer.weight.numel() // 2 for layer in layers)


def test_pruned_kernels() -> None:
    model = randomized(timm.create_model("slak_nano", num_classes=5))
    x = _images()
    for block in model.stages.modules():
        if hasattr(block, "mixer"):
            prune.l1_unstructured(block.mixer.source.kernels, "0", 0.5)
    with torch.no_grad():
        assert_close(widekernel.fold(model)(x), model(x), 1e-10)
    _step(model, x)
    with pytest.raises(ArgumentError, match=r"kernels\.0 was trained after .* the mask had no effect: .*prune\.remove"):
        widekernel.fold(model)


def test_reparameterize_model_makes_them_permanent_too() -> None:
    model, _ = _altered("slak_nano", HOW["pruned"])
    x = _images()
    with torch.no_grad():
        want = model(x)
        model = reparameterize_model(copy.deepcopy(model.requires_grad_(False)))
        assert_close(model(x), want, 1e-10)
    assert all(".mlp.fc2.weight_orig" not in key for key in model.state_dict())


def test_files_of_pruned_networks(tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    layer = model.stages[0].blocks[0].mlp.fc1
    prune.l1_unstructured(layer, "weight", 0.5)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    widekernel.load_checkpoint(other, tmp_path / "a.pth")
    assert torch.equal(other.stages[0].blocks[0].mlp.fc1.weight, layer.weight)
    prune.l1_unstructured(other.stages[0].blocks[0].mlp.fc1, "weight", 0.1)
    widekernel.load_checkpoint(other, tmp_path / "a.pth")
    assert_same_state(other.state_dict(), model.state_dict())


def test_files_of_parametrized_networks_say_what_to_do(tmp_path: Path) -> None:
    model = alive("slak_nano")
    parametrizations.weight_norm(model.stages[0].blocks[0].mlp.fc1)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="remove_parametrizations"):
        widekernel.load_checkpoint(create("slak_nano"), tmp_path / "a.pth")
