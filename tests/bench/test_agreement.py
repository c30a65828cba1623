"""Gradients of networks that magnify rounding: the noise in PyTorch's own gradients sets the tolerance."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from widekernel.bench import agreement
from widekernel.bench.agreement import REFERENCE, check_variants
from widekernel.bench.errors import BenchmarkError
from widekernel.bench.variants import OURS, PYTORCH, TRAIN, Variant

TARGET = torch.tensor([0, 1])


class Magnifying(nn.Module):
    """A batch norm over two numbers that are nearly equal, which magnifies their difference."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64, eps=1e-14)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.mean((2, 3))).tanh() * x.amax((2, 3)))


def variants(change: Callable[[Tensor], Tensor], spread: float = 5e-4) -> list[Variant]:
    """Return PyTorch's two layouts, and a third network that sees changed images. All numbers are nearly 1."""
    network, images = Magnifying(), 1 + spread * torch.rand(2, 64, 3, 3)
    nn.init.normal_(network.norm.weight)

    def built(name: str, layout: str, change: Callable[[Tensor], Tensor]) -> Variant:
        one = copy.deepcopy(network)
        return Variant(name, layout, False, one, lambda x: one(change(x)), images)

    return [built(PYTORCH, "NHWC", torch.clone), built(PYTORCH, "NCHW", torch.clone), built(OURS, "NCHW", change)]


def with_rounding(images: Tensor) -> Tensor:
    return images * (1 + 1e-6 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1)))


def test_magnified_rounding_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert variants(with_rounding)[0].name == REFERENCE
    check_variants("it", variants(with_rounding), TRAIN, TARGET)
    monkeypatch.setattr(agreement, "PERTURBATION", 0.0)
    with pytest.raises(BenchmarkError, match=r"the gradients of it: ours NCHW .* what rounding changes"):
        check_variants("it", variants(with_rounding), TRAIN, TARGET)


def test_wrong_gradients_are_found() -> None:
    with pytest.raises(BenchmarkError, match="the gradients of it: ours NCHW"):
        check_variants("it", variants(torch.neg), TRAIN, TARGET)


def test_gradients_that_are_only_rounding_cannot_be_compared() -> None:
    with pytest.raises(
        BenchmarkError, match=r"the gradients of it cannot be compared: rounding alone changes 3 of 4 .* larger images"
    ):
        check_variants("it", variants(with_rounding, spread=1e-7), TRAIN, TARGET)
