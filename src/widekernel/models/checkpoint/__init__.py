"""Loading and saving of checkpoints in every official layout and in our own."""

from __future__ import annotations

from widekernel.models.checkpoint.loading import load_checkpoint
from widekernel.models.checkpoint.report import LoadReport
from widekernel.models.checkpoint.saving import save_checkpoint

__all__ = ["LoadReport", "load_checkpoint", "save_checkpoint"]
