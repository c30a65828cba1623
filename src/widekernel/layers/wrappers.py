"""Unwrapping networks from the wrappers of PyTorch and of training libraries."""

from __future__ import annotations

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside data-parallel, compiled and Fabric's wrappers, with its own parameter names."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(getattr(model, "_original_module", None), nn.Module):
            model = model._original_module  # type: ignore[assignment]  # Lightning Fabric's
        else:
            return model
