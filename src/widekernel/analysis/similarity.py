"""Similarity of what two networks compute: centered kernel alignment (CKA) between their stages.

Kornblith et al., Similarity of Neural Network Representations Revisited, 2019; the estimator that adds up over batches is
that of Nguyen, Raghu and Kornblith, Do Wide and Deep Networks Learn the Same Things?, 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from widekernel.analysis.features import device_of
from widekernel.errors import ArgumentError
from widekernel.figures import new_figure, to_png
from widekernel.layers.training_modes import training_modes_restored
from widekernel.models.base import StagedConvNet

FEWEST_IMAGES = 4
"""Smallest batch for which the estimator is defined."""


@dataclass(frozen=True)
class Similarity:
    """CKA between the stages of two networks.

    Attributes:
        matrix: values (rows, columns), 1 for equal representations up to rotation and scale, about 0 for unrelated ones.
        rows: names of the first network's stages.
        columns: names of the second network's stages.
        images: number of images.
    """

    matrix: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    images: int


def stage_maps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the feature map (N, C, H, W) of every stage of one of our networks, or of a network of timm.

    Raises:
        ArgumentError: the network does not tell its stages.
    """
    if isinstance(model, StagedConvNet):
        maps: dict[str, Tensor] = {}
        x = model.stem(model.input_check(images))
        for number, stage in enumerate(model.stages):
            maps[f"stages.{number}"] = x = stage(x)
        return maps
    if not hasattr(model, "forward_intermediates"):
        raise ArgumentError(f"{type(model).__name__} does not tell its stages: compare networks of widekernel or timm")
    network: Any = model
    found = network.forward_intermediates(images, norm=False, intermediates_only=True)
    described = list(getattr(network, "feature_info", None) or [])
    names = [str(info["module"]) if isinstance(info, dict) else "" for info in described]
    if len(set(names)) != len(found):
        names = [f"map {number}" for number in range(len(found))]
    return dict(zip(names, found))


def cka(
    first: nn.Module,
    second: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    advance: Callable[[int], None] = lambda images: None,
) -> Similarity:
    """Return linear CKA between all stages of two networks, on the same images.

    Args:
        first: network with stages; its modes are as before afterwards.
        second: another one, which may have another input size.
        batches: the same images (N, C, H, W) as the first and as the second network take them; at least 4 in a batch.
        advance: told the number of images of each batch after it.

    Raises:
        ArgumentError: there are no images, a batch is too small or its parts differ, or a network does not tell its stages.
    """
    sums: list[Tensor] = []
    names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    count = 0
    with training_modes_restored(first), training_modes_restored(second), torch.inference_mode():
        first.eval()
        second.eval()
        for ours, theirs in batches:
            if len(ours) != len(theirs) or len(ours) < FEWEST_IMAGES:
                raise ArgumentError(
                    f"a batch has {len(ours)} and {len(theirs)} images, but both must have the same number, "
                    f"{FEWEST_IMAGES} or more"
                )
            grams = [_grams(first, ours), _grams(second, theirs)]
            names = tuple(grams[0]), tuple(grams[1])
            flat = [list(gram.values()) for gram in grams]
            found = [_hsic(flat[0], flat[1]), _self_hsic(flat[0]), _self_hsic(flat[1])]
            sums = found if not sums else [total + part for total, part in zip(sums, found)]
            count += len(ours)
            advance(len(ours))
    if not sums:
        raise ArgumentError("there are no images: give at least one batch")
    scale = (sums[1][:, None] * sums[2][None, :]).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return Similarity((sums[0] / scale).cpu().numpy(), names[0], names[1], count)


def _grams(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the inner products (N, N) of the images' maps, with a zero diagonal, by stage, in float64 on the CPU."""
    grams = {}
    for name, features in stage_maps(model, images.to(device_of(model))).items():
        flat = features.flatten(1).double()
        gram = flat @ flat.T
        grams[name] = gram.fill_diagonal_(0).cpu()
    return grams


def _hsic(rows: list[Tensor], columns: list[Tensor]) -> Tensor:
    return torch.stack([torch.stack([_unbiased(a, b) for b in columns]) for a in rows])


def _self_hsic(grams: list[Tensor]) -> Tensor:
    return torch.stack([_unbiased(gram, gram) for gram in grams])


def _unbiased(a: Tensor, b: Tensor) -> Tensor:
    """Return the unbiased estimate of HSIC (Song et al., 2012) from two Gram matrices with zero diagonals."""
    n = len(a)
    cross = (a * b).sum()
    totals = a.sum() * b.sum() / ((n - 1) * (n - 2))
    rows = 2 * (a.sum(0) @ b.sum(1)) / (n - 2)
    return (cross + totals - rows) / (n * (n - 3))


def plot(similarity: Similarity, first: str, second: str) -> bytes:
    """Draw the matrix, with its values, as a PNG file; `first` and `second` name the networks."""
    rows, columns = similarity.matrix.shape
    figure = new_figure(1.6 + 0.75 * columns, 1.2 + 0.6 * rows)
    axes = figure.add_subplot()
    shown = axes.imshow(similarity.matrix, cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks(range(columns), similarity.columns, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(rows), similarity.rows, fontsize=8)
    axes.set_xlabel(second)
    axes.set_ylabel(first)
    for row in range(rows):
        for column in range(columns):
            value = similarity.matrix[row, column]
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black", fontsize=8
            )
    figure.colorbar(shown, label="CKA")
    return to_png(figure, dpi=120)
