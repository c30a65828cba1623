"""Our networks as backbones of transformers and of torchvision's detectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import widekernel
from tests.models.zoo import NANO

transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.clients


def _config(name: str, **kwargs: Any) -> Any:
    return transformers.TimmBackboneConfig(backbone=name, use_pretrained_backbone=False, **kwargs)


@pytest.mark.parametrize("name", NANO)
def test_timm_backbone(name: str) -> None:
    backbone = transformers.TimmBackbone(_config(name, out_indices=(1, 3))).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 64)).feature_maps
    assert [feature.shape[1] for feature in maps] == backbone.channels
    assert len(maps) == 2


@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano", "shiftwise_nano", "unireplknet_nano"])
def test_upernet(name: str, tmp_path: Path) -> None:
    config = transformers.UperNetConfig(
        backbone_config=_config(name, out_indices=(0, 1, 2, 3)),
        num_labels=3,
        hidden_size=16,
        auxiliary_in_channels=64,
        auxiliary_channels=16,
    )
    model = transformers.UperNetForSemanticSegmentation(config).train()
    x, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    model(x, labels=labels).loss.backward()
    assert all(parameter.grad is not None for parameter in model.backbone.parameters() if parameter.requires_grad)
    model.eval()
    with torch.no_grad():
        want = model(x).logits
        torch.testing.assert_close(widekernel.fold(model)(x).logits, want, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path)
        again = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(x).logits, want)
    assert want.shape == (2, 3, 64, 64)


class _Pyramid(nn.Module):
    """Feature pyramid on the maps of a network, with one width."""

    out_channels = 16

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True)
        self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.pyramid({str(i): feature for i, feature in enumerate(self.body(x))})  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [name for name in NANO if "isotropic" not in name])
def test_a_detector(name: str) -> None:
    sizes = tuple((16 * 2**i,) for i in range(4))
    model = FasterRCNN(
        _Pyramid(name),
        num_classes=3,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 4),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 3, 2),
    ).train()
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 64, 64)] * 2, [target] * 2)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    without = [key for key, parameter in model.backbone.body.named_parameters() if parameter.grad is None]
    assert without == [key for key in without if "norm_pre" in key]
    folded = widekernel.fold(model.eval())
    with torch.no_grad():
        ours, theirs = (
            each.backbone(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))) for each in (folded, model)
        )
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-4)
