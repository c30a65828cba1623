"""Pasting: the mask of a box, a small square, on the pixels of the image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel.errors import ArgumentError, ShapeError


def paste_masks(probabilities: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> Tensor:
    """Sample each mask bilinearly at the centers of the image's pixels, on its exact box, and compare with a threshold.

    Outside the box, a mask fades to zero within half a cell of its grid. The box is neither rounded nor expanded. A box
    without an area has an empty mask.

    Args:
        probabilities: (n, m, m) from 0 to 1, on a grid of m × m cells over the box.
        boxes: (n, 4) x1 y1 x2 y2 in pixels of the image.
        height: rows of the image.
        width: columns of the image.
        threshold: smallest probability of a pixel in the mask, above 0.

    Returns:
        (n, height, width) bool.

    Raises:
        ArgumentError: the threshold is not in (0, 1].
        ShapeError: the shapes of masks and boxes do not fit.
    """
    if not 0 < threshold <= 1:
        raise ArgumentError(f"The threshold of masks is {threshold}, but must be above 0 and at most 1.")
    if probabilities.dim() != 3 or boxes.shape != (len(probabilities), 4):
        raise ShapeError(
            f"Masks to paste are (n, m, m) and boxes (n, 4), but got {tuple(probabilities.shape)} and {tuple(boxes.shape)}."
        )
    pasted = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    for index, corners in enumerate(boxes.tolist()):
        rows = _window(corners[1], corners[3], probabilities.shape[1], height)
        columns = _window(corners[0], corners[2], probabilities.shape[2], width)
        if len(rows) and len(columns):
            soft = sample_mask(probabilities[index], boxes[index], rows, columns)
            pasted[index, rows.start : rows.stop, columns.start : columns.stop] = soft >= threshold
    return pasted


def sample_mask(probabilities: Tensor, box: Tensor, rows: range, columns: range) -> Tensor:
    """Sample a mask bilinearly at the centers of pixels.

    Args:
        probabilities: (m, m) on a grid of cells over the box.
        box: (4,) x1 y1 x2 y2 in pixels, with a width and a height above 0.
        rows: consecutive rows of the image.
        columns: consecutive columns of the image.

    Returns:
        (rows, columns) from 0 to 1; zero at half a cell and more outside the box.
    """
    x1, y1, x2, y2 = box.unbind()
    y = torch.arange(rows.start, rows.stop, device=box.device, dtype=box.dtype) + 0.5
    x = torch.arange(columns.start, columns.stop, device=box.device, dtype=box.dtype) + 0.5
    y = (y - y1) / (y2 - y1) * 2 - 1
    x = (x - x1) / (x2 - x1) * 2 - 1
    grid = torch.stack([x.expand(len(y), -1), y.unsqueeze(1).expand(-1, len(x))], 2)
    return F.grid_sample(probabilities.to(box.dtype)[None, None], grid[None], align_corners=False)[0, 0]


def _window(start: float, stop: float, cells: int, limit: int) -> range:
    """Return the rows or columns of an image where the mask of a box from `start` to `stop` may differ from zero."""
    if not stop > start:
        return range(0)
    margin = (stop - start) / (2 * cells) + 1
    return range(min(max(math.floor(start - margin), 0), limit), min(max(math.ceil(stop + margin), 0), limit))
