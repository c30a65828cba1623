"""Helpers of the tests of layers: comparisons, and batch norms with random numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.ops.cases import assert_close
from widekernel.layers import Rect
from widekernel.layers.tiles import side_by_side, stacked


@torch.no_grad()
def randomized(module: nn.Module) -> nn.Module:
    """Randomize the statistics, weights and biases of all batch norms, and all layer scales; in float64."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            if part.running_mean is not None:
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
            if part.weight is not None:
                part.weight.uniform_(-1.5, 1.5)
                part.bias.normal_()
    for name, parameter in module.named_parameters():
        if name.split(".")[-1] == "gamma":
            parameter.uniform_(-1, 1)
    return module.double().eval()


def image(channels: int = 3, height: int = 8, width: int = 9, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, dtype=torch.float64)


def tall_strip(tiles: Tensor, kernel_size: int) -> Rect:
    """Stack tiles (C, nk, N, N) below one another into a rectangle of nk·N x N taps."""
    return Rect(stacked(tiles), (kernel_size // 2, tiles.shape[3] // 2))


def wide_strip(tiles: Tensor, kernel_size: int) -> Rect:
    """Put tiles (C, nk, N, N) side by side into a rectangle of N x nk·N taps."""
    return Rect(side_by_side(tiles), (tiles.shape[2] // 2, kernel_size // 2))


__all__ = ["assert_close", "image", "randomized", "tall_strip", "wide_strip"]
