"""Weights removed by newly drawn or loaded masks, kept until the next step in case other masks are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class RemovedWeights:
    """The values of masked tensors before they were masked.

    Training libraries restore a run in their own order: they load the weights, then make the controller, which applies new
    masks, and then load its state, which has other masks. At that point the weights that the new masks removed are restored.

    Args:
        holders: tensors by parameter name, of the network and of its averages, as they are before masking.
    """

    def __init__(self, holders: Sequence[Mapping[str, nn.Parameter]]) -> None:
        self._values = [{name: value.detach().clone() for name, value in holder.items()} for holder in holders]

    @torch.no_grad()
    def restore(self, holders: Sequence[Mapping[str, nn.Parameter]], masks: Mapping[str, Tensor]) -> None:
        """Undo the masking of every tensor that nothing has written to since.

        Args:
            holders: as before; devices and types may have changed.
            masks: the masks that were applied.
        """
        for holder, values in zip(holders, self._values):
            for name, value in values.items():
                if name not in masks or name not in holder:
                    continue
                now = holder[name]
                before = value.to(now.device)
                if torch.equal(now, (before * masks[name].to(now.device)).to(now.dtype)):
                    now.copy_(before)
