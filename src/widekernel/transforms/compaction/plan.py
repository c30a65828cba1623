"""Planning which channels are convolved together, and with which rectangles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from widekernel.layers import Rect
from widekernel.transforms.compaction.boxes import live_boxes, uncovered
from widekernel.transforms.compaction.cost import CostModel, Image

# Number of steps in which extents of the same rectangles are distinguished: merging takes the cube of the number of groups.
_EXTENTS = 5


@dataclass(frozen=True)
class Plan:
    """The partition of a layer's channels into groups that are computed together.

    Attributes:
        groups: sorted channels of each group.
        boxes: for each group, (R, 4), its extent in every rectangle as in `live_boxes`.
        convolved: sorted channels that need a convolution.
        whole: whether there is a single group with all channels in order, as in a plain layer.
    """

    groups: list[np.ndarray]
    boxes: list[np.ndarray]
    convolved: np.ndarray
    whole: bool


def make_plan(rects: Sequence[Rect], cost: CostModel, image: Image, moved_anyway: bool = False) -> Plan:
    """Choose the cheapest partition found by greedily merging groups of similar channels; deterministic.

    Args:
        rects: rectangles of the layer, after `gathered`.
        cost: costs of the parts of a layer.
        image: input of the layer.
        moved_anyway: whether the plain layer gathers its channels, too.
    """
    boxes = live_boxes(rects)
    channels = boxes.shape[0]
    alive: Any = (boxes >= 0).all(2)
    # A lone tap on the output pixel is a factor, not a convolution.
    convolved = np.flatnonzero(alive.any(1) & (boxes.clip(0).sum((1, 2)) > 0) | (alive.sum(1) > 1))
    union = boxes.max(0) if channels else np.full((len(rects), 4), -1)
    plain_taps = uncovered(union, image.extent)
    price_of_plain = cost.grouped if moved_anyway else cost.convolutions
    plain = price_of_plain(channels, plain_taps, image.pixels)

    def price(count: int, extents: np.ndarray) -> float:
        return cost.grouped(count, uncovered(extents, image.extent), image.pixels)

    groups = _merged(_classes(convolved, boxes), boxes, price)
    total = sum(price(len(group), boxes[group].max(0)) for group in groups)
    total += 1e-3 * cost.outside * channels * image.pixels * (len(convolved) < channels)
    if len(convolved) and (total >= plain or (len(groups) == 1 and len(convolved) == channels)):
        return Plan([np.arange(channels)], [union], convolved, True)
    spare = sorted(set(range(channels)) - set(convolved.tolist()))
    groups = [_filled(group, spare, cost) for group in groups]
    return Plan(groups, [boxes[group].max(0) for group in groups], convolved, False)


def _classes(convolved: np.ndarray, boxes: np.ndarray) -> list[np.ndarray]:
    """Divide channels by the rectangles in which they are live, then by extent, in at most `_EXTENTS` steps."""
    parts: dict[tuple[bool, ...], dict[tuple[int, ...], list[int]]] = {}
    for channel in convolved.tolist():
        extent = tuple(boxes[channel].ravel().tolist())
        parts.setdefault(tuple(side >= 0 for side in extent), {}).setdefault(extent, []).append(channel)
    classes = []
    for _, by_extent in sorted(parts.items()):
        ordered = sorted(by_extent.items(), key=lambda item: (sum(uncovered(boxes[item[1][0]])), item[0]))
        sizes = np.cumsum([len(members) for _, members in ordered])
        # All channels with the same extent stay together; if there are few extents, each forms a class.
        step = np.arange(len(ordered)) if len(ordered) <= _EXTENTS else (sizes - 1) * _EXTENTS // sizes[-1]
        for number in np.unique(step):
            members = [channel for (_, some), at in zip(ordered, step) if at == number for channel in some]
            classes.append(np.array(sorted(members)))
    return classes


def _merged(groups: list[np.ndarray], boxes: np.ndarray, price: Callable[[int, np.ndarray], float]) -> list[np.ndarray]:
    """Repeatedly merge the two groups whose merger saves most, until no merger saves anything."""
    groups = list(groups)
    extents = [boxes[group].max(0) for group in groups]
    prices = [price(len(group), extent) for group, extent in zip(groups, extents)]
    while len(groups) > 1:
        best, pair, saved_price = 0.0, None, 0.0
        for i in range(len(groups)):
            for j in range(i + 1, len(groups)):
                both = price(len(groups[i]) + len(groups[j]), np.maximum(extents[i], extents[j]))
                saving = prices[i] + prices[j] - both
                if saving > best:
                    best, pair, saved_price = saving, (i, j), both
        if pair is None:
            break
        i, j = pair
        groups[i], extents[i] = np.sort(np.concatenate([groups[i], groups[j]])), np.maximum(extents[i], extents[j])
        prices[i] = saved_price
        del groups[j], extents[j], prices[j]
    return groups


def _filled(group: np.ndarray, spare: list[int], cost: CostModel) -> np.ndarray:
    """Fill a group up to a whole block with dead channels taken from `spare`, if only few are missing."""
    missing = -len(group) % cost.block
    if not 0 < missing <= min(cost.fill * len(group), len(spare)):
        return group
    added = [spare.pop(0) for _ in range(missing)]
    return np.sort(np.concatenate([group, np.array(added)]))
