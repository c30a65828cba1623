"""What masks removed that were made or loaded, kept until the next step: others that are loaded by then may need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Kept:
    """The values of masked tensors before they were masked.

    Training libraries restore a run in an order of their own: weights first, then the controller is made, which masks them
    by fresh masks, then its state is loaded, which has other masks. What the fresh ones removed is given back then.

    Args:
        holders: tensors by parameter name, of the network and of its averages, as they are before masking.
    """

    def __init__(self, holders: Sequence[Mapping[str, nn.Parameter]]) -> None:
        self._values = [{name: value.detach().clone() for name, value in holder.items()} for holder in holders]

    @torch.no_grad()
    def give_back(self, holders: Sequence[Mapping[str, nn.Parameter]], masks: Mapping[str, Tensor]) -> None:
        """Undo the masking of every tensor that nobody has written to since.

        Args:
            holders: as before, perhaps of another device or type by now.
            masks: by which they were masked.
        """
        for holder, values in zip(holders, self._values):
            for name, value in values.items():
                if name not in masks or name not in holder:
                    continue
                now = holder[name]
                before = value.to(now.device)
                if torch.equal(now, (before * masks[name].to(now.device)).to(now.dtype)):
                    now.copy_(before)
