"""Settings of a classification run; every field is a key in YAML files and an option of the command line."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from widekernel.data.config import AugmentConfig, DataConfig
from widekernel.engine.config import (
    CheckpointConfig,
    EmaConfig,
    EvaluationConfig,
    FaultConfig,
    LoopConfig,
    OptimizerConfig,
    ScheduleConfig,
    SparsityConfig,
    TrainingConfig,
    check_averaging,
)
from widekernel.engine.logging_config import LoggingConfig
from widekernel.errors import ConfigError
from widekernel.settings import require, require_finite
from widekernel.sparsity.semi_structured.config import SEMI_STRUCTURED
from widekernel.tasks.classification.distillation_config import DistillationConfig


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
class TrainConfig:
    """Settings of a training run.

    Args:
        seed: seed of initialization, data order, augmentation and mixup
        output: run folder; null means runs/<recipe or model name>
        label_smoothing: share of the target that is spread evenly over all classes
        model: network
        data: data set and preprocessing
        augment: augmentation of the training images
        optimizer: optimizer
        schedule: epochs and learning rate
        ema: moving average of the weights
        loop: batches, precision and device
        evaluation: when the network is evaluated, and with which weights
        checkpoint: training states
        faults: what happens when losses or gradients are not finite
        logging: logs besides metrics.jsonl
        distillation: a trained network to learn from
        sparsity: sparsity of the weights
    """

    seed: int = 0
    output: str | None = None
    label_smoothing: float = 0.1
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "from 0 to below 1")
        check_averaging(self.sparsity, self.ema.decay, self.evaluation.weights)
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

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values, as in a YAML file."""
        values = _plain(asdict(self))
        # Settings of unused methods are left out, so that changing them does not prevent resuming.
        used = {"none": (), "dynamic": ("dynamic", "masks"), SEMI_STRUCTURED: ("semi_structured",)}[self.sparsity.method]
        values["sparsity"] = {key: values["sparsity"][key] for key in ("method", *used)}
        if not self.distillation.is_on:
            values["distillation"] = {"kind": self.distillation.kind}
        return values

    @property
    def training(self) -> TrainingConfig:
        """The settings that the training loop uses; the learning rate is that for `loop.batch_size`."""
        return TrainingConfig(
            seed=self.seed,
            optimizer=replace(self.optimizer, lr=self.schedule.scaled(self.optimizer.lr, self.loop.batch_size)),
            schedule=self.schedule,
            ema=self.ema,
            loop=self.loop,
            evaluation=self.evaluation,
            checkpoint=self.checkpoint,
            faults=self.faults,
            logging=self.logging,
            max_unreadable=self.data.max_unreadable,
            sparsity=self.sparsity,
        )


def upgraded(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the stored settings of a run as this version would store them.

    Settings that did not exist yet have their defaults. Until version 0.5, `loop.batch_size` was the size of a forward pass.
    """
    settings = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    loop = settings.get("loop") or {}
    if "accumulate" in loop:
        accumulate = loop.pop("accumulate")
        loop["micro_batch"] = loop["batch_size"] if accumulate > 1 else None
        loop["batch_size"] *= accumulate
    return _filled(settings, TrainConfig().to_dict())


def _filled(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return settings, in which missing ones have their defaults; the arguments of a model have none."""
    filled = {**defaults, **settings}
    for key, default in defaults.items():
        if isinstance(default, dict) and default and isinstance(settings.get(key), dict) and key != "sparsity":
            filled[key] = _filled(settings[key], default)
    return filled


def check_pairs(name: str, size: int) -> None:
    """Raise a `ConfigError` if a batch of `size` images cannot be mixed in pairs; `name` says which batch it is."""
    if size % 2:
        raise ConfigError(
            f"{name} is {size}, but mixup and cutmix pair the images of a batch: use an even number, or set augment.mixup "
            "and augment.cutmix to 0."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
