"""The networks; importing this package registers them with timm, and their checkpoint layouts."""

from __future__ import annotations

import timm

# Each family registers its networks and its layouts when it is imported: add new families here.
from widekernel.models import (  # noqa: F401
    convnext_layouts,
    foreign_signatures,
    isotropic_layouts,
    replknet_layouts,
    roadmap_layouts,
    shiftwise_layouts,
    slak_layouts,
    unireplknet_layouts,
)
from widekernel.models.checkpoint import LoadReport, load_checkpoint, save_checkpoint


def list_models(pattern: str = "*") -> list[str]:
    """Return the sorted names of this package's networks that match a shell pattern."""
    ours = f"{__name__}."
    return [name for name in timm.list_models(pattern) if timm.model_entrypoint(name).__module__.startswith(ours)]


__all__ = ["LoadReport", "list_models", "load_checkpoint", "save_checkpoint"]
