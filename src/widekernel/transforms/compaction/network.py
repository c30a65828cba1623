"""Compacting a whole network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from widekernel.errors import ArgumentError, ShapeError
from widekernel.layers import DepthwiseConv2d, FoldedLargeKernel, LargeKernel
from widekernel.layers.alterations import alteration
from widekernel.layers.dry_run import run_without_data
from widekernel.layers.folding import is_trained
from widekernel.layers.grouped import GroupedKernels
from widekernel.layers.notes import forget
from widekernel.layers.replacing import replace_modules
from widekernel.transforms.compaction.cost import CostModel, Image
from widekernel.transforms.compaction.kernels import can_compact, compacted_kernels
from widekernel.transforms.compaction.report import CompactReport, LayerReport
from widekernel.transforms.compaction.units import compacted_units
from widekernel.transforms.fold import fold

ModelT = TypeVar("ModelT", bound=nn.Module)


def compact(model: ModelT, cost: CostModel | None = None, input_size: Sequence[int] | None = None) -> ModelT:
    """Return a copy of a masked network without its dead parts, with equal outputs; the original is left as it is.

    Weights that are exactly zero are dead, unless a hook or a replaced `forward` could change their effect; masks need not
    be given. The network is folded first (one that is folded already is fine). Then rectangles of zeros are removed, strips
    lose rows and columns of zeros at their ends, and channels whose kernel is zero are not convolved. The other channels are
    convolved in a few groups of similar extents where this pays off according to `cost`. Hidden units of MLPs, and of blocks
    that are `Compactable`, are removed if they are constant or not read. Outputs are those of the masked network in
    evaluation up to rounding. The order of channels stays, also behind `PartialChannels`.

    Nothing is saved by zeros between live taps, nor by unstructured zeros of ordinary convolutions and linear layers, which
    are computed in full. `compact_report` says so layer by layer.

    The result is in evaluation mode whatever the mode of `model`. It can be moved, copied, compiled, exported and pickled,
    and its state dict loads into a network that was compacted from the same weights. It is for inference: it cannot be
    trained further in any useful way, has no official checkpoint layout, and its files are not recognized by the name of the
    network (save the masked network, and compact again after loading). It no longer counts as 2:4.

    Args:
        model: any module.
        cost: prices of convolving and of moving channels, by default those measured on a CPU.
        input_size: (N, C, H, W) of future batches, for which the prices are computed: on few pixels, convolving dead
            channels can be faster than gathering the others. By default every layer is assumed to see four 28x28 maps.
            Outputs do not depend on it.

    Raises:
        ShapeError: if the network cannot take such a batch.
        ArgumentError: if `model` is not a module, or has no weights yet (meta device).
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"compact was given a {type(model).__name__}: it takes a network (torch.nn.Module)")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ArgumentError("compact was given a network on the meta device: zeros can be told from weights only; load some")
    earlier = getattr(model, "compaction", None)
    folded = fold(model)
    compaction = _Compaction(cost or CostModel(), _images_seen(folded, input_size))
    result = replace_modules(folded, compaction.replace).eval()
    if not is_trained(model):
        result.requires_grad_(False)
    # Removing hidden units moves the others, so that groups of four hold other weights than before.
    forget(result)
    result.compaction = _report(earlier, compaction.rows)  # type: ignore[assignment]
    return result  # type: ignore[return-value]


def compact_report(
    model: nn.Module, cost: CostModel | None = None, input_size: Sequence[int] | None = None
) -> CompactReport:
    """Return what was removed from a compacted network, or what `compact` would remove from another one, with reasons.

    Raises:
        ArgumentError: as `compact`.
    """
    made = getattr(model, "compaction", None)
    return made if isinstance(made, CompactReport) else compact(model, cost, input_size).compaction  # type: ignore[return-value]


def _report(earlier: object, rows: list[LayerReport]) -> CompactReport:
    """Join the report of this compaction to that of an earlier one of the same network."""
    if not isinstance(earlier, CompactReport):
        return CompactReport(tuple(rows))
    now = {row.name: row for row in rows if row.realized < row.dense}
    before = [now.pop(row.name, row) for row in earlier.layers]
    return CompactReport((*before, *now.values()))


class _Compaction:
    """One pass over a folded network.

    Attributes:
        cost: prices.
        images: the input of each layer, by module, where it is known.
        rows: reports of the layers so far.
    """

    def __init__(self, cost: CostModel, images: dict[nn.Module, Image]) -> None:
        self.cost, self.images = cost, images
        self.rows: list[LayerReport] = []

    def replace(self, module: nn.Module, name: str) -> tuple[nn.Module, bool]:
        """Compact `module` if it is a layer or block; return the result and whether to look at what that holds."""
        if isinstance(module, GroupedKernels):
            return module, False
        if can_compact(module):
            result, row = compacted_kernels(module, name, self.cost, self.images.get(module, Image()))
            self.rows.append(row)
            return result.train(module.training), False
        fewer = compacted_units(module, name)
        if fewer is not None:
            self.rows.append(fewer[1])
            return fewer[0], False
        reason = _reason_against(module)
        if reason is not None:
            self.rows.append(_untouched(module, name, reason))
        return module, not isinstance(module, LargeKernel)


def _images_seen(model: nn.Module, input_size: Sequence[int] | None) -> dict[nn.Module, Image]:
    """Return the input of each layer of depthwise kernels for a batch (N, C, H, W), without computing anything."""
    if input_size is None:
        return {}
    if len(input_size) != 4 or min(input_size) < 1:
        raise ShapeError(f"input_size {tuple(input_size)} must be four positive numbers: batch, channels, height, width")
    seen: dict[nn.Module, Image] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        batch, _, height, width = args[0].shape
        seen[module] = Image(batch * height * width, (height, width))

    hooks = [module.register_forward_pre_hook(note) for module in model.modules() if can_compact(module)]
    try:
        run_without_data(model, input_size)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _reason_against(module: nn.Module) -> str | None:
    """Return why a layer that holds zeros, or a large kernel, stays as it is; None for any other module."""
    if isinstance(module, LargeKernel):
        return "not folded: " + "; ".join(module.reasons_against_folding())
    if isinstance(module, FoldedLargeKernel):
        return alteration(module)
    if isinstance(module, (nn.Conv2d, nn.Linear)) and bool((module.weight == 0).any()):
        if isinstance(module, DepthwiseConv2d) and module.reasons_against():
            return "; ".join(module.reasons_against())
        if isinstance(module, DepthwiseConv2d) and alteration(module):
            return alteration(module)
        return "zeros of convolutions and linear layers are computed like other weights"
    return None


@torch.no_grad()
def _untouched(module: nn.Module, name: str, reason: str) -> LayerReport:
    """Report a layer that stays as it is."""
    weights: list[Any] = [weight for weight in module.parameters() if weight.dim() > 1]
    dense, nonzero = sum(w.numel() for w in weights), sum(int(w.count_nonzero()) for w in weights)
    channels: int = module.source.channels if isinstance(module, LargeKernel) else len(weights[0])
    return LayerReport(name, type(module).__name__, channels, channels, dense, nonzero, dense, reason)
