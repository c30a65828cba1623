"""Section on the depthwise kernels: all layers in a table, and pictures of some."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from widekernel.analysis.kernels import FOLDED, KernelLayer, kernel_layers
from widekernel.report.parts import Missing
from widekernel.report.subject import Subject

CENTER = 7
"""Side of the square that a small kernel would cover, in taps."""
_SHOWN_LAYERS, _SHOWN_CHANNELS = 4, 12


@dataclass(frozen=True)
class KernelRow:
    """One depthwise layer.

    Attributes:
        name: name of the layer in the network.
        channels: number of its channels.
        parts: sizes of its branches, such as ("51×5", "5×51", "5×5").
        size: (height, width) of the canvas that holds all branches.
        outside: share of the squared weights of the sum that lie outside the central 7×7 taps.
        zeros: share of the taps of the sum, within its branches, that are zero.
    """

    name: str
    channels: int
    parts: tuple[str, ...]
    size: tuple[int, int]
    outside: float
    zeros: float


@dataclass(frozen=True)
class KernelPictures:
    """Kernels of some channels of one layer.

    Attributes:
        name: name of the layer.
        channels: which channels, by falling norm.
        norms: norm of each of these channels' kernel.
        parts: kernels (channels, height, width) by branch; that of the folded layer is called "folded".
    """

    name: str
    channels: tuple[int, ...]
    norms: tuple[float, ...]
    parts: dict[str, np.ndarray]


@dataclass(frozen=True)
class Kernels:
    """The depthwise kernels of a network.

    Attributes:
        rows: all depthwise layers.
        shown: some of them, spread over the depth of the network, with pictures.
    """

    rows: tuple[KernelRow, ...]
    shown: tuple[KernelPictures, ...]


def kernels(subject: Subject) -> Kernels | Missing:
    """Collect the depthwise kernels of the network."""
    layers = kernel_layers(subject.model)
    if not layers:
        return Missing(
            "The network has no depthwise layers whose kernels are rectangles.",
            "Report on a network with such layers; `widekernel models` lists ours.",
        )
    large = [layer for layer in layers if max(_shape(layer)) > CENTER] or layers
    count = min(_SHOWN_LAYERS, len(large))
    places = np.linspace(0, len(large) - 1, count).round().astype(int)
    return Kernels(tuple(map(_row, layers)), tuple(_pictures(large[place]) for place in places))


def _shape(layer: KernelLayer) -> tuple[int, int]:
    height, width = next(iter(layer.parts.values())).shape[1:]
    return int(height), int(width)


def _total(layer: KernelLayer) -> np.ndarray:
    """Return the folded kernels (C, height, width), or the sum of the branches without their norms."""
    parts = layer.parts
    found = parts[FOLDED] if FOLDED in parts else np.sum(list(parts.values()), axis=0)
    return found.astype(np.float64)


def _row(layer: KernelLayer) -> KernelRow:
    total = _total(layer)
    height, width = _shape(layer)
    energy = total**2
    rows, columns = (slice(max(0, side // 2 - CENTER // 2), side // 2 + CENTER // 2 + 1) for side in (height, width))
    outside = 1 - energy[:, rows, columns].sum() / max(energy.sum(), 1e-30)
    branches = tuple(label for label in layer.parts if label != FOLDED)
    reached = np.any([np.any(part != 0, axis=0) for part in layer.parts.values()], axis=0)
    zeros = float((total[:, reached] == 0).mean()) if reached.any() else 1.0
    return KernelRow(layer.name, len(total), branches, (height, width), float(outside), zeros)


def _pictures(layer: KernelLayer) -> KernelPictures:
    channels, norms = layer.channels(_SHOWN_CHANNELS), layer.norms
    parts = {label: part[channels] for label, part in layer.parts.items()}
    return KernelPictures(layer.name, tuple(channels), tuple(float(norms[channel]) for channel in channels), parts)


def strip(kernels_of_part: np.ndarray) -> np.ndarray:
    """Lay kernels (n, height, width) side by side, each relative to its largest tap, with a gap of NaN between them."""
    count, height, width = kernels_of_part.shape
    gap = max(1, width // 12)
    sheet = np.full((height, count * (width + gap) - gap), np.nan)
    for number, kernel in enumerate(kernels_of_part):
        sheet[:, number * (width + gap) : number * (width + gap) + width] = kernel / (np.abs(kernel).max() or 1.0)
    return sheet
