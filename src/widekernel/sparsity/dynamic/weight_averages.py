"""Moving averages of the weights, kept as sparse as the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from widekernel.errors import ArgumentError
from widekernel.layers.wrappers import unwrap
from widekernel.sparsity.dynamic.state import MaskState


class WeightAverages:
    """Averages of the masked parameters.

    Args:
        networks: the networks that hold the averages.
        state: the masks.

    Attributes:
        weights: for each network, its averages by parameter name.

    Raises:
        ArgumentError: a network lacks one of the parameters.
    """

    def __init__(self, networks: Sequence[nn.Module], state: MaskState) -> None:
        self._networks, self._state = list(networks), state
        self.weights: list[dict[str, nn.Parameter]] = []
        self.refresh()

    def refresh(self) -> None:
        """Look the averages up again, because loading may have replaced them."""
        self.weights = [_averages_in(network, self._state.parameters) for network in self._networks]

    @torch.no_grad()
    def mask(self, kept: Mapping[str, Tensor]) -> None:
        """Set averages to zero where `kept` (parameter name -> bool) is False."""
        for weights in self.weights:
            for name, keep in kept.items():
                weights[name].mul_(keep.to(weights[name].device))

    @torch.no_grad()
    def start_fresh(self) -> None:
        """Set the averages of weights that grew at the last update to the values that the first step gave them."""
        for weights in self.weights:
            for name, parameter in self._state.parameters.items():
                values = weights[name]  # may be on another device
                if self._state.config.rule == "published":
                    mask = self._state.masks[name].to(values.device)
                    values.mul_(mask)
                    values.copy_(torch.where(mask & (values == 0), parameter.to(values), values))
                elif name in self._state.fresh:
                    values.copy_(torch.where(self._state.fresh[name].to(values.device), parameter.to(values), values))


def _averages_in(network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the averages that a network holds now, by parameter name.

    Raises:
        ArgumentError: the network lacks one of them.
    """
    inner = network if hasattr(network, "update_parameters") or hasattr(network, "update") else None
    found = dict(unwrap(inner.module if inner is not None else network).named_parameters())  # type: ignore[arg-type]
    for name, parameter in parameters.items():
        if name not in found or found[name].shape != parameter.shape:
            raise ArgumentError(f"averages: {type(network).__name__} has no {name} of shape {tuple(parameter.shape)}")
    return {name: found[name] for name in parameters}
