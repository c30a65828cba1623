"""Restoring the training and evaluation mode of a network's modules after temporary changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def training_modes_restored(model: nn.Module) -> Iterator[None]:
    """Restore the mode of every module after the block; modules of one network may have different modes."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training  # `train()` would also change its children
