"""Batch normalisation as the affine map that it is in evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def is_foldable(norm: nn.Module) -> bool:
    """Whether `norm` is a fixed affine map per channel in evaluation: batch norm of any kind, or nothing."""
    return isinstance(norm, nn.Identity) or (isinstance(norm, _BatchNorm) and norm.running_mean is not None)


def affine_of(norm: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Give the scale and shift, both (C,) in float64, that `norm` applies in evaluation.

    Covers BatchNorm2d, SyncBatchNorm and every other subclass with running statistics, and Identity.

    Raises:
        TypeError: for a normalisation whose statistics depend on the input.
    """
    if isinstance(norm, nn.Identity):
        return torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise TypeError(
            f"{type(norm).__name__} normalises with statistics of its input and cannot be folded: "
            "only batch normalisation with running statistics can"
        )
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale.detach(), shift.detach()
