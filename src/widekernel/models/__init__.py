"""The networks, registered with timm when this package is imported."""

from __future__ import annotations

import timm

from widekernel.models import isotropic, replknet, roadmap, shiftwise, slak
from widekernel.models.checkpoint import LoadReport, load_checkpoint, save_checkpoint

MODULES = (replknet, slak, shiftwise, isotropic, roadmap)


def list_models(pattern: str = "*") -> list[str]:
    """Name the networks of this package that match a shell pattern, sorted."""
    ours = {name for module in MODULES for name in module.__all__}  # type: ignore[attr-defined]
    return [name for name in timm.list_models(pattern) if name in ours]


__all__ = ["LoadReport", "list_models", "load_checkpoint", "save_checkpoint"]
