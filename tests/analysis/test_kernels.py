"""Pictures of kernels: branches, their folded sum, and the order of channels."""

from __future__ import annotations

import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import widekernel
from tests.models.zoo import alive
from widekernel.analysis.kernels import FOLDED, kernel_layers, layer_named, plot
from widekernel.errors import ArgumentError
from widekernel.layers import LargeKernel


def test_branches_and_their_folded_sum() -> None:
    model = alive("slak_nano").eval()
    layers = kernel_layers(model)
    names = [name for name, module in model.named_modules() if isinstance(module, LargeKernel)]
    assert [layer.name for layer in layers] == names
    layer = layers[0]
    wide, tall, small, folded = layer.parts.values()
    assert list(layer.parts)[-1] == FOLDED
    assert len({part.shape for part in layer.parts.values()}) == 1
    assert [(part.any((0, 2)).sum(), part.any((0, 1)).sum()) for part in (wide, tall)] != [(0, 0), (0, 0)]
    assert np.abs(small).sum() > 0
    # A one-pixel image at the center shows the kernel.
    module = dict(model.named_modules())[layer.name]
    assert isinstance(module, LargeKernel)
    height, width = folded.shape[1:]
    x = torch.zeros(1, len(folded), 2 * height + 1, 2 * width + 1)
    x[..., height, width] = 1
    with torch.no_grad():
        y = (module(x) - module(torch.zeros_like(x)))[0].numpy()
    mirrored = folded[:, ::-1, ::-1]
    rows, columns = slice(height - height // 2, height + height // 2 + 1), slice(width - width // 2, width + width // 2 + 1)
    np.testing.assert_allclose(y[:, rows, columns], mirrored, atol=1e-5)


def test_a_folded_network_has_the_same_folded_kernels() -> None:
    model = alive("replknet_nano").eval()
    before, after = kernel_layers(model), kernel_layers(widekernel.fold(model))
    assert [layer.name for layer in before] == [layer.name for layer in after]
    large = [(mine, theirs) for mine, theirs in zip(before, after) if FOLDED in mine.parts]
    assert len(large) == sum(isinstance(module, LargeKernel) for module in model.modules())
    for mine, theirs in large:
        assert list(theirs.parts) == [FOLDED]
        np.testing.assert_allclose(theirs.parts[FOLDED], mine.parts[FOLDED], atol=1e-6)


def test_networks_of_timm_have_one_branch() -> None:
    layers = kernel_layers(timm.create_model("convnext_atto"))
    assert len(layers) == 12
    assert all(list(layer.parts) == ["7×7"] for layer in layers)


def test_channels_are_chosen_by_falling_norm_and_modes_stay() -> None:
    model = timm.create_model("shiftwise_nano").train()
    layer = kernel_layers(model)[0]
    assert model.training
    assert all(module.training for module in model.modules())
    norms = layer.norms
    chosen = layer.channels(5)
    assert len(chosen) == 5
    assert [norms[channel] for channel in chosen] == sorted((norms[channel] for channel in chosen), reverse=True)
    assert norms[chosen[0]] == norms.max()
    assert norms[chosen[-1]] == norms.min()
    assert Image.open(io.BytesIO(plot(layer, 5))).size[1] > 100


def test_a_layer_by_name() -> None:
    layers = kernel_layers(timm.create_model("slak_nano"))
    assert layer_named(layers, layers[1].name) is layers[1]
    with pytest.raises(ArgumentError, match=r"no depthwise layer 'stage'.*Layers: stages\.0"):
        layer_named(layers, "stage")
