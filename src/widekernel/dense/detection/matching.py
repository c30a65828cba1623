"""Which box each anchor or proposal stands for, by intersection over union."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

from widekernel.errors import ArgumentError

NEGATIVE, NEITHER = -1, -2


@dataclass(frozen=True)
class MatchOptions:
    """Rules for matching.

    Args:
        positive: overlap from which a candidate stands for its best box
        negative: overlap below which a candidate is background
        lowest: overlap from which the best candidates of a box stand for it, with `low_quality`
        low_quality: the candidates with the highest overlap with a box, several if they are equal, stand for it even below
            `positive`, and even if they overlap more with another box

    Raises:
        ArgumentError: if the overlaps do not lie between 0 and 1, or `negative` is above `positive`.
    """

    positive: float
    negative: float
    lowest: float = 0.0
    low_quality: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.negative <= self.positive <= 1 or not 0 <= self.lowest <= 1:
            raise ArgumentError(
                f"negative is {self.negative}, positive {self.positive} and lowest {self.lowest}; they must lie between 0 "
                "and 1, and negative must not be above positive."
            )


class Matches(NamedTuple):
    """What candidates stand for.

    Attributes:
        index: (n,) int64, the number of a box, or `NEGATIVE`, or `NEITHER` for what is left out of training
        overlap: (n,) float32, highest intersection over union with a box; 0 without boxes, -1 for unusable candidates
    """

    index: Tensor  # type: ignore[assignment]  # hides the method of tuples
    overlap: Tensor


def match(boxes: Tensor, candidates: Tensor, options: MatchOptions, usable: Tensor | None = None) -> Matches:
    """Match candidates to boxes.

    The host does not wait for the device.

    Args:
        boxes: (k, 4) boxes of positive area
        candidates: (n, 4)
        options: the rules
        usable: (n,) bool, `False` for candidates that stand for nothing and are best for no box; by default all are usable
    """
    if not len(boxes) or not len(candidates):
        overlap = candidates.new_zeros(len(candidates))
        index = torch.full((len(candidates),), NEGATIVE, device=candidates.device)
        if usable is not None:
            overlap, index = overlap.masked_fill(~usable, -1.0), index.masked_fill(~usable, NEITHER)
        return Matches(index, overlap)
    overlaps = box_iou(boxes, candidates)
    if usable is not None:
        overlaps = overlaps.masked_fill(~usable, -1.0)
    overlap, best = overlaps.max(dim=0)
    index = torch.full_like(best, NEITHER)
    index = torch.where((overlap >= 0) & (overlap < options.negative), NEGATIVE, index)
    index = torch.where(overlap >= options.positive, best, index)
    if options.low_quality:
        highest = overlaps.amax(dim=1, keepdim=True)
        bests = (overlaps == highest) & (highest >= options.lowest)
        # Of several boxes, the last one takes the candidate.
        last = torch.where(bests, torch.arange(len(boxes), device=boxes.device)[:, None], -1).amax(dim=0)
        index = torch.where(last >= 0, last, index)
    return Matches(index, overlap)
