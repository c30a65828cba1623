"""Checks between steps that only its optimizer changes a masked network; replaced or overwritten weights are errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from widekernel.errors import ArgumentError, CheckpointError
from widekernel.sparsity.dynamic.state import MaskState
from widekernel.sparsity.selection import SHARDED, is_sharded

# Share of live weights that may be zero for other reasons: rounding to a narrower type, and zeros in the initialization.
_ROUNDED, _INITIALIZED = 0.01, 0.05


class TamperChecks:
    """Checks that a network is still the one that its masks were made for.

    Args:
        model: the network, unwrapped.
        state: its masks.
        writes_are_counted: whether PyTorch's counter of in-place writes is reliable; unknown optimizer wrappers may bypass
            it.
        first_masks: whether the masks will be drawn for a dense network.

    Attributes:
        done: whether all checks have passed since the masks were drawn or a state was loaded.
    """

    def __init__(self, model: nn.Module, state: MaskState, writes_are_counted: bool, first_masks: bool) -> None:
        self._model, self._state = model, state
        self._writes_are_counted, self._first_masks = writes_are_counted, first_masks
        self._versions: dict[str, tuple[int, int]] = {}
        self._saved_zeros: dict[str, int] | None = None  # live weights that were zero when the loaded state was saved
        self.done = False

    def record(self) -> None:
        """Record the weights as they are now, so that later writes are noticed."""
        self._versions = {name: _version(parameter) for name, parameter in self._state.parameters.items()}

    def repeat(self) -> None:
        """Make the next step run all checks again."""
        self.done = False

    def masks_were_loaded(self, live_zeros: dict[str, int]) -> None:
        """Make the next step check that the weights belong to the masks.

        Args:
            live_zeros: live weights of every parameter that were zero when the masks were saved.
        """
        self._saved_zeros, self._first_masks, self.done = live_zeros, False, False

    def before_step(self) -> bool:
        """Raise if something has undone the masks since the last step.

        Returns:
            Whether this was the first step since the masks were drawn or a state was loaded.

        Raises:
            ArgumentError: a parameter was replaced, or weights are live outside the masks.
            CheckpointError: masks were loaded without their weights.
        """
        self.check_zero_outside(self._written() if self._writes_are_counted else self._state.parameters)
        self.record()
        if self.done:
            return False
        self.check_parameters()
        if self._saved_zeros is not None:
            self._check_live_zeros(self._saved_zeros)
        else:
            self.check_first_masks()
        self._saved_zeros, self._first_masks, self.done = None, False, True
        return True

    def check_parameters(self) -> None:
        """Raise an `ArgumentError` if the network no longer holds the parameters that the masks were made for."""
        now = dict(self._model.named_parameters())
        lost = [name for name, parameter in self._state.parameters.items() if now.get(name) is not parameter]
        if not lost:
            return
        if is_sharded(now.get(lost[0])):
            raise ArgumentError(f"{lost[0]} is now {SHARDED}")
        raise ArgumentError(
            f"{lost[0]} is no longer the parameter that its mask was made for: change weights in place (load_state_dict "
            "without assign=True), or make a new optimizer and a new DynamicSparsity after replacing parts of the network"
        )

    @torch.no_grad()
    def check_zero_outside(self, names: Iterable[str]) -> None:
        """Raise an `ArgumentError` if these parameters have live weights outside their masks."""
        found = {}
        for name in names:
            weight, mask = self._state.parameters[name].detach(), self._state.masks[name]
            if count := int(torch.count_nonzero(weight * ~mask.to(weight.device))):
                found[name] = count
        if found:
            first = next(iter(found))
            raise ArgumentError(
                f"{sum(found.values())} weights are nonzero outside the masks of {len(found)} parameters ({found[first]} in "
                f"{first}): something other than the steps of the controller's optimizer has written to them, such as a "
                "checkpoint, an average or another optimizer. Load the controller's state with the weights, or make the "
                "controller after loading them; if these weights may be removed, call apply_masks()"
            )

    def check_first_masks(self) -> None:
        """Raise an `ArgumentError` if first masks were drawn for a network that is sparse already."""
        if not self._first_masks:
            return
        zeros, live = self.live_zeros(), self._state.live_counts()
        # A layer whose weights are all zero proves nothing: it may have been initialized so.
        mixed = [name for name in zeros if 0 < zeros[name] < live[name]]
        count, total = sum(zeros[name] for name in mixed), sum(live[name] for name in mixed)
        if count > _INITIALIZED * total:
            raise ArgumentError(
                f"{count} of {total} weights that the new masks keep are zero, so the network is sparse already: load "
                "the state of the controller that it was trained with, give its masks (masks=...), or take them from the "
                "weights (init='from_weights')"
            )

    def live_zeros(self) -> dict[str, int]:
        """Return how many live weights of every parameter are zero."""
        return {
            name: int(self._state.masks[name].sum() - torch.count_nonzero(p.detach() * self._state.masks[name]))
            for name, p in self._state.parameters.items()
        }

    def _check_live_zeros(self, saved: Mapping[str, int]) -> None:
        now, live = self.live_zeros(), self._state.live_counts()
        more = {n: count - saved[n] for n, count in now.items() if n in saved and count - saved[n] > _ROUNDED * live[n]}
        if more:
            raise CheckpointError(
                f"{sum(more.values())} live weights of {len(more)} parameters, such as {next(iter(more))}, are zero now but "
                "were not when the masks were saved: load the weights that belong to these masks, again if steps or other "
                "masks have changed them since"
            )

    def _written(self) -> list[str]:
        """Return the names of parameters that were written to, or whose memory was replaced, since `record`.

        PyTorch does not count writes to `parameter.data`: those are found at the next topology update.
        """
        return [n for n, parameter in self._state.parameters.items() if self._versions.get(n) != _version(parameter)]


def _version(parameter: nn.Parameter) -> tuple[int, int]:
    return parameter._version, parameter.data_ptr()
