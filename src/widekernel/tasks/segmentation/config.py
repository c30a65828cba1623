"""Settings of a segmentation run; every field is a key in YAML files and an option of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from widekernel.data.segmentation.config import SegmentationDataConfig
from widekernel.dense.segmentation import InferenceOptions
from widekernel.engine.config import LoopConfig, OptimizerConfig, ScheduleConfig
from widekernel.errors import ConfigError
from widekernel.settings import require_literals
from widekernel.sparsity.semi_structured.config import SEMI_STRUCTURED
from widekernel.tasks.config import RunConfig
from widekernel.tasks.network_config import SegmenterConfig


@dataclass(frozen=True)
class SegmentationTestConfig:
    """Settings of how the network sees an image in evaluation; data.test_scale and data.test_ratios say at which sizes.

    Args:
        mode: the image at once (whole), or overlapping windows, whose logits are averaged (slide)
        crop: height and width of a window in pixels; windows of a smaller image are smaller
        stride: distance of the windows, down and across
        flip: also see each image mirrored, and average the probabilities
    """

    mode: Literal["whole", "slide"] = "whole"
    crop: tuple[int, int] = (512, 512)
    stride: tuple[int, int] = (341, 341)
    flip: bool = False

    def __post_init__(self) -> None:
        self.inference()  # checks the values

    def inference(self) -> InferenceOptions:
        """Return how the network sees one view of an image."""
        return InferenceOptions(self.mode, self.crop, self.stride)


@dataclass(frozen=True)
class SegmentationConfig(RunConfig):
    """Settings of a segmentation run, besides those that all tasks share.

    Args:
        model: network: a backbone and the heads of UPerNet
        data: data set, augmentation of the training images and sizes
        test: how the network sees an image in evaluation
        loss_average: what the sum of the losses over the labeled pixels is divided by: the number of all pixels, as in the
            published runs, or that of the labeled ones
    """

    task: ClassVar[str] = "segmentation"

    model: SegmenterConfig = field(default_factory=SegmenterConfig)
    data: SegmentationDataConfig = field(default_factory=SegmentationDataConfig)
    test: SegmentationTestConfig = field(default_factory=SegmentationTestConfig)
    loss_average: Literal["all", "labeled"] = "all"
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(
            kind="poly", steps=160_000, warmup_epochs=0, warmup_steps=1500, warmup_factor=1e-6, min_lr=0.0
        )
    )
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(batch_size=16))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_literals(self)
        if self.sparsity.method == SEMI_STRUCTURED:
            raise ConfigError(
                f"sparsity.method is {SEMI_STRUCTURED!r}, which learns masks of classifiers: use dynamic or none for "
                "segmentation."
            )
