"""Folding of networks with parametrized, frozen, shared and replaced parts."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, Conv2dSame, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torchvision.ops import FrozenBatchNorm2d

import widekernel
from tests.layers.helpers import assert_close, randomized
from widekernel.layers import ConvNorm, FoldedLargeKernel, LargeKernel, Rect, Rectangles

C = 4


def network(name: str, **kwargs: Any) -> nn.Module:
    return randomized(timm.create_model(name, num_classes=10, **kwargs))


def pictures() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def image() -> Tensor:
    return torch.randn(2, C, 8, 9, dtype=torch.float64)


def folded_alike(model: nn.Module, x: Tensor) -> nn.Module:
    """Fold without a warning, check that outputs are equal and the original is unchanged, and return the result."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        want = model(x)
        folded = widekernel.fold(model)
        assert want.std() > 0
        assert_close(folded(x), want, 1e-10)
        assert torch.equal(model(x), want)
    return folded


# ---- Parametrized layers


class Mask(nn.Module):
    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand_like(like) > 0.5).to(like))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def masked(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Mask(layer.weight))


def weight_normed(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.5)  # otherwise the parametrization would change nothing


PARTS = {
    "slak_nano": ("mlp.fc2", nn.Linear),
    "replknet_nano": ("pw1.conv", nn.Conv2d),
    "shiftwise_nano": ("mlp.fc2", nn.Linear),
    "roadmap_nano": ("mlp.fc2", nn.Linear),
}


@pytest.mark.parametrize("how", [masked, weight_normed], ids=["mask", "weight_norm"])
@pytest.mark.parametrize("name", PARTS)
def test_parametrized_layers(name: str, how: Any) -> None:
    model, (part, kind) = network(name), PARTS[name]
    before = model(x := pictures())
    where = [f"{name}.{part}" for name, block in model.named_modules() if hasattr(block, part.split(".")[0])]
    for path in where:
        how(model.get_submodule(path))
    assert where
    assert not torch.allclose(model(x), before)
    folded = folded_alike(model, x)
    for path in where:
        assert type(folded.get_submodule(path)) is kind
        assert parametrize.is_parametrized(model.get_submodule(path))
    assert not any(parametrize.is_parametrized(module) for module in folded.modules())


def test_parametrized_kernels() -> None:
    layer = randomized(LargeKernel(Rectangles(C, [(5, 5)]), [nn.BatchNorm2d(C)]))
    like = layer.source.kernels[0]
    parametrize.register_parametrization(layer.source.kernels, "0", Mask(like))
    folded = folded_alike(layer, image())
    assert (folded.kernels[0] == 0).any()


# ---- Norms and convolutions that are more than their name says


def test_a_norm_with_an_activation_is_not_folded() -> None:
    block = randomized(ConvNorm(nn.Conv2d(C, C, 3, padding=1), BatchNormAct2d(C)))
    assert not block.foldable()
    folded = folded_alike(block, image())
    assert isinstance(folded.bn, BatchNormAct2d)


def test_a_layer_of_norms_with_activations_is_kept_and_named() -> None:
    layer = LargeKernel(Rectangles(C, [(9, 9), (3, 3)]), [BatchNormAct2d(C), nn.BatchNorm2d(C)])
    model, x = randomized(nn.Sequential(layer)), image()
    with pytest.warns(UserWarning, match=r"not folded: 0 \(BatchNormAct2d is not a plain batch norm\)$"):
        folded = widekernel.fold(model)
    assert isinstance(folded[0], LargeKernel)
    assert torch.equal(folded(x), model(x))
    with pytest.raises(TypeError, match="BatchNormAct2d is not a plain batch norm"):
        layer.folded()


@pytest.mark.parametrize("part", ["prelkb_bn", "pw1.bn", "pw2.bn"])
def test_a_replaced_norm_of_a_block(part: str) -> None:
    model = timm.create_model("replknet_nano", num_classes=10)
    block = model.stages[0].blocks[0]
    block.set_submodule(part, BatchNormAct2d(block.get_submodule(part).num_features))
    folded = folded_alike(randomized(model), pictures())
    assert isinstance(folded.stages[0].blocks[0].get_submodule(part), BatchNormAct2d)


def test_a_batch_norm_that_only_has_another_name() -> None:
    class Named(nn.BatchNorm2d):
        pass

    folded = folded_alike(randomized(LargeKernel(Rectangles(C, [(5, 5)]), [Named(C)])), image())
    assert isinstance(folded, FoldedLargeKernel)


