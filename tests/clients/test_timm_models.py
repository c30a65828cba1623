"""Checks from timm's own model tests, for every registered name."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import timm
import torch
from timm.models import FeatureGraphNet
from timm.models._features_fx import GraphExtractNet, create_feature_extractor, get_graph_node_names
from torch import nn

from tests.models.zoo import FULL_SIZE, NANO, tables_drawn_once

pytestmark = pytest.mark.clients

every_name = pytest.mark.parametrize("name", [*NANO, *(pytest.param(name, marks=pytest.mark.full) for name in FULL_SIZE)])


def _plain_numbers(weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return weight.uniform_(-0.03, 0.03)


def _create(name: str, **kwargs: Any) -> nn.Module:
    # Drawing hundreds of millions of truncated normals takes longer than everything else.
    with tables_drawn_once(), mock.patch.object(nn.init, "trunc_normal_", _plain_numbers):
        return timm.create_model(name, **kwargs)


def _images(batch: int = 1, size: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


@every_name
def test_forward_and_other_sizes(name: str) -> None:
    model = _create(name).eval()
    with torch.no_grad():
        for height, width in ((64, 64), (96, 64), (33, 70)):
            out = model(torch.randn(1, 3, height, width))
            assert out.shape == (1, 1000)
            assert out.isfinite().all()


@every_name
def test_backward(name: str) -> None:
    model = _create(name, num_classes=42).train()
    out = model(_images(2))
    out.mean().backward()
    assert out.shape == (2, 42)
    assert out.isfinite().all()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@every_name
def test_default_cfg_and_the_classifier_reset(name: str) -> None:
    model = _create(name).eval()
    cfg, x = model.default_cfg, _images()
    assert cfg is model.pretrained_cfg
    assert f"{cfg['classifier']}.weight" in model.state_dict()
    assert f"{cfg['first_conv']}.weight" in model.state_dict()
    stride = cfg["input_size"][-1] // cfg["pool_size"][-1]
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (1, model.num_features, 64 // stride, 64 // stride)
        for pool in ("avg", "max"):
            model.reset_classifier(0, pool)
            assert model(x).shape == (1, model.num_features)
            assert model.head_hidden_size == model.num_features
        model.reset_classifier(0, "")
        assert model(x).shape == features.shape
        model.reset_classifier(7, "avg")
        assert model(x).shape == (1, 7)
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)


@every_name
def test_features_only(name: str) -> None:
    model = _create(name, features_only=True).eval()
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) >= 4
    with torch.no_grad():
        maps = model(_images())
    assert [tuple(feature.shape) for feature in maps] == [
        (1, width, 64 // reduction, 64 // reduction) for width, reduction in zip(channels, reductions, strict=True)
    ]
    assert all(feature.isfinite().all() for feature in maps)


@every_name
@pytest.mark.parametrize("output_stride", [8, 16])
def test_features_of_a_given_stride(name: str, output_stride: int) -> None:
    if "isotropic" in name:
        with pytest.raises(
            ValueError, match=f"output_stride={output_stride} is not available for isotropic networks|patch_size"
        ):
            _create(name, output_stride=32)
        return
    model = _create(name, features_only=True, output_stride=output_stride).eval()
    reductions = model.feature_info.reduction()
    assert reductions == [min(4 * 2**i, output_stride) for i in range(4)]
    with torch.no_grad():
        maps = model(_images())
    assert [feature.shape[-1] for feature in maps] == [64 // reduction for reduction in reductions]


@every_name
def test_intermediates(name: str) -> None:
    model, x = _create(name).eval(), _images()
    count = len(model.feature_info)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        assert len(maps) == count
        torch.testing.assert_close(final, model.forward_features(x))
        for norm in (False, True):
            last = model.forward_intermediates(x, indices=1, norm=norm, intermediates_only=True)
            assert [tuple(feature.shape) for feature in last] == [tuple(maps[-1].shape)]
        early, two = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
        torch.testing.assert_close(two, maps[:2])
        torch.testing.assert_close(early, maps[1])
        negative = model.forward_intermediates(x, indices=[-1], intermediates_only=True)
        torch.testing.assert_close(negative, maps[-1:])
        for wrong in ([count], [-count - 1]):
            with pytest.raises((AssertionError, ValueError)):
                model.forward_intermediates(x, indices=wrong)
        assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
        torch.testing.assert_close(model.forward_intermediates(x, indices=[0, 1], intermediates_only=True), two)
        pruned, rest = model.forward_intermediates(x, indices=[0, 1])
        torch.testing.assert_close(pruned, early)
        torch.testing.assert_close(rest, two)
        assert model(x).shape[1] == model.num_features == two[1].shape[1]


@every_name
def test_tracing_by_fx(name: str) -> None:
    model, x = _create(name).eval(), _images()
    nodes, _ = get_graph_node_names(model)
    with torch.no_grad():
        want = model(x)
        graph = create_feature_extractor(model, {nodes[-1]: "out"})
        torch.testing.assert_close(graph(x)["out"], want)
        torch.testing.assert_close(GraphExtractNet(model, [nodes[-1]])(x), want)


@every_name
def test_backward_of_a_traced_network(name: str) -> None:
    model = _create(name, num_classes=5).train()
    nodes, _ = get_graph_node_names(model)
    traced = GraphExtractNet(model, [nodes[-1]])
    traced(_images(2)).mean().backward()
    assert [key for key, parameter in traced.named_parameters() if parameter.grad is None] == []


@every_name
def test_every_kind_of_extractor(name: str) -> None:
    for kind in ("fx", "hook", "list", "dict", "getter", FeatureGraphNet):
        maps = _create(name, features_only=True, feature_cls=kind, out_indices=(0, 2)).eval()(_images())
        assert len(maps) == 2


@pytest.mark.parametrize("name", NANO)
def test_missing_pretrained_weights_are_reported(name: str) -> None:
    assert not timm.is_model_pretrained(name)
    assert name not in timm.list_models(pretrained=True)
    with torch.device("meta"), pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        _create(name, pretrained=True)
