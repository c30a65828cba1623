"""The effective receptive field: how much each input pixel contributes to the center of the last feature map.

The score and the area ratio are those of Ding et al. (Scaling Up Your Kernels to 31×31, 2022), section 5.2 and appendix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from widekernel.analysis.features import Features, device_of, last_feature_map, without_gradients_of_weights
from widekernel.errors import ArgumentError
from widekernel.figures import new_figure, to_png
from widekernel.layers.training_modes import training_modes_restored

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
"""Shares of the contribution that the papers report."""


class Area(NamedTuple):
    """The smallest centered square with more than a given share of the contribution.

    Attributes:
        side: its side in pixels.
        ratio: its area divided by that of the matrix.
    """

    side: int
    ratio: float

    @property
    def percentage(self) -> str:
        """The ratio in percent, with three digits: areas differ by orders of magnitude."""
        return f"{100 * self.ratio:.3g} %"


@dataclass(frozen=True)
class Contribution:
    """Contribution scores of a network.

    Attributes:
        matrix: mean score of each pixel, float64 (H, W).
        images: number of images that were averaged.
        skipped: number of images left out because a score was not finite.
    """

    matrix: np.ndarray
    images: int
    skipped: int = 0


def contribution(
    model: nn.Module,
    images: Iterable[Tensor],
    layer: str | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Contribution:
    """Return the mean contribution score of every pixel to the center of the last feature map.

    The score of an image is the gradient of the sum of all positive activations at the central position with respect to
    the image; negative values become 0, and channels are added. Images are processed one after another, so memory does not
    depend on their number.

    Args:
        model: a network with feature maps; its modes and parameters are as before afterwards.
        images: preprocessed images, each (C, H, W) or (N, C, H, W), all of the same height and width.
        layer: name of the module that computes the map; by default the last one before the head and a final norm.
        advance: called after each image or batch.

    Raises:
        ArgumentError: there is no feature map, there are no images, their sizes differ, or no score is finite.
    """
    features, device = last_feature_map(model, layer), device_of(model)
    total: Tensor | None = None
    used = skipped = 0
    changed = without_gradients_of_weights(model)
    try:
        with training_modes_restored(model):
            model.eval()
            for image in images:
                for one in image if image.ndim == 4 else image[None]:
                    score = _score(features, one[None].to(device))
                    if total is not None and score.shape != total.shape:
                        raise ArgumentError(
                            f"an image has {tuple(score.shape)} pixels, but earlier ones have {tuple(total.shape)}: "
                            "resize all images to the same size"
                        )
                    if not torch.isfinite(score).all():
                        skipped += 1
                        continue
                    total = score if total is None else total + score
                    used += 1
                advance()
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)
    if total is None:
        if skipped:
            raise ArgumentError(f"the scores of all {skipped} images are infinite or NaN: check the weights of the network")
        raise ArgumentError("there are no images: give at least one")
    return Contribution((total / used).cpu().numpy(), used, skipped)


def _score(features: Features, image: Tensor) -> Tensor:
    """Return the contribution scores (H, W) of one image (1, C, H, W), in float64."""
    # A copy: code that normalizes in place must not meet a leaf.
    leaf = image.detach().clone().requires_grad_()
    output = features(leaf)
    center = output[:, :, output.shape[2] // 2, output.shape[3] // 2]
    (gradient,) = torch.autograd.grad(center.relu().sum(), leaf)
    return gradient.relu().sum((0, 1)).double()


def log_scores(matrix: np.ndarray) -> np.ndarray:
    """Return log10(score + 1), divided by its maximum: what heat maps show and areas are computed from.

    Args:
        matrix: contribution scores (H, W), 0 or more.

    Raises:
        ArgumentError: it is not a matrix of such numbers, or all are 0.
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or min(matrix.shape) < 1:
        raise ArgumentError(f"contribution scores have shape {matrix.shape}, but must be a matrix (height, width)")
    if not np.issubdtype(matrix.dtype, np.number) or not np.isfinite(matrix).all() or (matrix < 0).any():
        raise ArgumentError("contribution scores must be finite numbers, 0 or more")
    scores = np.log10(matrix + 1)
    if not scores.max():
        raise ArgumentError("all contribution scores are 0: no pixel changes the center of the feature map")
    return scores / scores.max()


def area_ratio(matrix: np.ndarray, threshold: float) -> Area | None:
    """Return the high-contribution area: the smallest centered square whose share of all scores exceeds `threshold`.

    Shares are those of `log_scores`. The side is odd, and at least 3, as in the authors' code.

    Args:
        matrix: contribution scores (H, W).
        threshold: share of the sum, from 0 to below 1.

    Returns:
        the square; `None` if no centered square inside the matrix exceeds the threshold.

    Raises:
        ArgumentError: the threshold or the matrix is out of range.
    """
    if not 0 <= threshold < 1:
        raise ArgumentError(f"threshold is {threshold!r}, but must be from 0 to below 1")
    scores = log_scores(matrix)
    height, width = scores.shape
    total = scores.sum()
    for reach in range(1, min(height, width) // 2):
        rows = slice(height // 2 - reach, height // 2 + reach + 1)
        columns = slice(width // 2 - reach, width // 2 + reach + 1)
        if scores[rows, columns].sum() / total > threshold:
            side = 2 * reach + 1
            return Area(side, (side / height) * (side / width))
    return None


def area_ratios(matrix: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> dict[float, Area | None]:
    """Return `area_ratio` for several thresholds."""
    return {threshold: area_ratio(matrix, threshold) for threshold in thresholds}


def heat_maps(matrices: dict[str, np.ndarray], thresholds: Sequence[float] = THRESHOLDS) -> bytes:
    """Draw the matrices side by side, with the sides of their high-contribution areas.

    Args:
        matrices: contribution scores by the name of the network.
        thresholds: shares whose squares are named below each map.

    Returns:
        a PNG file.
    """
    columns = min(4, len(matrices))
    rows = -(-len(matrices) // columns)
    figure = new_figure(3.1 * columns + 0.8, 3.8 * rows)
    shown = None
    for number, (name, matrix) in enumerate(matrices.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        shown = axes.imshow(log_scores(matrix), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(name, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(_caption(matrix, thresholds), fontsize=8)
    assert shown is not None
    figure.colorbar(shown, ax=figure.axes, label="log10(score + 1), relative to the maximum", shrink=0.8)
    return to_png(figure, dpi=130)


def _caption(matrix: np.ndarray, thresholds: Sequence[float]) -> str:
    found = {threshold: area for threshold, area in area_ratios(matrix, thresholds).items() if area is not None}
    texts = [f"{100 * threshold:g} %: {area.percentage}" for threshold, area in found.items()]
    lines = ["  ".join(texts[i : i + 2]) for i in range(0, len(texts), 2)]
    return "area of a share of the scores\n" + "\n".join(lines)
