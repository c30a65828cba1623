"""The live box: the part of each rectangle with nonzero weights, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widekernel.layers import Rect

DEAD = -1


def live_boxes(rects: Sequence[Rect]) -> np.ndarray:
    """Return the reach of the live taps of every channel in every rectangle.

    Returns:
        (C, R, 4): numbers of taps above, below, left and right of the anchor; the box always contains the anchor. All four
        are -1 if the kernel of the channel is zero.
    """
    channels = rects[0].kernel.shape[0] if rects else 0
    boxes = np.full((channels, len(rects), 4), DEAD, dtype=np.int64)
    for i, rect in enumerate(rects):
        live: Any = (rect.kernel.detach()[:, 0] != 0).cpu().numpy()
        row, column = rect.anchor
        alive = live.any((1, 2))
        for side, (axis, anchor) in enumerate(((2, row), (1, column))):
            lines: Any = live.any(axis)
            first, last = lines.argmax(1), lines.shape[1] - 1 - lines[:, ::-1].argmax(1)
            boxes[alive, i, 2 * side] = np.maximum(anchor - first, 0)[alive]
            boxes[alive, i, 2 * side + 1] = np.maximum(last - anchor, 0)[alive]
    return boxes


def gathered(rects: Sequence[Rect]) -> list[Rect]:
    """Move the taps of a channel from one rectangle to another one whose live box covers them; the sum stays the same.

    When a layer is folded, the same strip absorbs a small kernel and the identity for all channels. If that strip is
    otherwise dead in a channel, they would keep it alive, although the other strip has room for them.

    Returns:
        the rectangles, with kernels in float64.
    """
    kernels = [rect.kernel.detach().double().clone() for rect in rects]
    anchors = [rect.anchor for rect in rects]
    boxes = live_boxes(rects)
    areas = [rect.size[0] * rect.size[1] for rect in rects]
    for a in sorted(range(len(rects)), key=lambda i: areas[i]):
        for b in sorted(range(len(rects)), key=lambda i: areas[i], reverse=True):
            inside = (boxes[:, a] >= 0).all(1) & (boxes[:, b] >= boxes[:, a]).all(1)
            if a == b or not inside.any():
                continue
            # If two boxes are equal, the first pair in this order decides which rectangle keeps both.
            chosen = torch.from_numpy(np.flatnonzero(inside)).to(kernels[a].device)
            from_a, to_b = _shared_window(rects[a], rects[b])
            moved = kernels[b][chosen]
            moved[:, :, to_b[0], to_b[1]] += kernels[a][chosen][:, :, from_a[0], from_a[1]]
            kernels[b][chosen] = moved
            kernels[a][chosen] = 0
            boxes[inside, a] = DEAD
    return [Rect(kernel, anchor) for kernel, anchor in zip(kernels, anchors)]


def cut(rect: Rect, channels: Tensor, box: Sequence[int]) -> Rect:
    """Return the taps of some channels (int64 indices) within a box (above, below, left, right) around the anchor."""
    up, down, left, right = box
    row, column = rect.anchor
    kernel = rect.kernel.index_select(0, channels)
    return Rect(kernel[:, :, row - up : row + down + 1, column - left : column + right + 1], (up, left))


def taps_of(box: Any) -> int:
    """Count the taps of a box (above, below, left, right)."""
    return int((box[0] + box[1] + 1) * (box[2] + box[3] + 1))


def uncovered(boxes: np.ndarray, extent: tuple[int, int] | None = None) -> list[int]:
    """Count the taps of the live boxes that no other box covers; `maximal_rectangles` keeps the same ones.

    Args:
        boxes: (R, 4), as in `live_boxes`.
        extent: (H, W) of the image; if given, only taps that can meet a pixel count.

    Returns:
        one number per box that remains.
    """
    kept: list[np.ndarray] = []
    for box in sorted((b for b in boxes if b[0] >= 0), key=taps_of, reverse=True):
        if not any((other >= box).all() for other in kept):
            kept.append(box)
    if extent is not None:
        height, width = extent
        kept = [np.minimum(box, (height - 1, height - 1, width - 1, width - 1)) for box in kept]
    return [taps_of(box) for box in kept]


def _shared_window(a: Rect, b: Rect) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the slices of both kernels at the offsets from the anchor that the rectangles have in common."""
    up, down, left, right = (min(mine, theirs) for mine, theirs in zip(a.reach, b.reach))
    slices = [
        (slice(r.anchor[0] - up, r.anchor[0] + down + 1), slice(r.anchor[1] - left, r.anchor[1] + right + 1)) for r in (a, b)
    ]
    return slices[0], slices[1]
