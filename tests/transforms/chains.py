"""Helpers of the tests of chains: a chain of small blocks, and what it must compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.transforms.fusion import ByHand, Convolutional, calls_of, fused, randomized
from widekernel.transforms.acceleration.fusion import FusedChain


def image(batch: int = 2, height: int = 9) -> Tensor:
    return torch.randn(batch, 12, height, 12).contiguous(memory_format=torch.channels_last)


def chained(*kinds: Callable[[], nn.Module]) -> Any:
    model = randomized(nn.Sequential(*(kind() for kind in kinds or (ByHand, Convolutional, ByHand))))
    fused(model, image())
    assert type(model) is FusedChain
    calls_of(model, image())
    return model


def by_blocks(model: nn.Module, x: Tensor) -> Tensor:
    """Run the own code of every block."""
    with torch.no_grad():
        for block in model.children():
            x = nn.Module.__call__(block, x)
    return x


def assert_right(model: nn.Module, x: Tensor) -> None:
    got, _ = calls_of(model, x)
    want = by_blocks(model, x)
    assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    assert got.stride() == want.stride()
