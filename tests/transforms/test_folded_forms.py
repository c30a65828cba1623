"""Folded state as a property of classes, so that copies, and networks that are created folded, have it too."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import widekernel
from tests.transforms.test_fold import EACH_ONCE, network
from widekernel.layers import ConvNorm, FoldedLargeKernel, LargeKernel, PartialChannels, Rectangles
from widekernel.layers.conv_norm import FoldedConvNorm
from widekernel.layers.folding import Folded, is_folded
from widekernel.models.blocks import MixerBlock
from widekernel.sparsity import compact


@EACH_ONCE
def test_networks(name: str) -> None:
    model = network(name)
    assert not is_folded(model)
    folded = widekernel.fold(model)
    changed = list(folded.state_dict()) != list(model.state_dict())
    assert is_folded(folded) == changed
    assert not is_folded(model)
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), reparameterize_model(model), compact(model)):
        assert is_folded(other) == changed
    for before, after in zip(model.modules(), copy.deepcopy(model).modules()):
        assert vars(before).keys() == vars(after).keys()


@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano", "shiftwise_nano", "convnext_isotropic_nano"])
def test_folding_puts_nothing_on_instances(name: str) -> None:
    folded = widekernel.fold(timm.create_model(name, layer_scale=0.1) if "convnext" in name else timm.create_model(name))
    kinds = {type(module): set(vars(module)) for module in timm.create_model(name).modules()}
    for module in folded.modules():
        assert not vars(module).keys() - kinds.get(type(module), set(vars(module)))


@pytest.mark.parametrize(("layer_scale", "want"), [(0.0, False), (0.1, True)])
def test_a_layer_scale_that_is_gone(layer_scale: float, want: bool) -> None:
    model = timm.create_model("convnext_isotropic_nano", layer_scale=layer_scale)
    blocks = [module for module in widekernel.fold(model).modules() if isinstance(module, MixerBlock)]
    assert [block.is_folded() for block in blocks] == [want] * len(blocks)
    assert not any(block.is_folded() for block in model.modules() if isinstance(block, MixerBlock))


def _conv() -> ConvNorm:
    return ConvNorm(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: LargeKernel(Rectangles(3, [(5, 5)])),
        lambda: PartialChannels(LargeKernel(Rectangles(2, [(5, 5)])), [0, 2], 3),
        _conv,
    ],
    ids=["large kernel", "some channels", "convolution"],
)
def test_layers(make: Any) -> None:
    layer = make()
    assert not is_folded(layer)
    assert isinstance(widekernel.fold(layer), Folded)
    assert is_folded(nn.Sequential(nn.ReLU(), make().fuse()))


def test_a_convolution_that_never_had_a_norm_is_not_folded() -> None:
    layer = ConvNorm(nn.Conv2d(3, 3, 1), nn.Identity())
    assert not is_folded(layer)
    assert type(layer) is ConvNorm
    assert type(widekernel.fold(_conv())) is FoldedConvNorm


def test_a_custom_class_says_whether_it_is_folded() -> None:
    class Merged(nn.Module):
        def __init__(self, merged: bool) -> None:
            super().__init__()
            self.merged = merged

        def is_folded(self) -> bool:
            return self.merged

    assert not is_folded(nn.Sequential(Merged(False)))
    assert is_folded(nn.Sequential(Merged(False), Merged(True)))


def test_a_folded_layer_that_is_built_by_hand() -> None:
    layer = widekernel.fold(LargeKernel(Rectangles(3, [(5, 5)])))
    assert is_folded(FoldedLargeKernel(layer.rects(), torch.zeros(3)))
