"""Helpers of the tests of `compact`: prices, masks, and small folded layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from widekernel.layers import (
    DepthwiseConv2d,
    FoldedLargeKernel,
    KernelSource,
    Rect,
)
from widekernel.layers.grouped import GroupedKernels
from widekernel.transforms.compaction import CostModel

# Only multiply-accumulates count, so that everything dead goes even in layers too small for it to pay.
FREE = CostModel(move=0, outside=0, call=0, group=0, block=1, ragged=1, fill=0)
NETWORKS = [
    "slak_nano",
    "slak_nano_square",
    "slak_nano_without_bn",
    "slak_reg_nano",
    "slak_pw_nano",
    "slak_pww_nano",
    "replknet_nano",
    "shiftwise_nano",
    "shiftwise_nano_without_ghosts",
    "shiftwise_v1_nano",
    "roadmap_nano",
    "unireplknet_nano",
    "unireplknet_nano_every_kernel",
]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def kernels(module: nn.Module) -> list[tuple[Tensor, int]]:
    """List the trained kernels of large-kernel layers and depthwise convolutions, with their channels."""
    found = []
    for part in module.modules():
        if isinstance(part, KernelSource) and hasattr(part, "rects"):
            found += [(p, part.channels) for p in part.parameters() if p.dim() == 4 and p.shape[-1] > 1]
        elif isinstance(part, DepthwiseConv2d):
            found.append((part.weight, part.out_channels))
    return found


@torch.no_grad()
def mask(module: nn.Module, granularity: str, share: float, seed: int = 0) -> nn.Module:
    """Set a share of the tiles, of the branches (a channel's kernel in one parameter) or of the channels to zero."""
    generator = torch.Generator().manual_seed(seed)
    dead: dict[int, Tensor] = {}
    for kernel, channels in kernels(module):
        if granularity == "channel":
            # The same channels in all kernels of a layer, which have as many and follow one another.
            chosen = dead.setdefault(channels, torch.rand(channels, generator=generator) < share)
            kernel.view(channels, -1)[chosen] = 0
        elif granularity == "branch":
            kernel.view(channels, -1)[torch.rand(channels, generator=generator) < share] = 0
        else:
            kernel[torch.rand(len(kernel), generator=generator) < share] = 0
    return module


def grouped(module: nn.Module) -> list[GroupedKernels]:
    return [part for part in module.modules() if isinstance(part, GroupedKernels)]


def folded_layer(*rects: tuple[Tensor, tuple[int, int]]) -> FoldedLargeKernel:
    channels = rects[0][0].shape[0]
    return FoldedLargeKernel([Rect(*rect) for rect in rects], torch.randn(channels, dtype=rects[0][0].dtype)).eval()


def crossed(channels: int = 4, big: int = 9, small: int = 3) -> FoldedLargeKernel:
    return folded_layer(
        (torch.randn(channels, 1, big, small, dtype=torch.float64), (big // 2, small // 2)),
        (torch.randn(channels, 1, small, big, dtype=torch.float64), (small // 2, big // 2)),
    )
