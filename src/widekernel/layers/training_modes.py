"""Training and evaluation mode of the modules of a network, as they are before something changes them for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def training_modes_restored(model: nn.Module) -> Iterator[None]:
    """Set every module back, after the block, to the mode that it is in now; modules of one network may differ in it."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training  # `train()` would also change its children
