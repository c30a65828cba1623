"""Settings of the optimizer, and of the length and learning rate of a run."""

from dataclasses import dataclass
from typing import Literal

from widekernel.errors import ConfigError
from widekernel.settings import require, require_finite, require_literals

LayerGroups = Literal["blocks", "convnext12", "stage_wise6", "stage_wise12", "layer_wise6", "layer_wise9", "layer_wise12"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer, which timm's `create_optimizer_v2` creates.

    Weight decay does not apply to biases, to other 1-D parameters, or to the parameters that the model excludes from it,
    unless a setting below says so.

    Args:
        name: name of an optimizer in timm, such as adamw, sgd (with Nesterov's momentum), momentum (without) or rmsprop
        lr: peak learning rate
        momentum: momentum of optimizers that have one, such as sgd and rmsprop; null means 0.9
        weight_decay: weight decay
        weight_decay_end: weight decay at the end of the run, to which it goes from weight_decay along half a cosine, step by
            step; null keeps it constant
        norm_weight_decay: constant weight decay of the parameters of norms; null does not decay them
        bias_weight_decay: constant weight decay of all biases, those of norms included; null does not decay them
        decay_response_norms: decay the vectors of response norms (Shift-wise, UniRepLKNet), too, as the official code does
        eps: term added to the denominator for numerical stability; null uses the optimizer's default
        betas: decay rates of the running averages (Adam's betas); null uses the optimizer's default
        layer_decay: factor by which the learning rate falls from one layer group to the next, counted from the head; null
            means the same rate for all
        layer_groups: layer groups of layer_decay: one for each block and for each stage's downsampling, as in timm (blocks);
            the twelve of the published fine-tuning recipes of ConvNeXt and RepLKNet, besides stem and head (convnext12); or
            those of the published segmentation (stage_wise6, stage_wise12) and detection runs (layer_wise6, layer_wise9,
            layer_wise12) of networks built like ConvNeXt, whose heads learn at the full rate
        decayed: what weight_decay applies to: weights (of two or more dimensions), or all_but_batch_norms, as in the
            published segmentation and detection runs of RepLKNet, where biases, layer scales and layer norms decay, too
        clip_grad: limit for gradient clipping; null turns clipping off
        clip_mode: what clip_grad limits: the norm of all gradients (norm), each value (value), or the norm of each unit's
            gradient relative to that of its weights (agc)
    """

    name: str = "adamw"
    lr: float = 4e-3
    momentum: float | None = None
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    norm_weight_decay: float | None = None
    bias_weight_decay: float | None = None
    decay_response_norms: bool = False
    eps: float | None = None
    betas: tuple[float, float] | None = None
    layer_decay: float | None = None
    layer_groups: LayerGroups = "blocks"
    decayed: Literal["weights", "all_but_batch_norms"] = "weights"
    clip_grad: float | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"

    def __post_init__(self) -> None:
        require_finite(self, "optimizer")
        require_literals(self, "optimizer")
        require(self.lr > 0, "optimizer.lr", self.lr, "positive")
        ok = self.momentum is None or 0 <= self.momentum < 1
        require(ok, "optimizer.momentum", self.momentum, "from 0 to below 1")
        for key in ("weight_decay", "weight_decay_end", "norm_weight_decay", "bias_weight_decay"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"optimizer.{key}", value, "0 or more")
        require(self.eps is None or self.eps > 0, "optimizer.eps", self.eps, "positive")
        ok = self.betas is None or all(0 <= beta < 1 for beta in self.betas)
        require(ok, "optimizer.betas", self.betas, "two numbers from 0 to below 1")
        ok = self.layer_decay is None or 0 < self.layer_decay <= 1
        require(ok, "optimizer.layer_decay", self.layer_decay, "above 0 and at most 1")
        require(self.clip_grad is None or self.clip_grad > 0, "optimizer.clip_grad", self.clip_grad, "positive")
        self._check_dependent()

    def _check_dependent(self) -> None:
        """Raise a `ConfigError` for a setting that has no effect without another one."""
        if self.clip_grad is None and self.clip_mode != "norm":
            raise ConfigError(f"optimizer.clip_mode is {self.clip_mode!r}, but nothing is clipped: set optimizer.clip_grad.")
        if self.layer_decay is None and self.layer_groups != "blocks":
            raise ConfigError(
                f"optimizer.layer_groups is {self.layer_groups!r}, but all layers have the same rate: set "
                "optimizer.layer_decay, such as 0.8."
            )
        if self.decayed != "weights":
            for key in ("norm_weight_decay", "bias_weight_decay", "decay_response_norms"):
                if getattr(self, key) is not None and getattr(self, key) is not False:
                    raise ConfigError(
                        f"optimizer.{key} is {getattr(self, key)!r}, but optimizer.decayed {self.decayed!r} decides what "
                        "decays: leave one of them out."
                    )
        for key in ("weight_decay_end", "decay_response_norms"):
            if getattr(self, key) and not self.weight_decay:
                raise ConfigError(
                    f"optimizer.{key} is {getattr(self, key)!r}, but optimizer.weight_decay is 0, so nothing decays: set it."
                )


@dataclass(frozen=True)
class ScheduleConfig:
    """Settings of the length of the run and of the learning rate, which is set at every optimizer step.

    The learning rate follows a warm-up and then, by default, half a cosine. Lengths are in epochs or, if set, in optimizer
    steps.

    Args:
        epochs: passes over the training data
        steps: optimizer steps of the whole run; null means schedule.epochs
        kind: course of the learning rate after the warm-up: half a cosine down to min_lr (cosine), a power of the remaining
            share of the steps (poly), times gamma after each of schedule.milestones (multistep), or every decay_epochs at
            once (step) or gradually (exponential), or none (constant)
        decay_epochs: epochs in which kinds step and exponential multiply the learning rate by gamma
        gamma: factor of kinds step, multistep and exponential
        milestones: epochs of the run after each of which kind multistep multiplies the learning rate by gamma
        power: exponent of kind poly; 1 is a straight line down to min_lr
        warmup_epochs: epochs of the warm-up, included in schedule.epochs
        warmup_steps: optimizer steps of the warm-up; null means schedule.warmup_epochs
        warmup_kind: linear rises from warmup_lr to the peak, which the first step after the warm-up has; linspace, the form
            of the published recipes, reaches the peak with the last step of the warm-up; constant stays at warmup_lr
        warmup_lr: learning rate at the first step of the warm-up
        warmup_factor: factor at the first step of the warm-up, such as 1e-6, by which it multiplies the course of the
            learning rate, which then begins with the run. It rises to 1 (warmup_kind linear) or stays (constant). null means
            that the warm-up is a course of its own, from warmup_lr to the peak
        min_lr: learning rate at the end of kinds cosine and poly; the other kinds but constant do not fall below it
        lr_scale_batch: batch size for which optimizer.lr is meant; it is scaled linearly to loop.batch_size. null does not
            scale. The other rates are not scaled
    """

    epochs: int = 300
    steps: int | None = None
    kind: Literal["cosine", "step", "exponential", "constant", "poly", "multistep"] = "cosine"
    decay_epochs: float = 30.0
    gamma: float = 0.1
    milestones: tuple[float, ...] = ()
    power: float = 1.0
    warmup_epochs: float = 20
    warmup_steps: int | None = None
    warmup_kind: Literal["linear", "constant", "linspace"] = "linear"
    warmup_lr: float = 0.0
    warmup_factor: float | None = None
    min_lr: float = 1e-6
    lr_scale_batch: int | None = None

    def __post_init__(self) -> None:
        require_finite(self, "schedule")
        require_literals(self, "schedule")
        require(self.epochs > 0, "schedule.epochs", self.epochs, "positive")
        require(self.steps is None or self.steps > 0, "schedule.steps", self.steps, "positive")
        require(self.decay_epochs > 0, "schedule.decay_epochs", self.decay_epochs, "positive")
        require(0 < self.gamma <= 1, "schedule.gamma", self.gamma, "above 0 and at most 1")
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
        ok = self.lr_scale_batch is None or self.lr_scale_batch > 0
        require(ok, "schedule.lr_scale_batch", self.lr_scale_batch, "positive")
        self._check_course()
        self._check_warmup()

    def _check_course(self) -> None:
        """Raise a `ConfigError` for a course without the settings that it needs, or with those of another one."""
        require(self.power > 0, "schedule.power", self.power, "positive")
        if self.power != 1 and self.kind != "poly":
            raise ConfigError(f"schedule.power is {self.power}, but schedule.kind is {self.kind!r}: set it to poly.")
        pairs = zip((0.0, *self.milestones), self.milestones)
        ok = all(earlier < later for earlier, later in pairs)
        require(ok, "schedule.milestones", self.milestones, "epochs above 0, each later than the one before")
        if self.kind == "multistep" and not self.milestones:
            raise ConfigError("schedule.kind is 'multistep', but schedule.milestones is empty: set it, such as to [8, 11].")
        if self.kind == "multistep" and self.steps is None and self.milestones[-1] >= self.epochs:
            raise ConfigError(
                f"schedule.milestones is {list(self.milestones)}, but schedule.epochs is {self.epochs}, so the run ends "
                "before the last one: choose earlier ones, or more epochs."
            )

    def _check_warmup(self) -> None:
        """Raise a `ConfigError` for a warm-up that trains nothing, or whose settings exclude each other."""
        factor, has_warmup = self.warmup_factor, self.warmup_epochs or self.warmup_steps
        if factor is None:
            if self.warmup_kind == "constant" and self.warmup_lr == 0 and has_warmup:
                raise ConfigError(
                    "schedule.warmup_kind is 'constant', but schedule.warmup_lr is 0, so the warm-up would train nothing: "
                    "set it, such as to a hundredth of optimizer.lr."
                )
            return
        require(0 < factor <= 1, "schedule.warmup_factor", factor, "above 0 and at most 1")
        other = {"warmup_lr": self.warmup_lr != 0, "warmup_kind": self.warmup_kind == "linspace"}
        for key in (key for key, wrong in other.items() if wrong):
            raise ConfigError(
                f"schedule.{key} is {getattr(self, key)!r}, which schedule.warmup_factor ({factor:g}) excludes: leave one "
                "of them out."
            )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps of the whole run."""
        return self.epochs * steps_per_epoch if self.steps is None else self.steps

    def warmup(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps of the warm-up; at least one step of the run remains after it."""
        wanted = round(self.warmup_epochs * steps_per_epoch) if self.warmup_steps is None else self.warmup_steps
        return min(wanted, self.total_steps(steps_per_epoch) - 1)

    def scaled(self, lr: float, batch_size: int) -> float:
        """Return the peak learning rate for steps of `batch_size` images, from `lr`, which is optimizer.lr."""
        return lr if self.lr_scale_batch is None else lr * batch_size / self.lr_scale_batch
