"""Snapshot of a masked network: plain, frozen data for reports and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from widekernel.deprecation import renamed_attribute
from widekernel.layers.wrappers import unwrap
from widekernel.sparsity.selection import Selection

_IMAGES = 6  # largest number of weights shown
_SHEET = 60  # side of an image of several kernels, in taps
_CORNER = 96  # rows and columns shown of a matrix


@dataclass(frozen=True)
class LayerSparsity:
    """The sparsity of one parameter.

    Attributes:
        name: name of the parameter.
        shape: shape of the parameter.
        active: weights inside the mask; for a parameter without one, weights that are not zero.
        target: share of the weights to keep in the end; None without a mask.
        grown: weights that grew at the last topology update.
        reason: why the parameter is not masked; "" if it is.
    """

    name: str
    shape: tuple[int, ...]
    active: int
    target: float | None
    grown: int
    reason: str

    moved = renamed_attribute("moved", "grown")

    @property
    def size(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()

    @property
    def density(self) -> float:
        """Share of live weights."""
        return self.active / max(1, self.size)


@dataclass(frozen=True)
class TopologyUpdate:
    """Changes by one topology update, summed over all layers.

    Attributes:
        step: optimizer steps done when it happened.
        removed: weights removed.
        grown: weights grown.
        active: live weights after the update.
    """

    step: int
    removed: int
    grown: int
    active: int


@dataclass(frozen=True)
class SparsitySnapshot:
    """The masks of a network at one moment.

    Attributes:
        layers: every parameter, in the network's order.
        churn: the topology updates so far, newest last.
        images: magnitudes of some masked weights by parameter name, 2-D; masked weights are NaN, lines between kernels -1.
        pending: whether the masks are still to be drawn, from the gradients of the first step.
    """

    layers: tuple[LayerSparsity, ...]
    churn: tuple[TopologyUpdate, ...]
    images: dict[str, Tensor]
    pending: bool = False


def take_snapshot(
    model: nn.Module,
    selection: Sequence[Selection],
    masks: Mapping[str, Tensor],
    *,
    densities: Mapping[str, float] | None = None,
    grown: Mapping[str, int] | None = None,
    churn: Sequence[TopologyUpdate] = (),
    pending: bool = False,
) -> SparsitySnapshot:
    """Return a snapshot of a network.

    Args:
        model: the network, with plain weights.
        selection: which parameters are masked, and why the others are not.
        masks: parameter name -> bool tensor; without a mask, the nonzero weights of a parameter count as live.
        densities: share of the weights to keep in the end, by parameter name; by default, the share kept now.
        grown: weights that grew at the last topology update, by parameter name.
        churn: the topology updates so far.
        pending: whether the masks are still to be drawn.
    """
    parameters = dict(unwrap(model).named_parameters())
    densities, grown = densities or {}, grown or {}
    layers = []
    for each in selection:
        weight = parameters[each.name].detach()
        live = masks.get(each.name, weight != 0)
        target = densities.get(each.name, float(live.float().mean())) if each.masked else None
        layers.append(LayerSparsity(each.name, each.shape, int(live.sum()), target, grown.get(each.name, 0), each.reason))
    return SparsitySnapshot(tuple(layers), tuple(churn), _images(parameters, masks), pending)


@torch.no_grad()
def _images(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return images of a few masked weights: kernels side by side if they have a window, else the corner of a matrix."""
    masks = {name: mask for name, mask in masks.items() if not bool(mask.all())} or masks  # prefer masks with zeros
    windowed = [name for name, mask in masks.items() if mask.dim() == 4 and mask.shape[2] * mask.shape[3] > 9]
    tiles = [name for name, mask in masks.items() if mask.dim() == 4 and mask.shape[2] * mask.shape[3] == 9]
    flat = [name for name, mask in masks.items() if mask.dim() == 2 or mask.shape[2:].numel() == 1]
    names = [*_spread(windowed, 4), *_spread(tiles, 2), *_spread(flat, _IMAGES)][:_IMAGES]
    return {name: _image(parameters[name].detach().abs().float().cpu(), masks[name].cpu()) for name in names}


def _spread(names: list[str], count: int) -> list[str]:
    """Pick `count` names, evenly spread over the depth of the network."""
    if len(names) <= count:
        return names
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def _image(weight: Tensor, mask: Tensor) -> Tensor:
    values = torch.where(mask, weight, torch.nan)
    if values.dim() == 2 or values.shape[2:].numel() == 1:
        return values.flatten(1)[:_CORNER, :_CORNER]
    kernels = values.flatten(0, 1)
    height, width = kernels.shape[1:]
    # The sheet is about as wide as high, with a line between kernels.
    columns = max(1, min(round((len(kernels) * (height + 1) / (width + 1)) ** 0.5), round(_SHEET / (width + 1))))
    rows = max(1, min(len(kernels) // columns, round(_SHEET / (height + 1))))
    sheet = torch.full((rows * (height + 1) - 1, columns * (width + 1) - 1), -1.0)
    for place, kernel in enumerate(kernels[: rows * columns]):
        top, left = place // columns * (height + 1), place % columns * (width + 1)
        # Channels differ in scale, so each kernel is divided by its largest weight.
        sheet[top : top + height, left : left + width] = kernel / kernel.nan_to_num().max().clamp_min(1e-12)
    return sheet
