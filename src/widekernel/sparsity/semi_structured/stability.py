"""Change of a masked network's outputs when its weights are updated under the same masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.func import functional_call

from widekernel.errors import ArgumentError
from widekernel.layers.training_modes import training_modes_restored

DECILES = 10


@dataclass(frozen=True)
class LayerStability:
    """Size of the update D of one layer's weight, an (out, in·kh·kw) matrix, under its mask M.

    For every input ||(M*D) x|| <= spectral · ||x|| <= masked · ||x|| <= full · ||x||. For a convolution, x is one patch;
    over whole images the factor is at most sqrt(taps) times as large. (The spectral norm of M*D may exceed that of D.)

    Attributes:
        name: name of the weight.
        masked: ||M*D||, Frobenius.
        spectral: ||M*D||₂, by power iteration, which approaches it from below.
        full: ||D||, Frobenius.
        relative: ||M*D|| / ||M*W||, Frobenius; 0 if both are 0.
        taps: kh·kw, 1 for a linear layer.
    """

    name: str
    masked: float
    spectral: float
    full: float
    relative: float
    taps: int


@dataclass(frozen=True)
class StabilityReport:
    """Effect of an update on a masked network.

    Attributes:
        layers: the bounds of each masked layer.
        inputs: number of inputs that the rest was measured on.
        agreement_updated: share of the inputs with the same top-1 class in the masked network before and after the update.
        agreement_dense: share of the inputs with the same top-1 class in the dense and the masked network before the update.
        flips: share of inputs whose class changes, in each tenth of the inputs ordered by the margin between the two largest
            logits of the masked network before the update, smallest margins first; NaN for an empty tenth.
        margins: the mean margin in each tenth.
    """

    layers: tuple[LayerStability, ...]
    inputs: int
    agreement_updated: float
    agreement_dense: float
    flips: tuple[float, ...]
    margins: tuple[float, ...]


@torch.no_grad()
def stability_report(
    model: nn.Module,
    updated: nn.Module | Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    inputs: Tensor | Iterable[Tensor],
) -> StabilityReport:
    """Compare a masked network before and after an update of its weights, under the same masks.

    Networks run in evaluation mode and are left unchanged.

    Args:
        model: the dense network before the update, with plain weights.
        updated: the network after it, or its state dict.
        masks: parameter name -> bool mask, such as `SemiStructured.masks`.
        inputs: a batch or several; the network maps each to (N, classes).

    Raises:
        ArgumentError: if a mask does not fit a weight, or the networks differ.
    """
    before = dict(model.state_dict())
    after = dict(updated.state_dict() if isinstance(updated, nn.Module) else updated)
    _check(before, after, masks)
    layers = tuple(_layer(name, before[name], after[name], mask) for name, mask in masks.items())
    batches = [inputs] if isinstance(inputs, Tensor) else inputs
    outputs = []
    with training_modes_restored(model):
        model.eval()
        for batch in batches:
            states = [before, _masked(before, masks), _masked(after, masks)]
            outputs.append(torch.stack([functional_call(model, state, (batch,)).float() for state in states]))
    if not outputs or not sum(batch.shape[1] for batch in outputs):
        raise ArgumentError("inputs hold no batch: give at least one input")
    dense, masked, moved = torch.cat(outputs, 1)
    flipped = masked.argmax(1) != moved.argmax(1)
    top = masked.topk(2, 1).values if masked.shape[1] > 1 else torch.zeros(masked.shape[0], 2)
    flips, margins = _by_decile(top[:, 0] - top[:, 1], flipped)
    same = (dense.argmax(1) == masked.argmax(1)).double().mean()
    return StabilityReport(layers, masked.shape[0], 1 - float(flipped.double().mean()), float(same), flips, margins)


def spectral_norm(matrix: Tensor, iterations: int = 100, seed: int = 0) -> float:
    """Compute the largest singular value of (R, C) by power iteration in float64, from a random start drawn with `seed`."""
    matrix = matrix.detach().double()
    generator = torch.Generator("cpu").manual_seed(seed)
    v = torch.randn(matrix.shape[1], dtype=torch.float64, device="cpu", generator=generator).to(matrix.device)
    v /= v.norm()
    for _ in range(iterations):
        u = matrix.T @ (matrix @ v)
        norm = u.norm()
        if not norm > 0:
            return 0.0
        v = u / norm
    return float((matrix @ v).norm())


def _layer(name: str, before: Tensor, after: Tensor, mask: Tensor) -> LayerStability:
    update = (after.to(before.device).double() - before.double()).flatten(1)
    kept = mask.to(before.device).flatten(1)
    masked = update * kept
    size = float((before.double().flatten(1) * kept).norm())
    moved = float(masked.norm())
    relative = moved / size if size else (float("inf") if moved else 0.0)
    return LayerStability(name, moved, spectral_norm(masked), float(update.norm()), relative, prod(before.shape[2:]))


def _masked(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = dict(state)
    for name, mask in masks.items():
        result[name] = state[name].masked_fill(~mask.to(state[name].device), 0)
    return result


def _by_decile(margins: Tensor, flipped: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    order = margins.argsort(stable=True)
    parts = torch.tensor_split(order, DECILES)
    flips = tuple(float(flipped[part].double().mean()) for part in parts)
    return flips, tuple(float(margins[part].double().mean()) for part in parts)


def _check(before: Mapping[str, Tensor], after: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    different = sorted(set(before) ^ set(after))
    if different:
        raise ArgumentError(
            f"the networks differ in {', '.join(different)}: give the same network before and after its update"
        )
    for name, mask in masks.items():
        if name not in before:
            raise ArgumentError(
                f"there is a mask for {name}, but the network has no such weight: give the dense network with plain "
                "weights, as it was before prepare"
            )
        if not mask.shape == before[name].shape == after[name].shape:
            raise ArgumentError(
                f"{name}: the mask has shape {tuple(mask.shape)}, the weight {tuple(before[name].shape)} before and "
                f"{tuple(after[name].shape)} after the update: all three must be the same"
            )
