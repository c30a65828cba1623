"""Compacting one layer of depthwise kernels in a folded network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from widekernel.layers import DepthwiseConv2d, FoldedLargeKernel, FoldedPartialChannels, Rect, maximal_rectangles
from widekernel.layers.alterations import alteration
from widekernel.layers.conv import output_tap
from widekernel.layers.folding import is_trained
from widekernel.layers.grouped import ChannelGroup, GroupedKernels
from widekernel.transforms.compaction.boxes import cut, gathered
from widekernel.transforms.compaction.cost import CostModel, Image
from widekernel.transforms.compaction.plan import Plan, make_plan
from widekernel.transforms.compaction.report import LayerReport


def can_compact(module: nn.Module) -> bool:
    """Return whether the module is a folded layer of depthwise kernels without hooks."""
    if alteration(module):
        return False
    if isinstance(module, FoldedPartialChannels):
        return isinstance(module.layer, FoldedLargeKernel) and not alteration(module.layer)
    if isinstance(module, DepthwiseConv2d):
        plain = type(module).forward is DepthwiseConv2d.forward and not hasattr(module, "parametrizations")
        return plain and not module.reasons_against()
    return isinstance(module, FoldedLargeKernel)


@torch.no_grad()
def compacted_kernels(module: nn.Module, name: str, cost: CostModel, image: Image) -> tuple[nn.Module, LayerReport]:
    """Return the cheapest layer with the same outputs as `module` (`module` itself if nothing is saved), and the report."""
    rects, bias = _parts(module)
    before = sum(rect.kernel.numel() for rect in rects)
    nonzero = sum(int(rect.kernel.count_nonzero()) for rect in rects)
    moved = gathered(rects)
    partial = isinstance(module, FoldedPartialChannels)
    plan = make_plan(moved, cost, image, moved_anyway=partial)
    result = _plain(module, rects, moved, plan, bias) if plan.whole else _grouped(module, moved, plan, bias)
    if result is not module:
        result.requires_grad_(is_trained(module))
    kernels = [k for m in result.modules() if isinstance(m, FoldedLargeKernel) for k in m.kernels]
    realized = before if result is module else sum(kernel.numel() for kernel in kernels)
    kept = bias.numel() if plan.whole else sum(len(group) for group in plan.groups)
    reason = _reason(plan, bias.numel(), before, nonzero, realized)
    return result, LayerReport(name, type(module).__name__, bias.numel(), kept, before, nonzero, realized, reason)


def _parts(module: nn.Module) -> tuple[list[Rect], Tensor]:
    """Return the rectangles and the bias (C,) of a layer for which `can_compact` is true."""
    if isinstance(module, FoldedPartialChannels):
        module = module.layer
    if isinstance(module, FoldedLargeKernel):
        return module.rects(), module.bias
    assert isinstance(module, DepthwiseConv2d)
    bias = module.weight.new_zeros(module.out_channels) if module.bias is None else module.bias
    return [Rect(module.weight, output_tap(module))], bias


def _plain(module: nn.Module, rects: Sequence[Rect], moved: Sequence[Rect], plan: Plan, bias: Tensor) -> nn.Module:
    """Return the layer with all its channels, but without dead rectangles and dead outer rows and columns."""
    trimmed = _trimmed(moved, plan.groups[0], plan.boxes[0], bias)
    taps = sum(rect.kernel.shape[2] * rect.kernel.shape[3] for rect in trimmed)
    if taps >= sum(rect.kernel.shape[2] * rect.kernel.shape[3] for rect in rects):
        return module
    layer = FoldedLargeKernel(trimmed, bias)
    if not isinstance(module, FoldedPartialChannels):
        return layer
    scale, shift = module.scale.detach().flatten(), module.shift.detach().flatten()
    return FoldedPartialChannels(layer, module.selected, module.ghosts, scale, shift)


def _grouped(module: nn.Module, moved: Sequence[Rect], plan: Plan, bias: Tensor) -> nn.Module:
    """Return the layer that convolves only the channels of the plan."""
    # A channel outside the groups has at most one live tap, the one on the output pixel.
    scale = torch.zeros_like(bias)
    for rect in moved:
        scale = scale + rect.kernel[:, 0, rect.anchor[0], rect.anchor[1]].to(scale)
    shift, source = bias.detach(), list(range(bias.numel()))
    if isinstance(module, FoldedPartialChannels):
        source = module.selected.tolist() + module.ghosts.tolist()
        scale = torch.cat([scale, module.scale.detach().flatten()])
        shift = torch.cat([shift, module.shift.detach().flatten()])
    groups = [
        ChannelGroup(
            _trimmed(moved, channels, boxes, bias),
            bias.detach()[torch.from_numpy(channels)],
            [source[channel] for channel in channels.tolist()],
            channels.tolist(),
        )
        for channels, boxes in zip(plan.groups, plan.boxes)
    ]
    in_order = source == list(range(len(source)))
    return GroupedKernels(groups, scale, shift, None if in_order else source)


def _trimmed(rects: Sequence[Rect], channels: np.ndarray, boxes: np.ndarray, like: Tensor) -> list[Rect]:
    """Crop the rectangles of some channels to their live boxes, and absorb rectangles that another one covers."""
    index = torch.from_numpy(channels).to(like.device)
    parts = [cut(rect, index, box) for rect, box in zip(rects, boxes.tolist()) if box[0] >= 0]
    if not parts:
        parts = [Rect(rects[0].kernel.new_zeros(len(channels), 1, 1, 1), (0, 0))]
    return [rect.with_kernel(rect.kernel.to(like.dtype)) for rect in maximal_rectangles(parts)]


def _reason(plan: Plan, channels: int, before: int, nonzero: int, realized: int) -> str:
    """Return why some zeros are still computed; "" if none are."""
    if realized <= nonzero:
        return ""
    if nonzero == before:
        return "no zeros"
    dead = channels - len(plan.convolved)
    if plan.whole and dead:
        return f"computing {dead} dead channels costs less than gathering the others"
    share = 100 * (1 - nonzero / realized)
    return f"{share:.0f} % zeros among the weights that are computed: they lie between live taps or live channels"
