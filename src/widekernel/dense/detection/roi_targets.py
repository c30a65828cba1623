"""What each RoI of a training step is to become: class, box and mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torchvision.ops  # noqa: F401 - it defines the operator
from torch import Tensor

from widekernel.dense.detection.matching import NEGATIVE, MatchOptions, match
from widekernel.dense.detection.sampling import Sample, SampleOptions, permutation, sample
from widekernel.dense.detection.structures import Targets
from widekernel.dense.detection.transfer import send


class Candidates(NamedTuple):
    """Boxes of an image from which RoIs for training are chosen.

    Attributes:
        boxes: (n, 4) x1 y1 x2 y2 in pixels of the batch
        usable: (n,) bool, `False` for boxes that must not be chosen; `None` if all may
    """

    boxes: Tensor
    usable: Tensor | None = None


class RoiSample(NamedTuple):
    """The RoIs of an image in a training step, first those that stand for an object.

    Attributes:
        boxes: (s, 4) x1 y1 x2 y2 in pixels of the batch
        labels: (s,) int64, the object's class, or the number of classes for the background
        matched: (p,) int64, number of the object for which each of the first p RoIs stands
        is_truth: (s,) bool, whether the RoI is the box of an object itself
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor
    is_truth: Tensor


@dataclass(frozen=True)
class RoiSampling:
    """How RoIs are chosen.

    Args:
        match: which RoI stands for which object
        sample: how many RoIs of an image are chosen
        purpose: name of the choice; choices of different names are independent
        background: the label of RoIs that stand for no object: the number of classes
    """

    match: MatchOptions
    sample: SampleOptions
    purpose: str
    background: int


def sample_rois(
    candidates: Sequence[Candidates], targets: Sequence[Targets], seeds: Sequence[int], sampling: RoiSampling
) -> list[RoiSample]:
    """Choose the RoIs of a training step among candidates and the boxes of the objects themselves.

    An image's choice depends on its seed alone. Objects' boxes take part after the matching, so they do not keep the best
    candidate of an object from standing for it. The host waits for the device once, for the numbers of chosen RoIs.

    Args:
        candidates: for each image.
        targets: for each image.
        seeds: for each image.
        sampling: how RoIs are chosen.
    """
    boxes, indices, chosen = [], [], []
    for each, target, seed in zip(candidates, targets, seeds):
        matches = match(target.boxes, each.boxes, sampling.match, each.usable)
        own = torch.arange(len(target.boxes), device=each.boxes.device)
        index = torch.cat([own, matches.index])
        order = send(permutation(seed, sampling.purpose, len(index)), index.device)
        boxes.append(torch.cat([target.boxes.to(each.boxes.dtype), each.boxes]))
        indices.append(index)
        chosen.append(sample(index >= 0, index == NEGATIVE, order, sampling.sample))
    parts = zip(boxes, indices, chosen, targets, _counts(chosen))
    return [_chosen(*part, sampling.background) for part in parts]


def _counts(chosen: Sequence[Sample]) -> list[tuple[int, int]]:
    """Return the numbers of positive and negative RoIs of each image; here the host waits for the device."""
    counts = torch.stack([torch.stack([each.positive.sum(), each.negative.sum()]) for each in chosen])
    return [(positive, negative) for positive, negative in counts.tolist()]


def _chosen(
    boxes: Tensor, index: Tensor, chosen: Sample, target: Targets, counts: tuple[int, int], background: int
) -> RoiSample:
    """Gather the chosen RoIs of an image: positive ones in their order, then negative ones in theirs."""
    rank = torch.where(chosen.positive, 0, torch.where(chosen.negative, 1, 2))
    order = rank.argsort(stable=True)[: sum(counts)]
    matched = index[order[: counts[0]]]
    labels = torch.full_like(order, background)
    # Labels out of range, which make the losses NaN, must not reach an index: on a GPU this would end the program.
    labels[: counts[0]] = target.labels[matched].clamp(0, background - 1)
    return RoiSample(boxes[order], labels, matched, order < len(target.boxes))


def mask_targets(masks: Tensor, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """Cut objects' masks out along RoIs.

    A cell of the grid over the RoI belongs to the object if at least half of the samples in it do (RoIAlign of the bitmap).

    Args:
        masks: (n, H, W) uint8 or bool, of the size of the batch.
        boxes: (p, 4) RoIs in pixels of the batch; they are not changed.
        matched: (p,) number of the object for each RoI.
        size: rows and columns of the grid.

    Returns:
        (p, size, size) float32, 0 or 1.
    """
    rois = torch.cat([matched.unsqueeze(1).to(torch.float32), boxes.to(torch.float32)], 1)
    if not len(masks):
        return rois.new_zeros(0, size, size)
    # Where deterministic algorithms are demanded, torchvision's function is a slow program, for the sake of gradients. There
    # are none here, and the operator itself is deterministic.
    soft = torch.ops.torchvision.roi_align(masks.unsqueeze(1).to(torch.float32), rois, 1.0, size, size, 0, True)
    return (soft.squeeze(1) >= 0.5).to(torch.float32)
