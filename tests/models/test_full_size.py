"""timm's contract for the published sizes, on the meta device; with real tensors under the marker `full`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

from tests.models.zoo import FULL_SIZE, on_meta


@pytest.fixture(scope="module", params=FULL_SIZE)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return on_meta(request.param).eval()


def test_no_memory_is_allocated(model: nn.Module) -> None:
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_default_cfg(model: nn.Module) -> None:
    cfg, state = model.default_cfg, model.state_dict()
    assert state[f"{cfg['classifier']}.weight"].shape == (cfg["num_classes"], model.num_features)
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0]
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])


def test_shapes_of_all_feature_maps(model: nn.Module) -> None:
    cfg = model.default_cfg
    size = cfg["input_size"][-1]
    final, maps = model.forward_intermediates(torch.empty(2, *cfg["input_size"], device="meta"))
    assert len(maps) == len(model.feature_info) == len(model.stages) >= 4
    for feature, info in zip(maps, model.feature_info):
        assert feature.shape == (2, info["num_chs"], size // info["reduction"], size // info["reduction"])
        assert model.get_submodule(info["module"])
    assert final.shape == (2, model.num_features, *cfg["pool_size"])
    assert model.forward_head(final).shape == (2, 1000)
    assert model.forward_head(final, pre_logits=True).shape == (2, model.num_features)


def test_classifier_can_be_replaced(model: nn.Module) -> None:
    final = torch.empty(2, model.num_features, 7, 7, device="meta")
    head, num_classes = copy.deepcopy(model.head), model.num_classes
    model.reset_classifier(0)
    assert model.forward_head(final).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model.forward_head(final).shape == final.shape
    model.head, model.num_classes = head, num_classes


def test_every_parameter_is_in_one_group(model: nn.Module) -> None:
    groups = group_parameters(model, model.group_matcher())
    assert sorted(key for group in groups.values() for key in group) == sorted(key for key, _ in model.named_parameters())
    blocks = sum(len(stage.blocks) for stage in model.stages)
    assert len(groups) >= blocks + 2


SIZES = (
    "slak_small",
    "isotropic_base",
    "isotropic_large",
    "slak_base",
    "slak_large",
    "31l",
    "xl",
    "_l",
    "_b",
    "_s",
    "_n",
    "_p",
    "_f",
)
# With one block in each stage, the sizes of a family differ in their widths alone: the smallest is short.
one_size_of_each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.endswith(SIZES) else []) for name in FULL_SIZE]
)


@one_size_of_each
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = on_meta(name, **_one_block_a_stage(name)).train()
    model(torch.empty(2, *model.default_cfg["input_size"], device="meta")).sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def _one_block_a_stage(name: str) -> dict[str, Any]:
    return {"depth": 4} if "isotropic" in name else {"depths": (1, 1, 1, 1)}


@one_size_of_each
def test_features_only(name: str) -> None:
    model = on_meta(name, features_only=True, **_one_block_a_stage(name))
    size = timm.get_pretrained_cfg(name).input_size[-1]
    maps = model(torch.empty(1, 3, size, size, device="meta"))
    assert len(maps) == 4
    for feature, width, reduction in zip(maps, model.feature_info.channels(), model.feature_info.reduction()):
        assert feature.shape == (1, width, size // reduction, size // reduction)


PUBLISHED = {
    "replknet_31b": (2, 2, 18, 2),
    "slak_tiny": (3, 3, 9, 3),
    "slak_small": (3, 3, 27, 3),
    "slak_base": (3, 3, 27, 3),
    "slak_large": (3, 3, 27, 3),
    "shiftwise_tiny": (3, 3, 18, 3),
    "unireplknet_a": (2, 2, 6, 2),
    "unireplknet_n": (2, 2, 8, 2),
    "unireplknet_t": (3, 3, 18, 3),
    "unireplknet_xl": (3, 3, 27, 3),
    "roadmap_00_resnet50": (3, 4, 6, 3),
    "roadmap_01_stage_ratio": (3, 3, 9, 3),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_depths(name: str) -> None:
    model = on_meta(name)
    assert tuple(len(stage.blocks) // (2 if name.startswith("replknet") else 1) for stage in model.stages) == PUBLISHED[name]


@pytest.mark.full
@pytest.mark.parametrize("name", FULL_SIZE)
def test_real_weights_and_real_images(name: str) -> None:
    model = timm.create_model(name, num_classes=10).train()
    x = torch.randn(2, 3, 64, 64)
    model(x).square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    with torch.no_grad():
        assert model.eval()(x).isfinite().all()
