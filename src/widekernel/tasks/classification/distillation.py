"""Knowledge distillation as a task of the engine: classification that also learns from a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from widekernel.data import AugmentConfig, Batch
from widekernel.data.seeding import MODEL_STREAM, scoped_seed
from widekernel.engine.task import Position
from widekernel.tasks.classification.distillation_config import DistillationConfig
from widekernel.tasks.classification.distillation_losses import (
    divergence,
    feature_loss,
    hard_label_loss,
    normalized_loss,
)
from widekernel.tasks.classification.feature_tap import FeatureTap
from widekernel.tasks.classification.task import Classification
from widekernel.tasks.classification.teacher import Teacher
from widekernel.tasks.saved import PROJECTION


class Distillation(Classification):
    """Classification with losses of knowledge distillation; the evaluation is that of a classification.

    Args:
        augment: settings of mixup and cutmix
        label_smoothing: share of the target that is spread evenly over all classes
        num_classes: outputs of the network
        config: settings of the distillation
        teacher: the trained network, on the device of the student
    """

    def __init__(
        self, augment: AugmentConfig, label_smoothing: float, num_classes: int, config: DistillationConfig, teacher: Teacher
    ) -> None:
        super().__init__(augment, label_smoothing, num_classes)
        self.config, self.teacher = config, teacher
        self._tap: FeatureTap | None = None
        self._projection: nn.Linear | None = None

    @property
    @override
    def digests(self) -> dict[str, str]:
        return {"digest of the teacher": self.teacher.digest}

    @override
    def to(self, device: torch.device, memory_format: torch.memory_format) -> None:
        self.teacher.to(device, memory_format)

    @override
    def prepare(self, network: nn.Module, seed: int) -> None:
        """Add the projection of features to the network if they are compared; training states contain it.

        Raises:
            ConfigError: a network has no linear classifier.
        """
        if not self.config.feature_weight:
            return
        self._tap = FeatureTap(network, only_in_training=True)
        with scoped_seed(MODEL_STREAM, seed, 1):
            self._projection = nn.Linear(self._tap.width, self.teacher.tap_features())
        network.add_module(PROJECTION, self._projection)

    @override
    def finish(self, network: nn.Module) -> None:
        if PROJECTION in dict(network.named_children()):
            delattr(network, PROJECTION)

    @override
    def loss(self, model: nn.Module, batch: Batch, position: Position) -> dict[str, Tensor]:
        images, targets = self.mixed(batch, position)
        theirs, features = self.teacher(images)
        ours = model(images)
        losses = self._logit_losses(ours, theirs, targets)
        if self._tap is not None:
            assert self._projection is not None
            assert features is not None
            difference = self._feature_loss(self._projection(self._tap.take()), features)
            losses["features"] = self.config.feature_weight * difference
        return losses

    def _logit_losses(self, ours: Tensor, theirs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the losses of the configured kind.

        Args:
            ours: logits of the student `(n, classes)`.
            theirs: logits of the teacher, of the same shape.
            targets: class indices `(n,)`, or probabilities `(n, classes)`.
        """
        config = self.config
        if config.kind == "nkd":
            labels = targets if targets.dim() == 1 else targets.argmax(dim=1)
            right, others = normalized_loss(ours, theirs, labels, config.temperature, config.weight)
            return {"right_class": right, "other_classes": others}
        own = self.cross_entropy(ours, targets)
        if config.kind == "feature":
            return {"cross_entropy": own}
        if config.kind == "kd_hard":
            return {"cross_entropy": 0.5 * own, "teacher": 0.5 * hard_label_loss(ours, theirs)}
        weight = config.weight
        return {
            "cross_entropy": (1 - weight) * own,
            "teacher": weight * divergence(ours, theirs, config.temperature),
        }

    def _feature_loss(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if self.config.feature_loss == "mse":
            return F.mse_loss(ours.float(), theirs.float())
        return feature_loss(ours, theirs)
