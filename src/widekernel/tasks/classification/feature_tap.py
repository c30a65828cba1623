"""Access to the features that a network's classifier receives."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from widekernel.tasks.assembly import classifier_of


class FeatureTap:
    """Keeps the features in front of the classifier of each forward pass, until they are taken.

    Args:
        model: network with timm's `get_classifier()`, which returns a linear layer
        only_in_training: ignore forward passes in evaluation mode

    Raises:
        ConfigError: the network has no such classifier.
    """

    def __init__(self, model: nn.Module, only_in_training: bool) -> None:
        classifier: Any = classifier_of(model, "distillation.feature_weight", (nn.Linear,))
        self.width = classifier.in_features
        self._only_in_training = only_in_training
        self._features: Tensor | None = None
        classifier.register_forward_pre_hook(self._keep)

    def take(self) -> Tensor:
        """Return the features `(n, width)` of the last forward pass, which are forgotten then."""
        features, self._features = self._features, None
        assert features is not None, "the network did not call its classifier"
        return features

    def _keep(self, classifier: nn.Module, inputs: tuple[Any, ...]) -> None:
        if classifier.training or not self._only_in_training:
            self._features = inputs[0]
