"""Section on masks: the density of each layer, how the masks have moved, and pictures of some."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from widekernel.engine.curves import COLORS
from widekernel.engine.run_folder import RunFolder
from widekernel.errors import DataError
from widekernel.figures import new_figure
from widekernel.report.parts import Missing
from widekernel.report.pictures import Drawing, Picture, drawing, signed
from widekernel.report.subject import Subject
from widekernel.sparsity import load_masks
from widekernel.sparsity.selection import Selection
from widekernel.sparsity.snapshot import LayerSparsity, SparsitySnapshot, TopologyUpdate, take_snapshot

FEWEST = 0.01
"""Share of zeros from which a network without masks counts as sparse."""


@dataclass(frozen=True)
class Masks:
    """The sparsity of a network.

    Attributes:
        method: how the masks were found, as the settings of the run say; "" if unknown.
        from_masks: whether the figures are those of the run's masks, and not of zeros among the weights.
        sparsity: share of zeros among the weights of the masked parameters.
        layers: the masked parameters.
        dense: number of parameters without a mask, and of their weights, by the reason.
        churn: the topology updates, the oldest first.
        images: magnitudes of some masked weights by parameter name, 2-D; masked ones are NaN, lines between kernels -1.
    """

    method: str
    from_masks: bool
    sparsity: float
    layers: tuple[LayerSparsity, ...]
    dense: dict[str, tuple[int, int]]
    churn: tuple[TopologyUpdate, ...]
    images: dict[str, Tensor]


def masks(subject: Subject) -> Masks | Missing:
    """Collect the masks of the run, or the zeros of the weights.

    Raises:
        DataError: the sparsity report of the run is damaged.
        CheckpointError: the masks of the run are damaged.
    """
    run = subject.run
    if run is not None and run.sparsity.is_file():
        return _of_run(subject, run)
    snapshot = _of_zeros(subject.model)
    if snapshot is None:
        return Missing(
            "No layer has a noteworthy number of zero weights: the network is dense.",
            "Train with masks (`widekernel train --sparsity.method dynamic`), or make a network sparse "
            "(`widekernel sparsify`).",
        )
    return _summary(snapshot, "", from_masks=False)


def movements(found: Masks) -> Drawing | None:
    """Draw how many weights each topology update moved; None if the masks have not moved."""
    if not found.churn:
        return None
    figure = new_figure(5.4, 3.2)
    axes = figure.add_subplot()
    shares = [100 * update.grown / max(1, update.active) for update in found.churn]
    axes.plot([update.step for update in found.churn], shares, color=COLORS[1], marker=".")
    axes.set(xlabel="optimizer step", ylabel="% of the live weights", title="Weights moved per update", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    text = (
        f"Line chart of the weights moved by {len(shares)} updates: {shares[0]:.1f} % at first, {shares[-1]:.1f} % at last."
    )
    return drawing(figure, "moves", text)


def picture(name: str, image: Tensor) -> Picture:
    """Return live weights in blue, by their magnitude, and masked ones in pale orange."""
    values = image.numpy()
    absent = np.isnan(values)
    live = np.where(absent | (values < 0), np.nan, values)  # lines between kernels are negative
    masked = f"{100 * absent.sum() / max(1, (values >= 0).sum() + absent.sum()):.0f} % of those shown are masked"
    return signed(-live / (np.nan_to_num(live).max() or 1.0), f"Weights of {name} by magnitude; {masked}.", absent)


def _of_run(subject: Subject, run: RunFolder) -> Masks:
    try:
        stored = json.loads(run.sparsity.read_text())
        layers = tuple(_layer(each) for each in stored["layers"])
        churn = tuple(TopologyUpdate(**each) for each in stored["churn"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{run.sparsity} is damaged ({error!r}). Remove it to report on the zero weights instead."
        ) from error
    found: dict[str, Tensor] = {}
    named = dict(subject.model.named_parameters())
    if run.masks.is_file():
        loaded = load_masks(run.masks)
        found = {name: mask for name, mask in loaded.items() if name in named and named[name].shape == mask.shape}
    images = take_snapshot(subject.model, [], found).images
    settings = subject.config.get("sparsity") or {}
    return _summary(SparsitySnapshot(layers, churn, images), _method(settings), from_masks=True)


def _layer(stored: dict[str, Any]) -> LayerSparsity:
    target = stored["target_density"]
    return LayerSparsity(
        name=str(stored["name"]),
        shape=tuple(int(side) for side in stored["shape"]),
        active=int(stored["active"]),
        target=None if target is None else float(target),
        grown=int(stored["moved"]),
        reason="" if stored["masked"] else str(stored["reason"]),
    )


def _method(settings: dict[str, Any]) -> str:
    """Describe how the masks were found, such as "dynamic: sparsity 0.4, init snip"."""
    method = settings.get("method")
    if not isinstance(method, str):
        return ""
    chosen = settings.get(method)
    keys = ("sparsity", "init", "prune", "growth", "method", "axis", "pattern")
    details = [f"{key} {chosen[key]}" for key in keys if key in chosen] if isinstance(chosen, dict) else []
    return f"{method}: {', '.join(details)}" if details else method


@torch.no_grad()
def _of_zeros(model: nn.Module) -> SparsitySnapshot | None:
    """Return the zeros of all weights with two or more dimensions; None if there are hardly any."""
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}
    found = {name: weight != 0 for name, weight in weights.items()}
    sparse = {name: mask for name, mask in found.items() if 1 - float(mask.float().mean()) >= FEWEST}
    if not sparse:
        return None
    choices = [
        Selection(name, tuple(parameter.shape), "" if name in sparse else "no zeros" if name in weights else "vectors")
        for name, parameter in model.named_parameters()
    ]
    return take_snapshot(model, choices, sparse)


def _summary(snapshot: SparsitySnapshot, method: str, from_masks: bool) -> Masks:
    masked = tuple(layer for layer in snapshot.layers if not layer.reason)
    dense: dict[str, tuple[int, int]] = {}
    for layer in snapshot.layers:
        if layer.reason:
            count, size = dense.get(layer.reason, (0, 0))
            dense[layer.reason] = count + 1, size + layer.size
    zeros = 1 - sum(layer.active for layer in masked) / max(1, sum(layer.size for layer in masked))
    return Masks(method, from_masks, zeros, masked, dense, snapshot.churn, snapshot.images)
