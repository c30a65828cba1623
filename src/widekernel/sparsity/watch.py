"""Looks between the steps at what others did to a masked network: replaced, overwritten or lost weights are errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from widekernel.errors import ArgumentError, CheckpointError
from widekernel.sparsity.selection import SPREAD, is_spread
from widekernel.sparsity.state import MaskState

# Shares of live weights that may be zero for other reasons: rounding to a narrower type, and weights that were drawn so.
_ROUNDED, _DRAWN = 0.01, 0.05


class Watch:
    """Compares a network with what its masks were made for.

    Args:
        model: the network, unwrapped.
        state: its masks.
    """

    def __init__(self, model: nn.Module, state: MaskState) -> None:
        self._model, self._state = model, state
        self._versions: dict[str, tuple[int, int]] = {}

    def note(self) -> None:
        """Take the weights as they are now for those that a step left."""
        self._versions = {name: _version(parameter) for name, parameter in self._state.parameters.items()}

    def written(self) -> list[str]:
        """Name the parameters that were written to since `note`, or whose memory is another.

        Writes into `parameter.data` are in no count: those are found at the next update.
        """
        return [n for n, parameter in self._state.parameters.items() if self._versions.get(n) != _version(parameter)]

    def check_attached(self) -> None:
        """Raise an `ArgumentError` if the network holds another parameter than the one that a mask was made for."""
        now = dict(self._model.named_parameters())
        lost = [name for name, parameter in self._state.parameters.items() if now.get(name) is not parameter]
        if not lost:
            return
        if is_spread(now.get(lost[0])):
            raise ArgumentError(f"{lost[0]} is now {SPREAD}")
        raise ArgumentError(
            f"{lost[0]} is no longer the parameter that its mask was made for: change weights in place (load_state_dict "
            "without assign=True), or make a new optimizer and a new DynamicSparsity after replacing parts of the network"
        )

    @torch.no_grad()
    def check_outside(self, names: Iterable[str]) -> None:
        """Raise an `ArgumentError` if weights of these parameters live outside their masks."""
        found = {}
        for name in names:
            weight, mask = self._state.parameters[name].detach(), self._state.masks[name]
            if count := int(torch.count_nonzero(weight * ~mask.to(weight.device))):
                found[name] = count
        if found:
            first = next(iter(found))
            raise ArgumentError(
                f"{sum(found.values())} weights live outside the masks of {len(found)} parameters ({found[first]} in "
                f"{first}): something other than the steps of the controller's optimizer has written to them, such as a "
                "checkpoint, an average or another optimizer. Load the controller's state with the weights, or make the "
                "controller after loading them; where they may go, call apply_masks()"
            )

    def live_zeros(self) -> dict[str, int]:
        """Count the live weights of every parameter that are zero."""
        return {
            name: int(self._state.masks[name].sum() - torch.count_nonzero(p.detach() * self._state.masks[name]))
            for name, p in self._state.parameters.items()
        }

    def check_zeros(self, saved: Mapping[str, int]) -> None:
        """Raise a `CheckpointError` if more live weights are zero than when a state was saved."""
        now, live = self.live_zeros(), {name: int(mask.sum()) for name, mask in self._state.masks.items()}
        more = {n: count - saved[n] for n, count in now.items() if n in saved and count - saved[n] > _ROUNDED * live[n]}
        if more:
            raise CheckpointError(
                f"{sum(more.values())} live weights of {len(more)} parameters, such as {next(iter(more))}, are zero that "
                "were not when the masks were saved: load the weights that belong to these masks. If that was done, steps "
                "or other masks have changed them since: load them again"
            )

    def check_not_sparse(self) -> None:
        """Raise an `ArgumentError` if fresh masks were laid over a network that is sparse already."""
        zeros, live = self.live_zeros(), {name: int(mask.sum()) for name, mask in self._state.masks.items()}
        # A layer that starts from zeros alone is none of a sparse network.
        mixed = [name for name in zeros if 0 < zeros[name] < live[name]]
        count, total = sum(zeros[name] for name in mixed), sum(live[name] for name in mixed)
        if count > _DRAWN * total:
            raise ArgumentError(
                f"{count} of {total} weights that fresh masks let live are zero, so the network is sparse already: load "
                "the state of the controller that it was trained with, give its masks (masks=...), or take them from the "
                "weights (init='from_weights')"
            )


def _version(parameter: nn.Parameter) -> tuple[int, int]:
    return parameter._version, parameter.data_ptr()
