"""Moving averages of the weights, which are kept as sparse as the weights are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from widekernel.sparsity.init import averaged_weights
from widekernel.sparsity.state import MaskState


class Averages:
    """The averaged weights that belong to masked parameters.

    Args:
        networks: that hold them.
        state: the masks.

    Raises:
        ArgumentError: a network lacks one of the parameters.
    """

    def __init__(self, networks: Sequence[nn.Module], state: MaskState) -> None:
        self._networks, self._state = list(networks), state
        self.weights: list[dict[str, nn.Parameter]] = []
        self.find()

    def find(self) -> None:
        """Look the averaged weights up again: loading may have replaced them."""
        self.weights = [averaged_weights(network, self._state.parameters) for network in self._networks]

    @torch.no_grad()
    def clear(self, kept: Mapping[str, Tensor]) -> None:
        """Set averages to zero where `kept` (parameter name -> bool) is False."""
        for weights in self.weights:
            for name, keep in kept.items():
                weights[name].mul_(keep.to(weights[name].device))

    @torch.no_grad()
    def start(self) -> None:
        """Let averages of weights that grew at the last update begin at their first value that is not zero."""
        for weights in self.weights:
            for name, parameter in self._state.parameters.items():
                values = weights[name]  # may be on another device
                if self._state.config.rule == "published":
                    mask = self._state.masks[name].to(values.device)
                    values.mul_(mask)
                    values.copy_(torch.where(mask & (values == 0), parameter.to(values), values))
                elif name in self._state.fresh:
                    values.copy_(torch.where(self._state.fresh[name].to(values.device), parameter.to(values), values))
