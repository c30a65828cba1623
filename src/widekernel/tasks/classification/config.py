"""Settings of a classification run; every field is a key in YAML files and an option of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from typing_extensions import override

from widekernel.data.config import AugmentConfig, DataConfig
from widekernel.errors import ConfigError
from widekernel.settings import require, require_finite
from widekernel.sparsity.semi_structured.config import SEMI_STRUCTURED
from widekernel.tasks.classification.distillation_config import DistillationConfig
from widekernel.tasks.config import FIRST_TASK, RunConfig


@dataclass(frozen=True)
class ModelConfig:
    """Settings of the network.

    Args:
        name: model name registered with timm; `widekernel models` lists widekernel's
        num_classes: outputs of the classifier; null means the number of classes in the data
        args: further arguments of the model, for example --model.args.drop_path_rate 0.1
        pretrained: start from timm's pretrained weights for this model
        weights: checkpoint file to start from
        head_init_scale: factor of the initial weights of the classifier, such as 0.001 for fine-tuning; null leaves them as
            they are. A classifier from model.weights or model.pretrained is not scaled
        grad_checkpointing: recompute activations in the backward pass, which saves memory and costs time
    """

    name: str = "slak_tiny"
    num_classes: int | None = None
    args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    weights: str | None = None
    head_init_scale: float | None = None
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        ok = self.num_classes is None or self.num_classes > 0
        require(ok, "model.num_classes", self.num_classes, "positive")
        require_finite(self, "model")
        ok = self.head_init_scale is None or self.head_init_scale >= 0
        require(ok, "model.head_init_scale", self.head_init_scale, "0 or more")
        if self.pretrained and self.weights is not None:
            raise ConfigError("model.pretrained and model.weights are both set; choose one of them.")
        for key in ("num_classes", "pretrained"):
            if key in self.args:
                raise ConfigError(f"model.args holds {key!r}; set model.{key} instead.")


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Settings of a classification run, besides those that all tasks share.

    Args:
        seed: seed of initialization, data order, augmentation and mixup
        model: network
        data: data set and preprocessing
        augment: augmentation of the training images
        label_smoothing: share of the target that is spread evenly over all classes
        distillation: a trained network to learn from
    """

    task: ClassVar[str] = FIRST_TASK

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    label_smoothing: float = 0.1
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "from 0 to below 1")
        super().__post_init__()
        if self.sparsity.method == SEMI_STRUCTURED and not (self.model.pretrained or self.model.weights):
            raise ConfigError(
                f"sparsity.method is {SEMI_STRUCTURED!r}, which learns masks for trained weights: set "
                "model.weights to a checkpoint, or model.pretrained."
            )
        if self.data.class_map is not None and self.model.weights is None:
            raise ConfigError(
                f"data.class_map is {self.data.class_map!r}, which chooses outputs of the classifier in model.weights, but "
                "there are none: set model.weights to a checkpoint, or leave data.class_map out."
            )
        if self.distillation.is_on:
            self._check_distillation()
        if self.augment.mixes:
            check_pairs("loop.batch_size", self.loop.batch_size)
            if self.loop.micro_batch is not None:
                check_pairs("loop.micro_batch", self.loop.micro_batch)

    def _check_distillation(self) -> None:
        """Raise a `ConfigError` if a teacher is combined with what excludes it."""
        kind = self.distillation.kind
        if self.sparsity.method == SEMI_STRUCTURED:
            raise ConfigError(f"distillation.kind is {kind!r}, but 2:4 masks are learned without a teacher: set it to none.")
        if self.distillation.feature_weight and self.sparsity.method != "none":
            raise ConfigError(
                "distillation.feature_weight adds a dense layer to the network while it trains: set it to 0, or "
                "sparsity.method to none."
            )
        if self.distillation.feature_weight and self.loop.compile is not None:
            raise ConfigError(
                f"distillation.feature_weight reads features inside the network, which loop.compile ({self.loop.compile}) "
                "hides: set one of them to 0 or null."
            )

    @override
    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if not self.distillation.is_on:
            values["distillation"] = {"kind": self.distillation.kind}
        return values

    @classmethod
    @override
    def upgraded(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the stored settings of a run as this version would store them: new settings have their defaults.

        Until version 0.5, `loop.batch_size` was the size of a forward pass.
        """
        settings = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
        loop = settings.get("loop") or {}
        if "accumulate" in loop:
            accumulate = loop.pop("accumulate")
            loop["micro_batch"] = loop["batch_size"] if accumulate > 1 else None
            loop["batch_size"] *= accumulate
        return super().upgraded(settings)


def check_pairs(name: str, size: int) -> None:
    """Raise a `ConfigError` if a batch of `size` images cannot be mixed in pairs; `name` says which batch it is."""
    if size % 2:
        raise ConfigError(
            f"{name} is {size}, but mixup and cutmix pair the images of a batch: use an even number, or set augment.mixup "
            "and augment.cutmix to 0."
        )
