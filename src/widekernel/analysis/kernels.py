"""Pictures of depthwise kernels: the branches of a layer as they are trained, and their folded sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from widekernel.errors import ArgumentError, nearest
from widekernel.figures import new_figure, to_png
from widekernel.layers import FoldedLargeKernel, LargeKernel
from widekernel.layers.rect import Rect
from widekernel.layers.sources import rects_of
from widekernel.layers.training_modes import training_modes_restored

FOLDED = "folded"
"""Name of the sum of all branches, with their norms, in the pictures."""


@dataclass(frozen=True)
class KernelLayer:
    """The kernels of one layer.

    Attributes:
        name: name of the layer in the network.
        parts: kernels (C, height, width) of each branch and, if the layer can be folded, of the folded layer, by a label
            such as "51×5"; all on one canvas, on which the tap of the output pixel has the same place.
    """

    name: str
    parts: dict[str, np.ndarray]

    @property
    def norms(self) -> np.ndarray:
        """Norm of each channel's kernel (C,): that of the folded one, or of all branches together."""
        chosen = [self.parts[FOLDED]] if FOLDED in self.parts else list(self.parts.values())
        return np.sqrt(sum((part.astype(np.float64) ** 2).sum((1, 2)) for part in chosen))

    def channels(self, count: int) -> list[int]:
        """Return `count` channels, evenly spaced in the order of falling norm."""
        order = np.argsort(-self.norms, kind="stable")
        places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
        return [int(order[place]) for place in places]


def kernel_layers(model: nn.Module) -> list[KernelLayer]:
    """Return the kernels of all depthwise layers of a network, ours and `nn.Conv2d`, in its order.

    Layers whose branches are no rectangles are left out.
    """
    found = []
    for name, module in _depthwise(model):
        rects = {FOLDED: module.rects()} if isinstance(module, FoldedLargeKernel) else _branches(module)
        if rects:
            found.append(KernelLayer(name, _on_one_canvas(rects)))
    return found


def _depthwise(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, (LargeKernel, FoldedLargeKernel)):
            inside.append(name)
            yield name, module
        elif isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1:
            yield name, module


def _branches(module: nn.Module) -> dict[str, list[Rect]]:
    """Return the rectangles of a layer's branches and of its folded form, by label; none if they are no rectangles."""
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        return {f"{height}×{width}": [Rect(module.weight, (height // 2, width // 2))]}
    assert isinstance(module, LargeKernel)
    rects = rects_of(module.source)
    if rects is None:
        return {}
    labels: dict[str, list[Rect]] = {}
    for rect in rects:
        label = base = rect.label
        while label in labels:
            label = f"{base} ({sum(key.startswith(base) for key in labels) + 1})"
        labels[label] = [rect]
    if not module.reasons_against_folding():
        with training_modes_restored(module):
            labels[FOLDED] = module.eval().folded().rects()
    return labels


def _on_one_canvas(rects: dict[str, list[Rect]]) -> dict[str, np.ndarray]:
    reaches = [rect.reach for some in rects.values() for rect in some]
    up, down, left, right = (max(reach[side] for reach in reaches) for side in range(4))
    like = next(iter(rects.values()))[0].kernel
    canvas = Rect(like.new_zeros(len(like), 1, up + down + 1, left + right + 1), (up, left))
    drawn: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for label, some in rects.items():
            total: Tensor = sum((rect.taps_within(canvas) for rect in some), torch.zeros_like(canvas.kernel))
            drawn[label] = total[:, 0].float().cpu().numpy()
    return drawn


def plot(layer: KernelLayer, count: int = 12) -> bytes:
    """Draw kernels of a layer: a column for each of `count` channels by falling norm, a row for each branch and their sum.

    Returns:
        a PNG file.
    """
    channels, norms = layer.channels(count), layer.norms
    figure = new_figure(0.95 * len(channels) + 0.8, 1.0 * len(layer.parts) + 0.7)
    for row, (label, part) in enumerate(layer.parts.items()):
        for column, channel in enumerate(channels):
            axes = figure.add_subplot(len(layer.parts), len(channels), row * len(channels) + column + 1)
            largest = np.abs(part[channel]).max() or 1.0
            axes.imshow(part[channel], cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if not column:
                axes.set_ylabel(label, fontsize=8)
            if not row:
                axes.set_title(f"{channel}\n{norms[channel]:.2g}", fontsize=7)
    figure.suptitle(f"{layer.name}: channel and norm of its kernel", fontsize=9)
    return to_png(figure, dpi=120)


def layer_named(layers: Sequence[KernelLayer], name: str) -> KernelLayer:
    """Return the layer called `name`.

    Raises:
        ArgumentError: there is none.
    """
    for layer in layers:
        if layer.name == name:
            return layer
    names = [layer.name for layer in layers]
    raise ArgumentError(f"the network has no depthwise layer {name!r}.{nearest(name, names)} Layers: {', '.join(names)}")
