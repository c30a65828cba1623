"""Masks and folding: where a folded kernel may be nonzero, given the masks of the branches that it merges."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from widekernel.errors import ArgumentError, nearest
from widekernel.layers import FoldedLargeKernel, LargeKernel, Rect, Rectangles, maximal_rectangles
from widekernel.layers.sources import rects_of


def merged_support(layer: LargeKernel, masks: Mapping[str, Tensor], prefix: str = "") -> list[Rect]:
    """Return the union of the masks of all branches, in the rectangles that the layer folds to.

    Tiles are placed by their tables and rectangles by their anchors; a branch that another one covers is merged into it.
    Weights without a mask are live. The identity of the layer, which adds the tap on the output pixel to every channel, is
    not a branch and not part of the union.

    Args:
        layer: in its training form.
        masks: parameter name -> bool tensor of the shape of the parameter, True where the weight is live.
        prefix: prefix of the names of the layer's parameters, such as `"stages.0.blocks.0.mixer."`; masks without it belong
            to other layers.

    Returns:
        rectangles whose kernels are bool (C, 1, kh, kw), in the order of `layer.folded().rects()`.

    Raises:
        ArgumentError: a mask does not match a parameter in name, shape or type, or the layer cannot be folded.
    """
    own = _own_masks(layer, masks, prefix)
    source = copy.deepcopy(layer.source)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            mask = own.get(f"source.{name}")
            # A sum of nonnegative numbers is zero only if all of them are; gates are positive whatever their parameters.
            parameter.data = torch.ones_like(parameter) if mask is None else mask.to(parameter.device, parameter.dtype)
        rects = rects_of(source)
    if rects is None:
        raise ArgumentError(
            f"the layer {prefix.rstrip('.') or type(layer.source).__name__} has no merged kernel: near the borders "
            "no single kernel is equivalent to it; its masks apply only in its training form"
        )
    return [Rect(rect.kernel.detach() > 0, rect.anchor) for rect in maximal_rectangles(rects)]


def taps_outside(
    layer: LargeKernel, masks: Mapping[str, Tensor], prefix: str = "", folded: FoldedLargeKernel | None = None
) -> list[Rect]:
    """Return the taps that are nonzero in the folded layer although no branch has a live weight there.

    The tap of the identity is excluded, because it is in the kernel whatever the masks are.

    Args:
        layer: in its training form.
        masks: as for `merged_support`.
        prefix: as for `merged_support`.
        folded: its folded form, by default `layer.folded()`.

    Returns:
        rectangles whose kernels are bool (C, 1, kh, kw), True at such taps; all False if masks and folding agree.

    Raises:
        ArgumentError: as `merged_support`, or if the rectangles of `folded` are not those that the layer folds to.
    """
    support = merged_support(layer, masks, prefix)
    rects = (layer.folded() if folded is None else folded).rects()
    if [(r.kernel.shape, r.anchor) for r in rects] != [(s.kernel.shape, s.anchor) for s in support]:
        raise ArgumentError(
            f"the folded layer has rectangles {[r.size for r in rects]} but {prefix.rstrip('.') or 'the layer'} folds to "
            f"{[s.size for s in support]}: give the layer from which it was folded"
        )
    outside = [Rect((rect.kernel.detach() != 0) & ~allowed.kernel, rect.anchor) for rect, allowed in zip(rects, support)]
    if layer.identity:
        # The first rectangle absorbs it, because all rectangles cover the tap on the output pixel.
        row, column = outside[0].anchor
        outside[0].kernel[:, :, row, column] = False
    return outside


def check_merged_support(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Raise unless every large kernel of a network is zero, once folded, wherever all its branches are masked.

    Layers that cannot be folded are skipped.

    Args:
        model: a network in its training form, or a single `LargeKernel`.
        masks: parameter name (in `model`) -> bool tensor.

    Raises:
        ArgumentError: a mask belongs to no parameter, or taps lie outside the union; the message names the layer, the number
            of taps, and the first of them (channel; row and column from the output pixel). Also as `merged_support`.
    """
    known = {name for name, _ in model.named_parameters()}
    if unknown := [name for name in masks if name not in known]:
        raise ArgumentError(f"there is a mask for {unknown[0]}, but no such parameter: give masks by the network's names")
    for name, module in model.named_modules():
        if not isinstance(module, LargeKernel) or not module.foldable():
            continue
        prefix = f"{name}." if name else ""
        for rect in taps_outside(module, masks, prefix):
            places = rect.kernel[:, 0].nonzero()
            if len(places):
                channel, row, column = places[0].tolist()
                place = f"({row - rect.anchor[0]:+d}, {column - rect.anchor[1]:+d})"
                raise ArgumentError(
                    f"{name or 'the layer'}: {len(places)} taps of the folded {rect.size[0]}x{rect.size[1]} kernel are not "
                    f"zero where every branch is masked, the first in channel {channel} at {place} from the output pixel: "
                    "multiply the weights with their masks before folding"
                )


def shared_mask(layer: LargeKernel, masks: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return masks under which all branches of a layer are live at the same taps: the union of the given masks.

    The merged kernel then has as many live taps as before, and every branch is live at all of them that it has: a dilated
    branch has none in its gaps. The additional weights cost nothing once folded.

    Args:
        layer: a layer whose source is `Rectangles`; with tiles that are shared and moved, a tap depends on several weights.
        masks: as for `merged_support`.
        prefix: as for `merged_support`.

    Returns:
        parameter name (with the prefix) -> bool tensor, for every branch.

    Raises:
        ArgumentError: the layer has another source. Also as `merged_support`.
    """
    if not isinstance(layer.source, Rectangles):
        raise ArgumentError(
            f"{prefix.rstrip('.') or 'the layer'} has a {type(layer.source).__name__} source: a mask shared by all branches "
            "needs branches with a separate weight at every tap (Rectangles)"
        )
    own = _own_masks(layer, masks, prefix)
    kernels, steps = layer.source.kernels, layer.source.dilations
    names = [f"source.kernels.{i}" for i in range(len(kernels))]
    masks_of = [own.get(name, torch.ones_like(kernel, dtype=torch.bool)) for name, kernel in zip(names, kernels)]
    live = [Rect.centered(mask, step).dense() for mask, step in zip(masks_of, steps)]
    return {f"{prefix}{name}": _union_within(rect, live, step) for name, rect, step in zip(names, live, steps)}


def _union_within(window: Rect, live: Sequence[Rect], step: int) -> Tensor:
    """Return the union of bool rectangles at the taps of one of them, which are `step` apart."""
    total = torch.zeros_like(window.kernel)
    for rect in live:
        total |= rect.taps_within(window).to(total.device)
    return total[:, :, ::step, ::step].clone()


def _own_masks(layer: LargeKernel, masks: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Check the masks of a layer, and return them by its own parameter names."""
    parameters = dict(layer.named_parameters())
    own = {name[len(prefix) :]: mask for name, mask in masks.items() if name.startswith(prefix)}
    for name, mask in own.items():
        if name not in parameters:
            raise ArgumentError(
                f"there is a mask for {prefix}{name}, but the layer has no such parameter.{nearest(name, parameters)}"
            )
        if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            raise ArgumentError(
                f"the mask of {prefix}{name} is {mask.dtype} {tuple(mask.shape)}: it must be torch.bool of the shape of the "
                f"parameter, {tuple(parameters[name].shape)}"
            )
    return own
