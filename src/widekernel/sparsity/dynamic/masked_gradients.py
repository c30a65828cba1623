"""Masked gradients of a step, with a dense copy if weights grow by their gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from widekernel.sparsity.dynamic.rules import published
from widekernel.sparsity.dynamic.state import MaskState


class MaskedGradients:
    """Gradients of the masked parameters.

    Args:
        state: the masks.

    Attributes:
        momentum: running mean of the dense gradients, by parameter name (`growth="momentum"`).
    """

    def __init__(self, state: MaskState) -> None:
        self._state = state
        self._dense: dict[str, Tensor] | None = None
        self.momentum: dict[str, Tensor] = {}

    @property
    def now(self) -> dict[str, Tensor]:
        """The gradients of the parameters that have one, by parameter name."""
        return {name: p.grad for name, p in self._state.parameters.items() if p.grad is not None}

    @torch.no_grad()
    def mask(self) -> None:
        """Set gradients outside the masks to zero."""
        for name, gradient in self.now.items():
            gradient.mul_(self._state.masks[name])

    def store_dense(self, step: int, scale: Tensor | None) -> None:
        """Store the dense gradients if this step needs them.

        Args:
            step: number of the step that is about to be made, from 1.
            scale: loss scale of the gradients of a fused optimizer, which differs between steps; None without one.
        """
        config = self._state.config
        if config.growth == "momentum" or (config.growth == "gradient" and config.is_due(step)):
            self._dense = {n: value.clone() if scale is None else value / scale for n, value in self.now.items()}

    @property
    def has_dense(self) -> bool:
        """Whether dense gradients are stored; then those of the parameters are masked already."""
        return self._dense is not None

    def drop_dense(self) -> None:
        """Drop the dense gradients, after their step or because new ones follow."""
        self._dense = None

    def update_momentum(self) -> None:
        """Update the running mean of the dense gradients."""
        config = self._state.config
        if config.rule == "published" or config.growth != "momentum":
            return
        for name, gradient in (self._dense or {}).items():
            mean = self.momentum[name].to(gradient) if name in self.momentum else torch.zeros_like(gradient)
            self.momentum[name] = mean.lerp_(gradient, 1 - config.momentum)

    def growth_scores(self, optimizer: Optimizer) -> dict[str, Tensor] | None:
        """Return the scores by which weights grow, by parameter name; None if they grow at random."""
        config, parameters = self._state.config, self._state.parameters
        if config.growth in ("random", "none"):
            return None
        found: dict[str, Tensor | None]
        if config.rule == "exact":
            chosen = self.momentum if config.growth == "momentum" else self._dense or {}
            found = {name: chosen.get(name) for name in parameters}
        elif config.growth == "momentum":
            found = {name: published.momentum_scores(optimizer, parameter) for name, parameter in parameters.items()}
        else:
            found = {name: parameter.grad for name, parameter in parameters.items()}
        # A parameter that did not contribute to the loss has no gradient; all its weights get the same score.
        return {name: torch.zeros_like(parameters[name]) if value is None else value for name, value in found.items()}
