"""Our networks as encoders of segmentation_models_pytorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import widekernel
from tests.models.zoo import NANO

smp: Any = pytest.importorskip("segmentation_models_pytorch")
pytestmark = pytest.mark.clients

ENCODERS = [name for name in NANO if "isotropic" not in name]
ORDINARY = ["Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "UPerNet", "Segformer"]


def _model(architecture: str, name: str, **kwargs: Any) -> nn.Module:
    arguments = {"encoder_weights": None, "classes": 3, **kwargs}
    return getattr(smp, architecture)(f"tu-{name}", **arguments)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("architecture", "name"),
    [*((architecture, "slak_nano") for architecture in ORDINARY), *(("Unet", name) for name in ENCODERS)],
)
def test_segmentation(architecture: str, name: str) -> None:
    model = _model(architecture, name).train()
    out = model(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 3, 64, 64)
    out.mean().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


@pytest.mark.parametrize(
    ("architecture", "output_stride"), [("DeepLabV3", 8), ("DeepLabV3", 16), ("DeepLabV3Plus", 16), ("PAN", 16), ("PAN", 32)]
)
@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano", "shiftwise_nano", "unireplknet_nano", "roadmap_nano"])
def test_output_strides(name: str, architecture: str, output_stride: int) -> None:
    model = _model(architecture, name, encoder_output_stride=output_stride).eval()
    size = 8 * output_stride  # the decoder pools three times
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert model.encoder(x)[-1].shape[-1] == 8
        want = model(x)
        assert want.shape == (1, 3, size, size)
        torch.testing.assert_close(widekernel.fold(model)(x), want, rtol=1e-4, atol=1e-4)


def test_isotropic_networks_have_no_feature_pyramid() -> None:
    """The library itself detects this; our network refuses an output stride and gives the reason."""
    with pytest.raises(ValueError, match="Unsupported model downsampling pattern"):
        _model("Unet", "convnext_isotropic_nano")
    with pytest.raises(ValueError, match="Unsupported model downsampling pattern"):
        _model("DeepLabV3", "convnext_isotropic_nano")
