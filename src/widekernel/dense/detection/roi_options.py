"""Settings of the second stage of two-stage detectors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from widekernel.dense.detection.box_coding import Stds
from widekernel.dense.detection.matching import MatchOptions
from widekernel.dense.detection.sampling import SampleOptions
from widekernel.errors import ArgumentError
from widekernel.settings import require, require_one_of, require_whole

STRIDES = (4, 8, 16, 32)
BoxLoss = Literal["giou", "l1"]


@dataclass(frozen=True)
class RoiStage:
    """One stage of the cascade.

    Args:
        match: from which overlap a RoI stands for an object in training.
        stds: by what the corrections of boxes are divided.
        weight: weight of the stage's losses.
    """

    match: MatchOptions
    stds: Stds
    weight: float = 1.0


def _stage(overlap: float, stds: Stds, weight: float = 1.0, low_quality: bool = False) -> RoiStage:
    return RoiStage(MatchOptions(overlap, overlap, overlap, low_quality), stds, weight)


@dataclass(frozen=True)
class RoiOptions:
    """Settings of the second stage.

    Args:
        stages: stages of the cascade, one for Mask R-CNN.
        convs: convolutions of a box head.
        fcs: fully connected layers of a box head.
        fc_channels: their outputs.
        box_loss: "giou" compares decoded boxes, "l1" the corrections.
        box_loss_weight: factor of the box loss.
        sample: how many RoIs of an image train.
        box_size: rows and columns of the features of a box.
        mask_size: rows and columns of the features of a mask, half of those of the mask.
        score_threshold: a class counts as found above this score.
        overlap_threshold: overlap above which the better of two boxes of a class suppresses the other.
        most: highest number of detections in an image.
        mask_threshold: smallest probability of a pixel in a mask.

    Raises:
        ArgumentError: there is no stage, `box_loss` is unknown, or a number is out of range.
    """

    stages: tuple[RoiStage, ...]
    convs: int
    fcs: int
    fc_channels: int = 1024
    box_loss: BoxLoss = "giou"
    box_loss_weight: float = 1.0
    sample: SampleOptions = field(default_factory=lambda: SampleOptions(512, 0.25))
    box_size: int = 7
    mask_size: int = 14
    score_threshold: float = 0.05
    overlap_threshold: float = 0.5
    most: int = 100
    mask_threshold: float = 0.5

    def __post_init__(self) -> None:
        if not self.stages:
            raise ArgumentError("stages is empty; the second stage of a detector needs at least one.")
        require_one_of("box_loss", self.box_loss, ("giou", "l1"))
        for name in ("score_threshold", "overlap_threshold"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        require(0 < self.mask_threshold <= 1, "mask_threshold", self.mask_threshold, "above 0 and at most 1")
        for name in ("fcs", "fc_channels", "box_size", "mask_size", "most"):
            require_whole(name, getattr(self, name), 1)
        require_whole("convs", self.convs, 0)


CASCADE = RoiOptions(
    stages=(
        _stage(0.5, (0.1, 0.1, 0.2, 0.2)),
        _stage(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
        _stage(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
    ),
    convs=4,
    fcs=1,
    box_loss="giou",
    box_loss_weight=10.0,
)
"""Cascade Mask R-CNN of the ConvNeXt, RepLKNet and SLaK papers."""

MASK_RCNN = RoiOptions(stages=(_stage(0.5, (0.1, 0.1, 0.2, 0.2), low_quality=True),), convs=0, fcs=2, box_loss="l1")
"""Mask R-CNN of the ConvNeXt paper."""
