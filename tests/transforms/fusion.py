"""Helpers of the tests of fused blocks: blocks by hand, fused networks, and what ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp
from torch import Tensor, nn

from widekernel import accelerate, ops
from widekernel.bench.variants import with_visible_blocks
from widekernel.transforms import AccelerationReport
from widekernel.transforms.acceleration.fusion import FusedBlock


class ByHand(nn.Module):
    """A block in the style of ConvNeXt, with every part that can be fused."""

    def __init__(self, dim: int = 12, drop_path: float = 0.1) -> None:
        super().__init__()
        self.mixer = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-3)
        self.mlp = Mlp(dim, 3 * dim, drop=0.1)
        self.scale = nn.Parameter(torch.randn(dim))
        self.drop_path = DropPath(drop_path)
        self.shift_by = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.mixer(x).permute(0, 2, 3, 1)))
        y = (y * self.scale).permute(0, 3, 1, 2)
        if self.shift_by:
            y = y + self.shift_by
        return x + self.drop_path(y)


class Convolutional(nn.Module):
    """1x1 convolutions with batch norms, and a residual."""

    def __init__(self, dim: int = 12) -> None:
        super().__init__()
        self.before = nn.BatchNorm2d(dim)
        self.first = nn.Conv2d(dim, 2 * dim, 1, bias=False)
        self.between = nn.BatchNorm2d(2 * dim)
        self.act = nn.GELU(approximate="tanh")
        self.second = nn.Conv2d(2 * dim, dim, 1, bias=False)
        self.after = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.second(self.act(self.between(self.first(self.before(x)))))) + x


class InPlace(nn.Module):
    """Operations in place, on values that nothing else uses."""

    def __init__(self, dim: int = 12) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(dim, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, dim, 1)
        self.scale = nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.act(self.first(x)))
        y *= self.scale[:, None, None]
        y += x
        return y


class Normalized(nn.Module):
    """A norm over maps, one product, an activation as a function, and other operations around them."""

    def __init__(self, dim: int = 12) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim)
        self.conv = nn.Conv2d(dim, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(self.norm(x.flip(-1))))
        return torch.cat([y, y.mean((2, 3), keepdim=True).expand_as(y)], 1)


def randomized(model: nn.Module) -> Any:
    """Make every part visible: statistics and affine parameters of norms, and layer scales."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)) and module.weight is not None:
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(-1, 1)
    return with_visible_blocks(model).eval()


def fused(model: nn.Module, x: Tensor) -> tuple[Any, AccelerationReport]:
    with torch.no_grad():
        return accelerate(model, x)


def fused_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FusedBlock)]


def calls_of(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """Call without gradients; return the result and the number of native calls of fused blocks."""
    with torch.no_grad(), ops.trace() as traced:
        result = function(*args)
    return result, len(traced.fused)


def precisions_of(function: Callable[..., Any], *args: Any) -> tuple[Any, set[str]]:
    """Return the result of a call, and the precisions of its fused products."""
    with torch.no_grad(), ops.trace() as traced:
        result = function(*args)
    return result, {call.precision for call in traced.fused}
