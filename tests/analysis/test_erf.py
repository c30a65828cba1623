"""Effective receptive fields: scores, areas, and the networks they work with."""

from __future__ import annotations

import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import widekernel
from widekernel.analysis.erf import Area, area_ratio, contribution, heat_maps, log_scores
from widekernel.errors import ArgumentError


class Sum(nn.Module):
    """Two convolutions without norm, whose receptive field is known."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 2, 5, padding=2, bias=False)
        for convolution in (self.first, self.second):
            nn.init.constant_(convolution.weight, 0.5)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def images(count: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_scores_are_the_gradient_of_the_center_within_the_receptive_field_only() -> None:
    matrix = contribution(Sum(), images()).matrix
    taps = np.convolve(np.ones(3), np.ones(5))
    expected = np.zeros((16, 16))
    # Per path: 0.5 · 0.5 over 4 hidden and 2 output channels, and 3 channels of the image.
    expected[5:12, 5:12] = np.outer(taps, taps) * 0.25 * 4 * 2 * 3
    np.testing.assert_allclose(matrix, expected, rtol=1e-6)


def test_an_image_counts_alone_or_in_a_batch() -> None:
    model = timm.create_model("slak_nano")
    batch = images(3, 64)
    together = contribution(model, [batch])
    one_by_one = contribution(model, list(batch))
    assert together.images == one_by_one.images == 3
    np.testing.assert_allclose(together.matrix, one_by_one.matrix, rtol=1e-12)


def test_the_network_is_as_before() -> None:
    model = timm.create_model("replknet_nano")
    model.stages[1].eval()
    frozen = next(model.parameters()).requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    contribution(model, images(1, 64))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not frozen.requires_grad
    assert all(parameter.requires_grad for parameter in list(model.parameters())[1:])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["replknet_nano", "slak_nano", "shiftwise_nano", "roadmap_nano"])
def test_folding_does_not_change_the_field(name: str) -> None:
    model = timm.create_model(name).double().eval()
    x = [images(1, 64).double()]
    np.testing.assert_allclose(contribution(widekernel.fold(model), x).matrix, contribution(model, x).matrix, rtol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_networks_of_timm(name: str) -> None:
    small = {
        "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 24},
        "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": (1, 1, 1, 1)},
    }
    model = timm.create_model(name, **small.get(name, {}))
    size = 224 if name in small else 64
    matrix = contribution(model, images(1, size)).matrix
    assert matrix.shape == (size, size)
    assert matrix.max() > 0


def test_a_named_layer() -> None:
    model = timm.create_model("slak_nano")
    early = contribution(model, images(1, 64), layer="stem").matrix
    assert (early > 0).sum() < (contribution(model, images(1, 64)).matrix > 0).sum() / 10


@pytest.mark.parametrize(
    ("model", "layer", "message"),
    [
        ("slak_nano", "stage", r"no module 'stage'.*Did you mean"),
        ("slak_nano", "head.fc", r"'head\.fc'.*shape \(1, 1000\).*\(N, C, H, W\)"),
        ("linear", None, "name it"),
    ],
)
def test_networks_without_a_feature_map(model: str, layer: str | None, message: str) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 3)) if model == "linear" else timm.create_model(model)
    with pytest.raises(ArgumentError, match=message):
        contribution(network, images(1, 64), layer)


def test_unusable_images() -> None:
    with pytest.raises(ArgumentError, match="no images"):
        contribution(Sum(), [])
    with pytest.raises(ArgumentError, match=r"\(8, 8\).*\(16, 16\).*same size"):
        contribution(Sum(), [images(1, 16), images(1, 8)])
    model = Sum()
    model.first.weight.data[0] = torch.nan
    with pytest.raises(ArgumentError, match="all 2 images"):
        contribution(model, images(2))


def test_images_without_finite_scores_are_left_out_and_counted() -> None:
    good, bad = images(2)
    bad = bad.clone()
    bad[:] = torch.inf
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Softplus())
    found = contribution(model, [good, bad * 0], layer="2")
    assert (found.images, found.skipped) == (1, 1)


def test_areas() -> None:
    spot = np.zeros((33, 33))
    spot[16, 16] = 1
    assert area_ratio(spot, 0.99) == Area(3, 9 / 33**2)
    flat = np.ones((32, 64))
    side = next(side for side in range(3, 32, 2) if side**2 / (32 * 64) > 0.2)
    assert area_ratio(flat, 0.2) == Area(side, (side / 32) * (side / 64))
    assert area_ratio(flat.T, 0.2) == area_ratio(flat, 0.2)
    assert area_ratio(flat, 0.9) is None
    assert log_scores(np.array([[0.0, 9.0, 99.0]])).tolist() == [[0.0, 0.5, 1.0]]


@pytest.mark.parametrize(
    ("matrix", "threshold", "message"),
    [
        (np.zeros((8, 8)), 0.2, "all contribution scores are 0"),
        (np.ones((8, 8)), 1.0, "threshold is 1.0"),
        (np.ones(8), 0.2, r"shape \(8,\)"),
        (-np.ones((8, 8)), 0.2, "0 or more"),
        (np.full((8, 8), np.nan), 0.2, "finite"),
    ],
)
def test_wrong_matrices(matrix: np.ndarray, threshold: float, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        area_ratio(matrix, threshold)


def test_picture() -> None:
    matrices = {f"network {n}": np.random.default_rng(n).random((20, 20)) for n in range(5)}
    picture = Image.open(io.BytesIO(heat_maps(matrices)))
    assert picture.size[0] > 1000
