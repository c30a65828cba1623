"""Settings that the runs of all tasks share; every field is a key in YAML files and an option of the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from typing_extensions import Self

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
from widekernel.settings import require
from widekernel.sparsity.semi_structured.config import SEMI_STRUCTURED

TASK = "task"
"""Key of the task in stored settings and model files; classification, the first one, is not named."""

FIRST_TASK = "classification"


def wrong_task(source: object, found: str, wanted: str) -> str:
    """Return the message for a network that has another task than the one that is wanted."""
    return f"{source} holds a network for {found}, but one for {wanted} is needed here."


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run of any task; a task's own class says what `model` and `data` are, and adds to them.

    Args:
        seed: seed of initialization, data order, augmentation and all other random choices
        output: run folder; null means runs/<recipe or model name>
        model: network
        data: data set and preprocessing
        optimizer: optimizer
        schedule: epochs and learning rate
        ema: moving average of the weights
        loop: batches, precision and device
        evaluation: when the network is evaluated, and with which weights
        checkpoint: training states
        faults: what happens when losses or gradients are not finite
        logging: logs besides metrics.jsonl
        sparsity: sparsity of the weights
    """

    task: ClassVar[str]

    seed: int = 0
    output: str | None = None
    model: Any = None
    data: Any = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        check_averaging(self.sparsity, self.ema.decay, self.evaluation.weights)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values, as in a YAML file; they name the task unless it is classification."""
        values = _plain(asdict(self))
        # Settings of unused methods are left out, so that changing them does not prevent resuming.
        used = {"none": (), "dynamic": ("dynamic", "masks"), SEMI_STRUCTURED: ("semi_structured",)}[self.sparsity.method]
        sparsity = values.pop("sparsity")  # goes to the end
        values["sparsity"] = {key: sparsity[key] for key in ("method", *used)}
        return values if self.task == FIRST_TASK else {TASK: self.task, **values}

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

    @classmethod
    def upgraded(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the stored settings of a run as this version would store them: new settings have their defaults."""
        return _filled(settings, cls().to_dict())

    def with_data_root(self, root: str) -> Self:
        """Return the settings with another `data.root`."""
        return replace(self, data=replace(self.data, root=root))


def _filled(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return settings, in which missing ones have their defaults; the arguments of a model have none."""
    filled = {**defaults, **settings}
    if TASK in defaults and TASK not in settings:
        filled[TASK] = FIRST_TASK
    for key, default in defaults.items():
        if isinstance(default, dict) and default and isinstance(settings.get(key), dict) and key != "sparsity":
            filled[key] = _filled(settings[key], default)
    return filled


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
