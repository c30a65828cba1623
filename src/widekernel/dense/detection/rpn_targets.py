"""What the anchors of a region proposal network are trained towards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from widekernel.dense.detection.anchors import AnchorOptions, covered_cells, grid_anchors, inside
from widekernel.dense.detection.box_coding import encode_deltas
from widekernel.dense.detection.matching import NEGATIVE, MatchOptions, match
from widekernel.dense.detection.sampling import SampleOptions, permutation, sample
from widekernel.dense.detection.structures import ImageSize, Targets
from widekernel.dense.detection.transfer import send
from widekernel.errors import ArgumentError

_LAST = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class RpnTrainingOptions:
    """Which anchors train, and towards what.

    The defaults are those of the published Cascade Mask R-CNNs; Mask R-CNN takes `allowed_border=None`.

    Args:
        match: which anchors are positive and negative
        sample: how many anchors of an image train
        allowed_border: anchors that leave the image, without its padding, by more pixels do not train; `None` for no limit
        padding_multiple: images are padded to a multiple of this; anchors of cells beyond do not train, so that the choice
            does not depend on how large the other images of a batch are
    """

    match: MatchOptions = field(default_factory=lambda: MatchOptions(0.7, 0.3, 0.3, low_quality=True))
    sample: SampleOptions = field(default_factory=lambda: SampleOptions(256, 0.5))
    allowed_border: int | None = 0
    padding_multiple: int = 32

    def __post_init__(self) -> None:
        if self.padding_multiple < 1:
            raise ArgumentError(f"padding_multiple is {self.padding_multiple}, but must be at least 1.")


class RpnTargets(NamedTuple):
    """Targets of all anchors of a batch, over the maps from fine to coarse.

    Attributes:
        positive: (N, n) bool, anchors that train towards a box
        negative: (N, n) bool, anchors that train towards background
        deltas: (N, n, 4) float32, where `positive`; elsewhere 0
    """

    positive: Tensor
    negative: Tensor
    deltas: Tensor


class _Map(NamedTuple):
    size: tuple[int, int]
    stride: int


def rpn_targets(
    maps: Sequence[tuple[int, int]],
    sizes: Sequence[ImageSize],
    targets: Sequence[Targets],
    seeds: Sequence[int],
    anchors: AnchorOptions,
    options: RpnTrainingOptions,
) -> RpnTargets:
    """Match and sample the anchors of each image.

    The sample of an image depends on its seed and size and on its boxes, not on the other images. The host does not wait for
    the device.

    Args:
        maps: rows and columns of the maps, fine to coarse
        sizes: sizes of the images
        targets: their objects
        seeds: their seeds
        anchors: settings of the anchors
        options: the rules
    """
    device = targets[0].boxes.device
    all_anchors = torch.cat(grid_anchors(maps, anchors, device))
    places = [_Map(size, stride) for size, stride in zip(maps, anchors.strides)]
    parts = [
        _of_an_image(all_anchors, _order(places, size, seed, len(anchors.ratios), options), size, target.boxes, options)
        for size, target, seed in zip(sizes, targets, seeds)
    ]
    return RpnTargets(*map(torch.stack, zip(*parts)))


def _order(places: Sequence[_Map], size: ImageSize, seed: int, ratios: int, options: RpnTrainingOptions) -> Tensor:
    """Number the anchors over the padded image in random order; (n,) on the CPU. Those beyond get the largest number."""
    multiple = options.padding_multiple
    area = (-(-size.height // multiple) * multiple, -(-size.width // multiple) * multiple)
    cells = [covered_cells(place.size, area, place.stride) for place in places]
    numbers = permutation(seed, "anchors", sum(rows * columns for rows, columns in cells) * ratios)
    parts, start = [], 0
    for place, (rows, columns) in zip(places, cells):
        order = torch.full((*place.size, ratios), _LAST)
        stop = start + rows * columns * ratios
        order[:rows, :columns] = numbers[start:stop].view(rows, columns, ratios)
        parts.append(order.flatten())
        start = stop
    return torch.cat(parts)


def _of_an_image(
    anchors: Tensor, order: Tensor, size: ImageSize, boxes: Tensor, options: RpnTrainingOptions
) -> tuple[Tensor, Tensor, Tensor]:
    order = send(order, anchors.device)
    usable = order != _LAST
    if options.allowed_border is not None:
        usable = usable & inside(anchors, (size.height, size.width), options.allowed_border)
    index = match(boxes, anchors, options.match, usable).index
    chosen = sample(index >= 0, index == NEGATIVE, order, options.sample)
    if not len(boxes):
        return chosen.positive, chosen.negative, torch.zeros_like(anchors)
    deltas = encode_deltas(anchors, boxes[index.clamp(min=0)])
    return chosen.positive, chosen.negative, torch.where(chosen.positive[:, None], deltas, 0.0)
