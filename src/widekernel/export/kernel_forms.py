"""Large kernels in the form that an engine computes fastest: as strips, or as one dense kernel; with padded channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.export.base import KernelRule
from widekernel.layers import FoldedLargeKernel
from widekernel.layers.folding import Folded, deep_copy
from widekernel.layers.rect import Rect
from widekernel.layers.replacing import replace_modules
from widekernel.ops import plain

Kernels = Literal["auto", "strips", "dense"]


class GraphKernels(Folded, nn.Module):
    """A folded large-kernel layer as plain convolutions, for graphs that other programs read.

    Args:
        rects: rectangles of C channels each.
        bias: (C,).
        multiple: the convolutions have a multiple of this many channels; the surplus is zero and removed afterwards.
    """

    def __init__(self, rects: Sequence[Rect], bias: Tensor, multiple: int = 1) -> None:
        super().__init__()
        self.channels = bias.numel()
        self.surplus = -self.channels % multiple
        self.kernels = nn.ParameterList(F.pad(rect.kernel.detach(), (0, 0) * 3 + (0, self.surplus)) for rect in rects)
        self.anchors = [rect.anchor for rect in rects]
        self.bias = nn.Parameter(F.pad(bias.detach(), (0, self.surplus)))
        self.requires_grad_(False)

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); with `relu`, ReLU is applied."""
        padded = F.pad(x, (0, 0, 0, 0, 0, self.surplus)) if self.surplus else x
        y = plain.depthwise_sum(padded, list(self.kernels), self.anchors, self.bias, relu=relu)
        return y[:, : self.channels] if self.surplus else y


def with_graph_kernels(network: nn.Module, rule: KernelRule, kernels: Kernels = "auto") -> tuple[nn.Module, dict[str, int]]:
    """Return a copy of a network with its folded large kernels as `GraphKernels`, and how many layers have which form.

    Args:
        network: the network, in evaluation mode.
        rule: what the engine computes fastest.
        kernels: `strips` or `dense` for all layers, or `auto` for a choice by the rule.
    """
    forms: Counter[str] = Counter()

    def replace(module: nn.Module, name: str) -> tuple[nn.Module, bool]:
        if type(module) is not FoldedLargeKernel:
            return module, True
        rects = module.rects()
        if len(rects) > 1:
            dense = dense_rect(rects)
            as_dense = kernels == "dense" or (kernels == "auto" and prefers_dense(rects, dense, rule))
            rects = [dense] if as_dense else rects
            forms["dense" if as_dense else "strips"] += 1
        else:
            forms["one rectangle"] += 1
        widest = max(max(rect.size) for rect in rects)
        multiple = rule.channel_multiple if widest >= rule.multiple_from else 1
        forms["padded channels"] += bool(module.bias.numel() % multiple)
        return GraphKernels(rects, module.bias, multiple).eval(), False

    return replace_modules(deep_copy(network), replace), {form: count for form, count in forms.items() if count}


def prefers_dense(rects: Sequence[Rect], dense: Rect, rule: KernelRule) -> bool:
    """Return whether the rule prefers one dense kernel to several rectangles."""
    taps = sum(rect.size[0] * rect.size[1] for rect in rects)
    return dense.size[0] * dense.size[1] <= rule.dense_up_to * taps


@torch.no_grad()
def dense_rect(rects: Sequence[Rect]) -> Rect:
    """Return the smallest rectangle that covers several ones, with their sum as its kernel."""
    up, down, left, right = (max(sides) for sides in zip(*(rect.reach for rect in rects)))
    like = rects[0].kernel
    frame = Rect(like.new_zeros(like.shape[0], 1, up + 1 + down, left + 1 + right), (up, left))
    return Rect(torch.stack([rect.taps_within(frame) for rect in rects]).sum(0), frame.anchor)
