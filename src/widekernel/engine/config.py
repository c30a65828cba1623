"""Settings of the optimizer, schedule, averaging, precision, checkpoints and sparsity."""

from dataclasses import dataclass, field
from typing import Any, Literal

from widekernel.engine.logging_config import LoggingConfig
from widekernel.engine.write_policy import OnFailure
from widekernel.errors import ConfigError
from widekernel.settings import require, require_finite, require_literals, require_one_of
from widekernel.sparsity import DynamicSparsityConfig
from widekernel.sparsity.semi_structured.config import SEMI_STRUCTURED, SemiStructuredConfig, current_name


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer, which timm's `create_optimizer_v2` creates.

    Weight decay does not apply to biases, to other 1-D parameters, or to the parameters that the model excludes from it.

    Args:
        name: name of an optimizer in timm
        lr: peak learning rate
        weight_decay: decoupled weight decay
        eps: term added to the denominator for numerical stability; null uses the optimizer's default
        betas: decay rates of the running averages (Adam's betas); null uses the optimizer's default
        layer_decay: factor by which the learning rate falls from one layer group to the next, counted from the head; null
            means the same rate for all
        clip_grad: limit for gradient clipping; null turns clipping off
        clip_mode: what clip_grad limits: the norm of all gradients (norm), each value (value), or the norm of each unit's
            gradient relative to that of its weights (agc)
    """

    name: str = "adamw"
    lr: float = 4e-3
    weight_decay: float = 0.05
    eps: float | None = None
    betas: tuple[float, float] | None = None
    layer_decay: float | None = None
    clip_grad: float | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"

    def __post_init__(self) -> None:
        require_finite(self, "optimizer")
        require_literals(self, "optimizer")
        require(self.lr > 0, "optimizer.lr", self.lr, "positive")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(self.eps is None or self.eps > 0, "optimizer.eps", self.eps, "positive")
        ok = self.betas is None or all(0 <= beta < 1 for beta in self.betas)
        require(ok, "optimizer.betas", self.betas, "two numbers from 0 to below 1")
        ok = self.layer_decay is None or 0 < self.layer_decay <= 1
        require(ok, "optimizer.layer_decay", self.layer_decay, "above 0 and at most 1")
        require(self.clip_grad is None or self.clip_grad > 0, "optimizer.clip_grad", self.clip_grad, "positive")
        if self.clip_grad is None and self.clip_mode != "norm":
            raise ConfigError(f"optimizer.clip_mode is {self.clip_mode!r}, but nothing is clipped: set optimizer.clip_grad.")


@dataclass(frozen=True)
class ScheduleConfig:
    """Settings of the length of the run and of the learning rate, which is set at every optimizer step.

    The learning rate follows a linear warm-up, then half a cosine. Lengths are in epochs or, if set, in optimizer steps.

    Args:
        epochs: passes over the training data
        steps: optimizer steps of the whole run; null means schedule.epochs
        warmup_epochs: epochs of linear warm-up, included in schedule.epochs
        warmup_steps: optimizer steps of linear warm-up; null means schedule.warmup_epochs
        warmup_lr: learning rate at the first step of the warm-up
        min_lr: learning rate at the end of the run
    """

    epochs: int = 300
    steps: int | None = None
    warmup_epochs: float = 20
    warmup_steps: int | None = None
    warmup_lr: float = 0.0
    min_lr: float = 1e-6

    def __post_init__(self) -> None:
        require_finite(self, "schedule")
        require(self.epochs > 0, "schedule.epochs", self.epochs, "positive")
        require(self.steps is None or self.steps > 0, "schedule.steps", self.steps, "positive")
        if self.warmup_steps is not None:
            ok = self.warmup_steps >= 0 and (self.steps is None or self.warmup_steps < self.steps)
            rule = "0 or more" if self.steps is None else f"from 0 to below schedule.steps ({self.steps})"
            require(ok, "schedule.warmup_steps", self.warmup_steps, rule)
        elif self.steps is None:
            ok = 0 <= self.warmup_epochs < self.epochs
            require(ok, "schedule.warmup_epochs", self.warmup_epochs, f"from 0 to below schedule.epochs ({self.epochs})")
        require(self.warmup_epochs >= 0, "schedule.warmup_epochs", self.warmup_epochs, "0 or more")
        require(self.warmup_lr >= 0, "schedule.warmup_lr", self.warmup_lr, "0 or more")
        require(self.min_lr >= 0, "schedule.min_lr", self.min_lr, "0 or more")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps of the whole run."""
        return self.epochs * steps_per_epoch if self.steps is None else self.steps

    def warmup(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps of the warm-up; at least one step of the run remains after it."""
        wanted = round(self.warmup_epochs * steps_per_epoch) if self.warmup_steps is None else self.warmup_steps
        return min(wanted, self.total_steps(steps_per_epoch) - 1)


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
        eval_batch_size: images per forward pass in evaluation; null means 1.5 times those in training
        precision: fp32, or mixed precision (autocast) with bf16 or, on CUDA only, fp16
        device: auto (CUDA if available), cpu, cuda or cuda:N
        channels_last: use the channels-last memory format
        compile: mode of torch.compile: default, reduce-overhead (CUDA graphs) or max-autotune; null does not compile
        sync_batch_norm: compute batch norms over the images of all processes
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
    sync_batch_norm: bool = True
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


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of when the network is evaluated; it always is at the end of the run.

    Args:
        every_epochs: epochs between evaluations
        every_steps: optimizer steps between evaluations; null means evaluation.every_epochs
    """

    every_epochs: int = 1
    every_steps: int | None = None

    def __post_init__(self) -> None:
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


def check_averaging(config: SparsityConfig, decay: float | None) -> None:
    """Raise a `ConfigError` if a moving average is configured for weights that do not change."""
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


Metrics = dict[str, Any]
"""Results of one evaluation: plain numbers by name."""
