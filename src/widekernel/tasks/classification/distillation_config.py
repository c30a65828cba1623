"""Settings of knowledge distillation."""

from dataclasses import dataclass, field
from typing import Any, Literal

from widekernel.errors import ConfigError
from widekernel.settings import require, require_finite, require_literals


@dataclass(frozen=True)
class TeacherConfig:
    """Settings of the network from which another one learns.

    Args:
        weights: run folder, model file or checkpoint of the teacher
        averaged: use the averaged weights instead of the last ones
        name: model name, for a checkpoint that does not state its model, or with distillation.teacher.pretrained
        args: arguments of that model
        num_classes: outputs of that model; null keeps its own number
        pretrained: use timm's pretrained weights for distillation.teacher.name
    """

    weights: str | None = None
    averaged: bool = False
    name: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    pretrained: bool = False

    def __post_init__(self) -> None:
        if self.pretrained and self.weights is not None:
            raise ConfigError("distillation.teacher.pretrained and .weights are both set; choose one of them.")
        if self.pretrained and self.name is None:
            raise ConfigError("distillation.teacher.pretrained is true, but distillation.teacher.name is not set.")
        if self.pretrained and self.averaged:
            raise ConfigError("distillation.teacher.averaged applies to distillation.teacher.weights, which is not set.")
        ok = self.num_classes is None or self.num_classes > 0
        require(ok, "distillation.teacher.num_classes", self.num_classes, "positive")


@dataclass(frozen=True)
class DistillationConfig:
    """Settings of knowledge distillation: the network also learns from the outputs of a trained one, the teacher.

    The teacher sees the same augmented and mixed images, in evaluation mode and without gradients.

    Args:
        kind: none; kd (alpha times the divergence from the teacher's softened probabilities, and 1 - alpha times the
            cross-entropy); kd_hard (half the cross-entropy with the teacher's classes, and half that with the labels);
            nkd (normalized: the teacher's certainty of the right class, and its probabilities among the others); or feature
            (only the features in front of the classifier, and the cross-entropy)
        teacher: the trained network
        temperature: number by which logits are divided before they become probabilities (kd, nkd)
        alpha: weight of the teacher (kd, where null means 0.1), or of the probabilities of the other classes (nkd, where
            null means 1)
        feature_weight: weight of the difference between the teacher's features and a learned linear projection of the
            network's, which any kind adds; 0 leaves it out
        feature_loss: smooth_l1, which is linear for differences of more than 2, or mse
    """

    kind: Literal["none", "kd", "kd_hard", "nkd", "feature"] = "none"
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    temperature: float = 1.0
    alpha: float | None = None
    feature_weight: float = 0.0
    feature_loss: Literal["smooth_l1", "mse"] = "smooth_l1"

    def __post_init__(self) -> None:
        require_finite(self, "distillation")
        require_literals(self, "distillation")
        require(self.temperature > 0, "distillation.temperature", self.temperature, "positive")
        require(self.feature_weight >= 0, "distillation.feature_weight", self.feature_weight, "0 or more")
        ok = self.alpha is None or (0 <= self.alpha <= 1 if self.kind == "kd" else self.alpha >= 0)
        require(ok, "distillation.alpha", self.alpha, "from 0 to 1" if self.kind == "kd" else "0 or more")
        self._check_use()

    @property
    def is_on(self) -> bool:
        """Whether there is a teacher."""
        return self.kind != "none"

    @property
    def weight(self) -> float:
        """The value of `alpha`, where `null` is the default of the kind."""
        return {"kd": 0.1}.get(self.kind, 1.0) if self.alpha is None else self.alpha

    def _check_use(self) -> None:
        """Raise a `ConfigError` for a setting that the kind does not use, or lacks."""
        teacher = self.teacher
        if self.is_on and teacher.weights is None and not teacher.pretrained:
            raise ConfigError(
                f"distillation.kind is {self.kind!r}, but there is no teacher: set distillation.teacher.weights to a run "
                "folder or checkpoint, or distillation.teacher.name and .pretrained."
            )
        if not self.is_on and (teacher != TeacherConfig() or self.feature_weight):
            what = "feature_weight" if self.feature_weight else "teacher"
            raise ConfigError(
                f"distillation.{what} is set, but distillation.kind is 'none': set it to kd, kd_hard, nkd or feature."
            )
        if self.kind == "feature" and not self.feature_weight:
            raise ConfigError("distillation.kind is 'feature', but distillation.feature_weight is 0: set it, such as to 1.")
        if self.temperature != 1 and self.kind not in ("kd", "nkd"):
            raise ConfigError(f"distillation.temperature is {self.temperature}, but {self.kind!r} has none: leave it out.")
        if self.alpha is not None and self.kind not in ("kd", "nkd"):
            raise ConfigError(f"distillation.alpha is {self.alpha}, but {self.kind!r} has none: leave it out.")