def test_a_convolution_that_pads_by_itself_is_kept() -> None:
    block = randomized(ConvNorm(Conv2dSame(C, C, 3, stride=2), nn.BatchNorm2d(C)))
    assert not block.foldable()
    assert isinstance(folded_alike(block, image()).conv, Conv2dSame)


class WithAdapter(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


@pytest.mark.parametrize("name", ["slak_nano", "shiftwise_nano"])
def test_a_linear_layer_that_does_more_is_kept(name: str) -> None:
    model = timm.create_model(name, num_classes=10)
    mlp = model.stages[0].blocks[0].mlp
    mlp.fc2 = WithAdapter(mlp.fc2.in_features, mlp.fc2.out_features)
    folded = folded_alike(randomized(model), pictures())
    assert isinstance(folded.stages[0].blocks[0].mlp.fc2, WithAdapter)
    assert folded.stages[0].blocks[0].gamma is not None


# ---- Frozen networks


@pytest.mark.parametrize("name", ["replknet_nano", "slak_nano", "shiftwise_nano", "shiftwise_v1_nano"])
def test_frozen_batch_norms(name: str) -> None:
    model = network(name)
    x = pictures()
    with torch.no_grad():
        want = model(x)
        frozen = freeze_batch_norm_2d(copy.deepcopy(model))
    assert any(isinstance(module, FrozenBatchNorm2d) for module in frozen.modules())
    folded = folded_alike(frozen, x)
    assert_close(folded(x), want, 1e-10)
    plain = widekernel.fold(model)
    assert [(n, type(m)) for n, m in folded.named_modules() if "norm_pre" not in n and "downsample" not in n] == [
        (n, type(m)) for n, m in plain.named_modules() if "norm_pre" not in n and "downsample" not in n
    ]


def test_frozen_batch_norms_that_were_put_in_by_hand() -> None:
    """torchvision's do not know their number of channels by name."""
    model = network("shiftwise_nano")
    block = model.stages[0].blocks[0]
    block.norm, block.norm2 = FrozenBatchNorm2d(16).double(), FrozenBatchNorm2d(16).double()
    block.norm.bias.normal_()
    folded = folded_alike(model, pictures())
    assert isinstance(folded.stages[0].blocks[0].norm, nn.Identity)


@pytest.mark.parametrize("name", ["replknet_nano", "slak_pww_nano", "shiftwise_nano", "roadmap_nano"])
def test_a_frozen_network_stays_frozen(name: str) -> None:
    model = network(name).requires_grad_(False)
    folded = folded_alike(model, pictures())
    assert list(folded.parameters())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    model.head.fc.requires_grad_(True)
    assert any(parameter.requires_grad for parameter in widekernel.fold(model).parameters())


# ---- Shared parts


@pytest.mark.parametrize("name", ["slak_nano", "shiftwise_nano", "roadmap_nano"])
def test_two_blocks_that_share_their_mlp(name: str) -> None:
    """Each block folds its own layer scale into a layer that both shared."""
    model = network(name, depths=(1, 1, 2, 1))
    first, second = model.stages[2].blocks
    second.mlp = first.mlp
    assert not torch.equal(first.gamma, second.gamma)
    folded = folded_alike(model, pictures())
    ours, theirs = folded.stages[2].blocks
    assert ours.mlp.fc1 is theirs.mlp.fc1
    assert ours.mlp.fc2 is not theirs.mlp.fc2
    assert not torch.equal(ours.mlp.fc2.weight, theirs.mlp.fc2.weight)
    assert first.mlp is second.mlp


# ---- Weights of folded layers


def test_kernels_with_other_anchors_are_refused() -> None:
    """Strips of 3 x 12 taps may stand for 11, 10 or 12 of them, anchored at different ones."""

    def folded(anchor: int) -> FoldedLargeKernel:
        return FoldedLargeKernel([Rect(torch.randn(C, 1, 3, 12), (1, anchor))], torch.randn(C))

    layer, other, like = folded(5), folded(6), folded(5)
    with pytest.raises(RuntimeError, match=r"anchors are \[\[1, 6\]\] in the file but \[\(1, 5\)\] here"):
        layer.load_state_dict(other.state_dict())
    layer.load_state_dict(like.state_dict())
    assert torch.equal(layer(x := image().float()), like(x))
