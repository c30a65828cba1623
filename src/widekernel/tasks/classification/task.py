"""Image classification as a task of the engine."""

from __future__ import annotations

from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from widekernel.data import AugmentConfig, Batch
from widekernel.data.mixing import GroupMixup
from widekernel.engine.task import Position
from widekernel.tasks.classification.evaluation import METRICS, Accuracy
from widekernel.tasks.run_parts import RunTask


class Classification(RunTask):
    """Cross-entropy with smoothed and possibly mixed targets; top-1, top-5 and cross-entropy on held-out images.

    Args:
        augment: settings of mixup and cutmix
        label_smoothing: share of the target that is spread evenly over all classes
        num_classes: outputs of the network
    """

    metrics = METRICS

    def __init__(self, augment: AugmentConfig, label_smoothing: float, num_classes: int) -> None:
        self.label_smoothing = label_smoothing
        self.mixup: GroupMixup | None = None
        if augment.mixes:
            mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.switch_prob,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
            self.mixup = GroupMixup(mixup)

    @override
    def loss(self, model: nn.Module, batch: Batch, position: Position) -> dict[str, Tensor]:
        images, targets = self.mixed(batch, position)
        return {"cross_entropy": self.cross_entropy(model(images), targets)}

    def mixed(self, batch: Batch, position: Position) -> tuple[Tensor, Tensor]:
        """Return the images of a batch and their targets: class indices `(n,)`, or probabilities if images are mixed."""
        images, targets = batch.content
        if self.mixup is None:
            return images, targets
        return self.mixup(images, targets, seed=position.seed, step=position.step, first=position.first)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of logits `(n, classes)` with what `mixed` returned, smoothed."""
        smoothing = self.label_smoothing if targets.dim() == 1 else 0.0  # mixup smooths its probabilities itself
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    @override
    def example(self, batch: Batch) -> Tensor:
        return batch.content[0]  # type: ignore[no-any-return]

    @override
    def evaluator(self) -> Accuracy:
        return Accuracy()
