"""Settings of a detection run; every field is a key in YAML files and an option of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from widekernel.data.detection.config import DetectionDataConfig
from widekernel.engine.config import LoopConfig, OptimizerConfig, ScheduleConfig
from widekernel.errors import ConfigError
from widekernel.sparsity.semi_structured.config import SEMI_STRUCTURED
from widekernel.tasks.config import RunConfig
from widekernel.tasks.network_config import DetectorConfig


@dataclass(frozen=True)
class DetectionConfig(RunConfig):
    """Settings of a detection run, besides those that all tasks share.

    Args:
        model: network: a backbone, and the detector on it
        data: data set, augmentation of the training images and sizes
    """

    task: ClassVar[str] = "detection"

    model: DetectorConfig = field(default_factory=DetectorConfig)
    data: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(
            kind="multistep",
            epochs=36,
            milestones=(27, 33),
            warmup_epochs=0,
            warmup_steps=500,
            warmup_factor=1e-3,
            min_lr=0.0,
        )
    )
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(batch_size=16))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity.method == SEMI_STRUCTURED:
            raise ConfigError(
                f"sparsity.method is {SEMI_STRUCTURED!r}, which learns masks of classifiers: use dynamic or none for "
                "detection."
            )
        if self.data.masks and self.model.detector == "fcos":
            raise ConfigError(
                "data.masks is true, but model.detector is 'fcos', which predicts boxes only: set data.masks to false."
            )
