"""Batch normalization as an affine map, which it is in evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from widekernel.layers.alterations import alteration
from widekernel.layers.batch_norm import NativeBatchNorm2d

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, NativeBatchNorm2d)
PLAIN_FORWARDS = frozenset(kind.forward for kind in _BATCH_NORMS)
"""The forwards of batch norms that do nothing else. Other subclasses may add an activation, which is not an affine map."""


def is_foldable(norm: nn.Module) -> bool:
    """Return whether `norm` is a fixed affine map per channel in evaluation."""
    return not reasons_against_folding(norm)


def reasons_against_folding(norm: nn.Module) -> list[str]:
    """List why `norm` is not a fixed affine map per channel in evaluation; empty if it is one."""
    if text := alteration(norm):
        return [text]
    if isinstance(norm, nn.Identity) or _is_frozen(norm):
        return []
    if not _is_plain(norm):
        return [f"{type(norm).__name__} is not a plain batch norm"]
    if norm.running_mean is None:
        return ["a batch norm has no running statistics"]
    return []


def affine_of(norm: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift, both (C,) in float64, that `norm` applies in evaluation.

    Covers batch norm, synchronized batch norm, torchvision's frozen batch norm, and Identity.

    Raises:
        TypeError: for any other normalization, and for batch norm without running statistics.
    """
    if isinstance(norm, nn.Identity) and not alteration(norm):
        return torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    reasons = reasons_against_folding(norm)
    if reasons:
        raise TypeError(f"{reasons[0]} and cannot be folded: only batch normalization with running statistics can")
    batch_norm: Any = norm
    scale = (batch_norm.running_var.double() + batch_norm.eps).rsqrt()
    if batch_norm.weight is not None:
        scale = scale * batch_norm.weight.double()
    shift = -batch_norm.running_mean.double() * scale
    if batch_norm.bias is not None:
        shift = shift + batch_norm.bias.double()
    return scale.detach(), shift.detach()


def _is_plain(norm: nn.Module) -> bool:
    """Return whether the class of `norm` computes a batch norm and nothing else in evaluation.

    A class with a forward of its own says so by the attribute `plain_in_evaluation`; its subclasses must say it again.
    """
    if vars(type(norm)).get("plain_in_evaluation", False):
        return isinstance(norm, nn.modules.batchnorm._BatchNorm)
    return isinstance(norm, _BATCH_NORMS) and type(norm).forward in PLAIN_FORWARDS


def _is_frozen(norm: nn.Module) -> bool:
    """Return whether `norm` is torchvision's FrozenBatchNorm2d, recognized by name: this folder imports PyTorch only."""
    kind = type(norm)
    return kind.__name__ == "FrozenBatchNorm2d" and kind.__module__.startswith("torchvision.")
