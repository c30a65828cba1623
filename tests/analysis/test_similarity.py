"""Centered kernel alignment of the stages of two networks."""

from __future__ import annotations

import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import widekernel
from widekernel.analysis.similarity import cka, plot, stage_maps
from widekernel.errors import ArgumentError


class TwoStages(nn.Module):
    """A network that reports given maps."""

    feature_info = [{"module": "a"}, {"module": "b"}]

    def __init__(self, first: torch.Tensor, second: torch.Tensor) -> None:
        super().__init__()
        self.maps = (first, second)

    def forward_intermediates(self, images: torch.Tensor, **_: object) -> list[torch.Tensor]:
        numbers = images[:, 0, 0, 0].long()
        return [maps[numbers] for maps in self.maps]


def numbered(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 3, 2, 2)


def random_maps(count: int, channels: int, seed: int) -> torch.Tensor:
    return torch.randn(count, channels, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rotation_scale_and_shift_leave_a_representation_equal_and_noise_is_unrelated() -> None:
    x, noise = random_maps(200, 6, 0), random_maps(200, 6, 1)
    rotation = torch.linalg.qr(random_maps(6, 6, 2)[:, :, 0, 0]).Q
    rotated = 3 * torch.einsum("nchw,cd->ndhw", x, rotation) + 5
    images = [(part, part) for part in numbered(200).split(50)]
    found = cka(TwoStages(x, noise), TwoStages(rotated, x), images)
    assert found.rows == found.columns == ("a", "b")
    assert found.images == 200
    np.testing.assert_allclose(found.matrix[0], 1, atol=1e-9)
    assert np.abs(found.matrix[1]).max() < 0.15


def test_the_estimate_equals_its_definition() -> None:
    """Without bias: sums over distinct images, written out."""
    x, y = random_maps(7, 3, 0)[:, :, 0, 0], random_maps(7, 2, 1)[:, :, 0, 0]

    def hsic(a: torch.Tensor, b: torch.Tensor) -> float:
        k, m = (a @ a.T).numpy(), (b @ b.T).numpy()
        n, pairs, triples, quadruples = len(k), [], [], []
        for i in range(n):
            for j in set(range(n)) - {i}:
                pairs.append(k[i, j] * m[i, j])
                for q in set(range(n)) - {i, j}:
                    triples.append(k[i, j] * m[i, q])
                    quadruples += [k[i, j] * m[q, r] for r in set(range(n)) - {i, j, q}]
        return float(np.mean(pairs) + np.mean(quadruples) - 2 * np.mean(triples))

    maps = [values[:, :, None, None] for values in (x, y)]
    images = numbered(7)
    found = cka(TwoStages(*maps), TwoStages(*maps), [(images, images)])
    assert found.matrix[0, 1] == pytest.approx(hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y)), rel=1e-9)


def test_networks_of_ours_and_of_timm() -> None:
    ours, theirs = timm.create_model("slak_nano").eval(), timm.create_model("resnet18").eval()
    images = torch.rand(8, 3, 64, 64)
    found = cka(ours, theirs, [(images, images)])
    assert found.matrix.shape == (4, 5)
    assert found.rows == tuple(f"stages.{i}" for i in range(4))
    folded = cka(ours, widekernel.fold(ours), [(images, images)])
    np.testing.assert_allclose(np.diag(folded.matrix), 1, atol=1e-5)
    assert list(stage_maps(theirs, images)) == list(found.columns)
    assert Image.open(io.BytesIO(plot(found, "slak_nano", "resnet18"))).size[0] > 100


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "no images"), ([(numbered(3), numbered(3))], "3 and 3 images"), ([(numbered(5), numbered(4))], "5 and 4 images")],
)
def test_wrong_batches(batches: list[tuple[torch.Tensor, torch.Tensor]], message: str) -> None:
    x = random_maps(5, 2, 0)
    with pytest.raises(ArgumentError, match=message):
        cka(TwoStages(x, x), TwoStages(x, x), batches)


def test_a_network_without_stages() -> None:
    with pytest.raises(ArgumentError, match="Linear does not tell its stages"):
        stage_maps(nn.Linear(1, 1), numbered(4))
