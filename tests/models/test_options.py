"""Options that timm's ConvNeXt also takes: output stride, activation, norm, device and type."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import RmsNorm, RmsNorm2d
from torch import nn

import widekernel
from tests.models.zoo import NANO, alive, assert_near, create, images
from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.layers import LargeKernel, Rect, Rectangles, ShiftTiles
from widekernel.layers.sources import dilate, rects_of

STAGED = [name for name in NANO if "isotropic" not in name]
# If no layer depends on the whole map, each pixel of the strided network is one of the dilated network.
LOCAL = [name for name in STAGED if name not in ("shiftwise_nano", "unireplknet_nano")]


def _out(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.forward_features(x)


# ---- Output stride


def test_a_dilated_rectangle_is_a_dilated_convolution() -> None:
    x, kernel = torch.randn(2, 4, 17, 19, dtype=torch.float64), torch.randn(4, 1, 5, 3, dtype=torch.float64)
    sparse = Rect.centered(kernel, 3)
    rect = sparse.dense()
    assert (sparse.size, sparse.reach, sparse.label) == ((5, 3), (6, 6, 3, 3), "5×3 (dilation 3)")
    assert (rect.size, rect.reach, rect.label) == ((13, 7), (6, 6, 3, 3), "13×7")
    assert rect.anchor == (6, 3)
    want = F.conv2d(x, kernel, padding=(6, 3), dilation=3, groups=4)
    torch.testing.assert_close(F.conv2d(x, rect.kernel, padding=rect.anchor, groups=4), want)
    torch.testing.assert_close(ops.depthwise_sum(x, [kernel], dilations=[3]), want)
    even = Rect(torch.randn(4, 1, 1, 6), (0, 2), 2).dense()
    assert (even.size, even.anchor) == ((1, 11), (0, 4))


def test_a_dilated_source_has_the_same_parameters_and_gradients() -> None:
    for make in (lambda: Rectangles(4, [(9, 9), (3, 3)]), lambda: ShiftTiles(4, 9, 3, paths=2, groups=2)):
        plain, wide = make(), dilate(make(), 2)
        assert list(plain.state_dict()) == list(wide.state_dict())
        wide.load_state_dict(plain.state_dict())
        sizes = [(rect.size, rect.dilation) for rect in rects_of(wide) or []]
        assert sizes == [(rect.size, 2) for rect in rects_of(plain) or []]
        layer = LargeKernel(wide, identity=True)
        layer(torch.randn(1, 4, 12, 12)).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", LOCAL)
def test_dilated_network_computes_the_same_at_more_positions(name: str, output_stride: int) -> None:
    model, other = alive(name), create(name, output_stride=output_stride).eval()
    other.load_state_dict(model.state_dict())
    x = images()
    step = 32 // output_stride
    fine, coarse = _out(other, x), _out(model, x)
    assert fine.shape[-1] == 64 // output_stride == step * coarse.shape[-1]
    # A 2x2 convolution whose taps are two apart reads one pixel further up and left.
    shift = 1 if output_stride == 8 and not name.startswith("replknet") else 0
    at_same_places = fine[:, :, shift::step, shift::step]
    assert_near(at_same_places, coarse)
    assert_near(_out(widekernel.fold(other), x), fine)


@pytest.mark.parametrize("name", STAGED)
def test_weights_fit_any_output_stride(name: str, tmp_path: Any) -> None:
    model, other = alive(name), create(name, output_stride=8)
    path = widekernel.save_checkpoint(model, tmp_path / "a.safetensors")
    widekernel.load_checkpoint(other, path)
    assert [info["reduction"] for info in other.feature_info] == [4, 8, 8, 8]
    other.train()(images()).mean().backward()
    assert all(parameter.grad is not None for parameter in other.parameters())


def test_output_stride_32_changes_nothing() -> None:
    for name in STAGED:
        torch.manual_seed(1)
        model = create(name).eval()
        torch.manual_seed(1)
        assert torch.equal(_out(create(name, output_stride=32).eval(), images()), _out(model, images()))


def test_invalid_output_strides() -> None:
    for wrong in (4, 64, 12, "16", True):
        with pytest.raises(ArgumentError, match=r"output_stride .* is unknown: it must be 8, 16 or 32"):
            create("slak_nano", output_stride=wrong)
    with pytest.raises(ArgumentError, match="one resolution throughout, of stride 8: leave it out"):
        create("convnext_isotropic_nano", output_stride=16)
    assert create("convnext_isotropic_nano", output_stride=8)
    with pytest.raises(
        ArgumentError, match="not rectangles and cannot be dilated: leave out output_stride or padding='same'"
    ):
        create("slak_pw_nano", padding="same", output_stride=8)


# ---- Activation and norm


@pytest.mark.parametrize("act", ["silu", nn.SiLU])
@pytest.mark.parametrize("name", NANO)
def test_activation(name: str, act: Any) -> None:
    model = create(name, act_layer=act)
    made = [module for module in model.stages.modules() if isinstance(module, nn.SiLU)]
    assert len(made) == sum(len(stage.blocks) for stage in model.stages) // (2 if name.startswith("replknet") else 1)
    assert not [module for module in model.stages.modules() if isinstance(module, nn.GELU)]
    assert_near(_out(widekernel.fold(model.eval()), images()), _out(model, images()))


@pytest.mark.parametrize("norm", ["rmsnorm", "rmsnorm2d", RmsNorm, RmsNorm2d])
@pytest.mark.parametrize("name", ["slak_nano", "shiftwise_nano", "convnext_isotropic_nano", "roadmap_nano"])
def test_layer_norms(name: str, norm: Any) -> None:
    model = create(name, norm_layer=norm)
    assert any(isinstance(module, (RmsNorm, RmsNorm2d)) for module in model.modules())
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert model(images()).isfinite().all()


@pytest.mark.parametrize("norm", ["batchnorm2d", "groupnorm1", nn.SyncBatchNorm, nn.BatchNorm2d])
def test_batch_norms(norm: Any) -> None:
    model = create("replknet_nano", norm_layer=norm).eval()
    made = [module for module in model.modules() if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm))]
    assert len({type(module) for module in made}) == 1
    assert len(made) > 40
    assert model(images()).isfinite().all()


def test_invalid_norms_and_activations() -> None:
    with pytest.raises(ArgumentError, match=r"norm_layer 'batchnorm2d' cannot replace this family's layer norms"):
        create("slak_nano", norm_layer="batchnorm2d")
    with pytest.raises(ArgumentError, match=r"norm_layer 'rmsnrm' .*Did you mean 'rmsnorm'\?"):
        create("slak_nano", norm_layer="rmsnrm")
    with pytest.raises(ArgumentError, match="norm_layer 'nonsense' is unknown"):
        create("replknet_nano", norm_layer="nonsense")
    with pytest.raises(ArgumentError, match="act_layer 'nonsense' is unknown"):
        create("slak_nano", act_layer="nonsense")


# ---- Device and type


@pytest.mark.parametrize("name", NANO)
def test_device_and_type(name: str) -> None:
    model = create(name, device="meta", dtype=torch.bfloat16)
    state = model.state_dict()
    assert all(value.is_meta for value in state.values())
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.bfloat16}
    low = create(name, dtype=torch.bfloat16, num_classes=0).eval()
    low.reset_classifier(3)
    with torch.no_grad():
        assert low(images().bfloat16()).dtype is torch.bfloat16
    features = timm.create_model(name, dtype=torch.float64, features_only=True)
    assert features(images().double())[0].dtype is torch.float64


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "bfloat16"])
def test_invalid_weight_types(dtype: Any) -> None:
    with pytest.raises(ArgumentError, match="cannot be the type of weights"):
        create("slak_nano", dtype=dtype)
