"""Feature pyramids of our networks and of timm's."""

from __future__ import annotations

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from widekernel import accelerate, fold
from widekernel.dense.backbone import Pyramid, build_pyramid
from widekernel.errors import ArgumentError
from widekernel.layers.folding import is_folded

NETWORKS = {
    "replknet_nano": (16, 32, 64, 128),
    "slak_nano": (16, 32, 64, 128),
    "shiftwise_nano": (16, 32, 64, 128),
    "unireplknet_nano": (16, 32, 64, 128),
    "convnext_atto": (40, 80, 160, 320),
    "resnet18": (64, 128, 256, 512),
    "swin_tiny_patch4_window7_224": (96, 192, 384, 768),
}


def images(side: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, side, side)


def build(name: str, **args) -> Pyramid:
    return build_pyramid(name, {**({"img_size": 64} if name.startswith("swin") else {}), **args})


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_of_every_level(name: str) -> None:
    pyramid = build(name)
    maps = pyramid(images())
    assert tuple(pyramid.channels) == NETWORKS[name]
    assert pyramid.strides == [4, 8, 16, 32]
    assert [tuple(x.shape) for x in maps] == [(2, c, 64 // s, 64 // s) for c, s in zip(pyramid.channels, pyramid.strides)]
    sum(x.square().mean() for x in maps).backward()
    assert all(parameter.grad is not None for parameter in pyramid.parameters())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("slak_nano", LayerNorm2d),
        ("shiftwise_nano", LayerNorm2d),
        ("unireplknet_nano", LayerNorm2d),
        ("convnext_atto", LayerNorm2d),
        ("roadmap_13_convnext_t", LayerNorm2d),
        ("replknet_nano", nn.Identity),
        ("roadmap_00_resnet50", nn.Identity),
        ("resnet18", nn.Identity),
    ],
)
def test_norms_by_default(name: str, kind: type[nn.Module]) -> None:
    with torch.device("meta"):
        norms = build_pyramid(name).norms
    assert [type(norm) for norm in norms] == [kind] * 4
    assert all(norm.eps == 1e-6 for norm in norms if isinstance(norm, LayerNorm2d))


def test_norms_on_request() -> None:
    assert all(isinstance(norm, LayerNorm2d) for norm in build_pyramid("resnet18", norms="layer").norms)
    assert all(isinstance(norm, nn.Identity) for norm in build_pyramid("slak_nano", norms="none").norms)


def test_norms_reach_the_heads_only() -> None:
    """The next stage gets the map as it was."""
    pyramid, x = build("slak_nano").eval(), images()
    with torch.no_grad():
        before = pyramid(x)
        pyramid.norms[0].weight.zero_()
        after = pyramid(x)
    assert not after[0].any()
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:]))


def test_batch_norms_of_replknet() -> None:
    pyramid = build("replknet_nano", norm_intermediate_features=True)
    maps = pyramid(images())
    assert all(x.mean((0, 2, 3)).abs().max() < 1e-4 for x in maps)


@pytest.mark.parametrize("name", ["replknet_nano", "slak_nano", "shiftwise_nano", "unireplknet_nano"])
def test_fold_and_accelerate(name: str) -> None:
    pyramid, x = build(name, layer_scale=1.0) if name == "slak_nano" else build(name), images()
    pyramid = pyramid.eval()
    with torch.no_grad():
        expected = pyramid(x)
        folded = fold(pyramid)
        assert is_folded(folded)
        assert not is_folded(pyramid)
        faster, _ = accelerate(folded, pointwise=False)
        for ours, theirs in zip(faster(x), expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["slak_nano", "unireplknet_nano", "convnext_atto", "resnet18"])
def test_gradient_checkpointing(name: str) -> None:
    pyramid, x = build(name).train(), images()
    gradients = []
    for enable in (False, True):
        pyramid.set_grad_checkpointing(enable)
        pyramid.zero_grad()
        sum(y.square().mean() for y in pyramid(x)).backward()
        gradients.append([parameter.grad.clone() for parameter in pyramid.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_drop_path() -> None:
    pyramid, x = build("slak_nano", drop_path_rate=0.9, layer_scale=1.0).train(), images()
    first, second = pyramid(x), pyramid(x)
    assert not torch.equal(first[-1], second[-1])


def test_some_levels() -> None:
    assert build_pyramid("resnet18", out_indices=(1, 2)).strides == [4, 8]
    pyramid = build_pyramid("slak_nano", out_indices=(0, 2))
    assert pyramid.channels == [16, 64]
    assert len(pyramid(images())) == 2
    assert not any(".stages.3." in key for key in pyramid.state_dict())


def test_images_are_described() -> None:
    with torch.device("meta"):
        assert build_pyramid("replknet_xl").pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "args", "indices", "message"),
    [
        ("slak_tinny", {}, 4, "Did you mean 'slak_tiny'"),
        ("slak_nano", {"features_only": True}, 4, "features_only cannot be"),
        ("slak_nano", {}, (7,), r"\(7,\) name no maps of slak_nano"),
        ("resnet18", {}, (9,), r"\(9,\) name no maps of resnet18"),
    ],
)
def test_errors(name: str, args, indices, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build_pyramid(name, args, indices)
