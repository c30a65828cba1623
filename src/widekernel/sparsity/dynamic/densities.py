"""Number of weights that each layer keeps: densities by shape or by score, and whole numbers that add up exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from widekernel.errors import ArgumentError


def uniform_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Return the same density for every layer."""
    return dict.fromkeys(shapes, density)


def erk_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Return densities proportional to sum(shape) / prod(shape) of each layer (Erdős–Rényi kernel; Evci et al., 2020).

    Layers that would keep more than all of their weights become dense, and the others share the rest.

    Args:
        shapes: shapes of the weights, by name.
        density: density of all layers together, above 0 and at most 1.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        # The density of the layers that are not dense, per unit of their raw density.
        left = sum(size * density if name not in dense else -size * (1 - density) for name, size in sizes.items())
        scale = left / sum(raw[name] * sizes[name] for name in shapes if name not in dense)
        largest = max(raw[name] for name in shapes if name not in dense)
        if largest * scale <= 1:
            return {name: 1.0 if name in dense else raw[name] * scale for name in shapes}
        # All layers with exactly this raw density at once, as in the published code.
        dense |= {name for name in shapes if raw[name] == largest}
    return dict.fromkeys(shapes, 1.0)


def densities_above_threshold(scores: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """Return each layer's share of scores strictly above the int(total · density)-th largest of all, as SLaK does.

    The comparison is strict, so one weight fewer is kept than the density implies.
    """
    flat = torch.cat([values.reshape(-1) for values in scores.values()])
    kept = int(flat.numel() * density)
    if kept == 0:
        return dict.fromkeys(scores, 0.0)
    threshold = flat.kthvalue(flat.numel() - kept + 1).values
    return {name: (values > threshold).sum().item() / values.numel() for name, values in scores.items()}


def whole_counts(sizes: Mapping[str, int], densities: Mapping[str, float], least: Mapping[str, int]) -> dict[str, int]:
    """Round sizes · densities to whole numbers whose total is the rounded total, by largest remainders.

    Args:
        sizes: weights or blocks of each layer.
        densities: shares to keep, from 0 to 1.
        least: smallest number that each layer keeps, whatever its density.
    """
    wanted = {name: sizes[name] * densities[name] for name in sizes}
    # Because of rounding, a product may be slightly below the whole number that it stands for.
    counts = {name: min(sizes[name], math.floor(value + 1e-9 * max(1.0, value))) for name, value in wanted.items()}
    missing = round(math.fsum(wanted.values())) - sum(counts.values())
    by_remainder = sorted(sizes, key=lambda name: wanted[name] - counts[name], reverse=True)
    for name in by_remainder:
        if missing > 0 and counts[name] < sizes[name]:
            counts[name] += 1
            missing -= 1
    return {name: max(count, least.get(name, 0)) for name, count in counts.items()}


def check_finite(scores: Mapping[str, Tensor], what: str) -> None:
    """Raise unless all scores are finite.

    Args:
        scores: scores by layer.
        what: what the error calls them.

    Raises:
        ArgumentError: a score is not finite; the message names the first such layer.
    """
    for name, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise ArgumentError(f"{what} of {name} are not all finite: give a batch whose loss and gradients are finite")
