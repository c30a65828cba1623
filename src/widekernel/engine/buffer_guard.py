"""Restores running statistics after a skipped step: one NaN in a batch would spoil them for the rest of the run."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BufferGuard:
    """Copy of the buffers of a network that training changes.

    These are the floating-point buffers, and the counters of batch norms.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live = [
            buffer
            for name, buffer in model.named_buffers()
            if buffer.is_floating_point() or name.rpartition(".")[2] == "num_batches_tracked"
        ]
        self._kept = [torch.empty_like(buffer) for buffer in self._live]

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the buffers before a step."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    @torch.no_grad()
    def restore(self, made: Tensor | None = None) -> None:
        """Restore the buffers; if `made`, a scalar bool on the device, is given, only where it is false."""
        for live, kept in zip(self._live, self._kept, strict=True):
            live.copy_(kept if made is None else torch.where(made, live, kept))
