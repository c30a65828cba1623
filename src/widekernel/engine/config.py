"""Settings of averaging, batches, precision, evaluation, checkpoints and sparsity, and of the loop as a whole."""

from dataclasses import dataclass, field
from typing import Any, Literal

from widekernel.engine.logging_config import LoggingConfig
from widekernel.engine.optimization_config import OptimizerConfig, ScheduleConfig
from widekernel.engine.write_policy import OnFailure
from widekernel.errors import ConfigError
from widekernel.settings import require, require_finite, require_literals, require_one_of
from widekernel.sparsity import DynamicSparsityConfig
from widekernel.sparsity.semi_structured.config import SEMI_STRUCTURED, SemiStructuredConfig, current_name


@dataclass(frozen=True)
class EmaConfig:
    """Settings of the exponential moving average of the weights (timm's ModelEmaV3).

    Args:
        decay: fraction of the average that each step keeps, such as 0.9999; null turns averaging off
        warmup: start with a smaller decay, which grows to ema.decay
    """

    decay: float | None = None
    warmup: bool = False

    def __post_init__(self) -> None:
        require(self.decay is None or 0 <= self.decay < 1, "ema.decay", self.decay, "from 0 to below 1")
        if self.warmup and self.decay is None:
            raise ConfigError("ema.warmup is true, but nothing is averaged: set ema.decay, such as 0.9999.")


