"""The feature pyramid network."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork as Theirs
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from widekernel.dense.detection.fpn import FeaturePyramidNetwork
from widekernel.errors import ArgumentError


def maps(sizes: list[tuple[int, int]], channels: list[int]) -> list[torch.Tensor]:
    return [torch.randn(2, number, *size) for number, size in zip(channels, sizes)]


def test_the_pyramid_of_torchvision_under_official_names() -> None:
    ours = FeaturePyramidNetwork([4, 6, 8], 5, 4)
    theirs = Theirs([4, 6, 8], 5, LastLevelMaxPool())
    renamed = {"inner_blocks": "lateral_convs", "layer_blocks": "fpn_convs"}
    own = ours.state_dict()
    theirs.load_state_dict(
        {
            key: own[renamed[key.split(".")[0]] + f".{key.split('.')[1]}.conv.{key.split('.')[-1]}"]
            for key in theirs.state_dict()
        }
    )
    inputs = maps([(13, 17), (7, 9), (4, 5)], [4, 6, 8])
    outputs = ours(inputs)
    wanted = list(theirs(OrderedDict((str(i), x) for i, x in enumerate(inputs))).values())
    assert len(outputs) == len(wanted) == 4
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(outputs, wanted))


def test_convolutions_make_the_extra_maps() -> None:
    fpn = FeaturePyramidNetwork([4, 6], 5, 4, extra="convs")
    outputs = fpn(maps([(8, 10), (4, 5)], [4, 6]))
    assert [tuple(x.shape[-2:]) for x in outputs] == [(8, 10), (4, 5), (2, 3), (1, 2)]
    assert torch.equal(outputs[2], fpn.fpn_convs[2](outputs[1]))
    assert torch.equal(outputs[3], fpn.fpn_convs[3](outputs[2].relu()))
    assert len(FeaturePyramidNetwork([4, 6], 5, 2, extra="convs")(maps([(8, 10), (4, 5)], [4, 6]))) == 2


def test_initial_weights() -> None:
    for module in FeaturePyramidNetwork([16], 32, 2, extra="convs").modules():
        if isinstance(module, nn.Conv2d):
            fan = (module.in_channels + module.out_channels) * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.1)
            assert not module.bias.any()


def test_arguments_are_checked() -> None:
    with pytest.raises(ArgumentError, match="outputs is 1 with 2 inputs"):
        FeaturePyramidNetwork([4, 6], 5, 1)
    with pytest.raises(ArgumentError, match="extra is 'conv'"):
        FeaturePyramidNetwork([4, 6], 5, 3, extra="conv")
    with pytest.raises(ArgumentError, match="There are 1 maps, but the pyramid has 2 inputs"):
        FeaturePyramidNetwork([4, 6], 5, 3)(maps([(8, 8)], [4]))
