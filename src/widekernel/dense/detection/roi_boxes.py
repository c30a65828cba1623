"""Boxes between the stages: counts, places and corrections of RoIs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from widekernel.dense.detection.box_coding import clip_boxes, decode_deltas
from widekernel.dense.detection.constants import constant
from widekernel.dense.detection.losses import wide
from widekernel.dense.detection.roi_options import RoiStage
from widekernel.dense.detection.roi_targets import RoiSample
from widekernel.dense.detection.structures import ImageSize


def count_rois(samples: Sequence[RoiSample]) -> Tensor:
    """Return the numbers of RoIs and of positive RoIs, (2,) float32."""
    counts = [sum(len(sample.boxes) for sample in samples), sum(len(sample.matched) for sample in samples)]
    return constant(counts, samples[0].boxes.device)


def positive_places(samples: Sequence[RoiSample]) -> Tensor:
    """Return the places of positive RoIs, (P,), among those of all images."""
    places, start = [], 0
    for sample in samples:
        places.append(torch.arange(start, start + len(sample.matched), device=sample.boxes.device))
        start += len(sample.boxes)
    return torch.cat(places)


def of_class(deltas: Tensor, labels: Tensor) -> Tensor:
    """Choose the corrections of one class for each RoI: (k, classes * 4) -> (k, 4)."""
    rows = torch.arange(len(labels), device=labels.device)
    return wide(deltas.unflatten(1, (-1, 4))[rows, labels])


def move_boxes(boxes: Sequence[Tensor], deltas: Tensor, stage: RoiStage, sizes: Sequence[ImageSize]) -> list[Tensor]:
    """Correct boxes and clip them to their image, without its padding."""
    decoded = decode_deltas(torch.cat(list(boxes)), deltas, stage.stds).split([len(each) for each in boxes])
    return [clip_boxes(each, (size.height, size.width)) for each, size in zip(decoded, sizes)]


def scale_factors(size: ImageSize, like: Tensor) -> Tensor:
    """Return what the boxes of an original image are multiplied by, (4,), with the type and device of `like`."""
    return constant([size.scale_x, size.scale_y, size.scale_x, size.scale_y], like.device, like.dtype)