@dataclass(frozen=True)
class LoopConfig:
    """Settings of batches, precision and device.

    Args:
        batch_size: images per optimizer step, over all processes
        micro_batch: images per forward pass on one device, whose gradients are accumulated; null means that each process
            takes its share of loop.batch_size at once
        eval_batch_size: images per forward pass in evaluation; null means 1.5 times those in training, or 1 for segmentation
            and detection, whose images have different sizes
        precision: fp32, or mixed precision (autocast) with bf16 or, on CUDA only, fp16
        device: auto (CUDA if available), cpu, cuda or cuda:N
        channels_last: use the channels-last memory format
        compile: mode of torch.compile: default, reduce-overhead (CUDA graphs) or max-autotune; null does not compile
        accelerate: time the layers of the network on the first batch of a forward pass, as widekernel.accelerate does, and
            compute those in another way that are at least 5 % faster so on this machine. Each step is equal up to rounding;
            the differences grow over a run, as they do with another number of threads. The choices are stored with the run,
            but they depend on times: another run may choose otherwise, and so may this one if resumed on another machine
        sync_batch_norm: compute batch norms over the images of all processes
        deterministic: use deterministic algorithms only (PyTorch's), and stop with an error where there is none; this holds
            during the run alone
        log_every: optimizer steps between rows of metrics.jsonl
        timeout: seconds without a sign of life after which a process counts as lost, which ends the run (only with several
            processes); long computations are no loss
    """

    batch_size: int = 128
    micro_batch: int | None = None
    eval_batch_size: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "auto"
    channels_last: bool = False
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    accelerate: bool = False
    sync_batch_norm: bool = True
    deterministic: bool = False
    log_every: int = 10
    timeout: float = 60.0

    def __post_init__(self) -> None:
        require_finite(self, "loop")
        require_literals(self, "loop")
        require(self.batch_size > 0, "loop.batch_size", self.batch_size, "positive")
        ok = self.micro_batch is None or self.micro_batch > 0
        require(ok, "loop.micro_batch", self.micro_batch, "positive")
        ok = self.eval_batch_size is None or self.eval_batch_size > 0
        require(ok, "loop.eval_batch_size", self.eval_batch_size, "positive")
        require(self.log_every > 0, "loop.log_every", self.log_every, "positive")
        require(self.timeout >= 1, "loop.timeout", self.timeout, "1 or more")
        if self.accelerate and self.compile is not None:
            raise ConfigError(
                f"loop.accelerate is true, and loop.compile is {self.compile!r}: layers that are faster alone need not be "
                "so in a compiled network. Choose one of them."
            )
        if self.accelerate and self.deterministic:
            raise ConfigError(
                "loop.accelerate and loop.deterministic are both true, but layers chosen by their measured times may differ "
                "from run to run. Choose one of them."
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of when the network is evaluated, and with which weights; it always is at the end of the run.

    Without held-out data (data.val_split null), nothing is evaluated.

    Args:
        every_epochs: epochs between evaluations
        every_steps: optimizer steps between evaluations; null means evaluation.every_epochs
        weights: both evaluates the weights and, with ema.decay, their average, which then decides which state is the
            best; raw evaluates the weights only, ema the average only
    """

    every_epochs: int = 1
    every_steps: int | None = None
    weights: Literal["both", "ema", "raw"] = "both"

    def __post_init__(self) -> None:
        require_literals(self, "evaluation")
        require(self.every_epochs > 0, "evaluation.every_epochs", self.every_epochs, "positive")
        ok = self.every_steps is None or self.every_steps > 0
        require(ok, "evaluation.every_steps", self.every_steps, "positive")

    def interval(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps between evaluations."""
        return self.every_epochs * steps_per_epoch if self.every_steps is None else self.every_steps


@dataclass(frozen=True)
class FaultConfig:
    """Settings of what happens when losses or gradients are not finite.

    Such a step changes nothing: neither weights, averages, masks nor running statistics.

    Args:
        max_skipped: largest number of such steps in a row; more end the run
        rollbacks: how often the run may instead return to the last training state, and leave out the batches since then
    """

    max_skipped: int = 10
    rollbacks: int = 0

    def __post_init__(self) -> None:
        require(self.max_skipped >= 0, "faults.max_skipped", self.max_skipped, "0 or more")
        require(self.rollbacks >= 0, "faults.rollbacks", self.rollbacks, "0 or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """Settings of the training states: when they are saved, and how many are kept.

    Args:
        every_epochs: epochs between training states
        every_steps: optimizer steps between additional training states; null saves only at the end of epochs
        keep: number of latest training states to keep; the best one is always kept as well
        on_failure: what happens if a part of the run cannot be written: stop, or continue without it
        max_failures: failures in a row after which continue stops, too
    """

    every_epochs: int = 1
    every_steps: int | None = None
    keep: int = 2
    on_failure: OnFailure = "stop"
    max_failures: int = 5

    def __post_init__(self) -> None:
        require_literals(self, "checkpoint")
        require(self.every_epochs > 0, "checkpoint.every_epochs", self.every_epochs, "positive")
        require(self.max_failures > 0, "checkpoint.max_failures", self.max_failures, "positive")
        ok = self.every_steps is None or self.every_steps > 0
        require(ok, "checkpoint.every_steps", self.every_steps, "positive")
        require(self.keep >= 2, "checkpoint.keep", self.keep, "2 or more, so that a damaged file has a predecessor")


@dataclass(frozen=True)
class SparsityConfig:
    """Settings of the sparsity of the weights.

    Args:
        method: none; dynamic (train the weights under masks that move; includes coarse pruning); semi_structured (learn 2:4
            masks while the weights, from model.weights or model.pretrained, stay frozen); or 2:4, the old name of
            semi_structured
        dynamic: dynamic sparse training (sparsity.method dynamic)
        semi_structured: learned 2:4 masks (sparsity.method semi_structured)
        masks: file of masks to start from (only with sparsity.method dynamic)
    """

    method: Literal["none", "dynamic", "semi_structured", "2:4"] = "none"
    dynamic: DynamicSparsityConfig = field(default_factory=DynamicSparsityConfig)
    semi_structured: SemiStructuredConfig = field(default_factory=lambda: SemiStructuredConfig(method="learned"))
    masks: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", current_name("sparsity.method", self.method))
        methods = ("none", "dynamic", SEMI_STRUCTURED)
        require_one_of("sparsity.method", self.method, methods)
        if self.masks is not None and self.method != "dynamic":
            raise ConfigError(f"sparsity.masks is set, but sparsity.method is {self.method!r}: use method dynamic.")
        if self.method == SEMI_STRUCTURED and self.semi_structured.method != "learned":
            raise ConfigError(
                f"sparsity.semi_structured.method is {self.semi_structured.method!r}, which needs no training: use "
                "`widekernel sparsify`; to train further, use --sparsity.method dynamic, .init from_weights and "
                ".block semi_structured."
            )


def check_averaging(config: SparsityConfig, decay: float | None, evaluated: str = "both") -> None:
    """Raise a `ConfigError` if weights that do not change would be averaged, or an average be evaluated that does not exist.

    Args:
        config: settings of the sparsity.
        decay: ema.decay.
        evaluated: evaluation.weights.
    """
    if evaluated == "ema" and decay is None:
        raise ConfigError("evaluation.weights is 'ema', but nothing is averaged: set ema.decay, such as 0.9999, or use raw.")
    if config.method == SEMI_STRUCTURED and decay is not None:
        raise ConfigError(f"ema.decay is {decay}, but weights do not change while 2:4 masks are learned: set it to null.")


@dataclass(frozen=True)
class TrainingConfig:
    """Settings that the training loop uses."""

    seed: int
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    ema: EmaConfig
    loop: LoopConfig
    checkpoint: CheckpointConfig
    max_unreadable: int
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Which weights are evaluated, by the prefix of their metrics: "" and "ema_"; the last decides what is the best."""
        if self.ema.decay is None:
            return ("",)
        return {"both": ("", "ema_"), "raw": ("",), "ema": ("ema_",)}[self.evaluation.weights]


Metrics = dict[str, Any]
"""Results of one evaluation: plain numbers by name."""
