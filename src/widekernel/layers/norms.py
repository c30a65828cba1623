"""Batch normalization: as an affine map, which it is in evaluation, and by our kernels in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from widekernel.layers.alterations import alteration
from widekernel.ops.batch_norm import batch_norm, reasons_against_batch_norm
from widekernel.ops.eager import are_ordinary, is_unobserved_call

# Only these, and subclasses with the same forward: other subclasses may add an activation, which is not an affine map.
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


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


def normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """Return norm(x). In training, our kernels compute a plain `nn.BatchNorm2d` where they can; it updates its statistics.

    Args:
        norm: any module.
        x: (N, C, H, W).
    """
    if reasons_against_native(norm, x):
        return norm(x)  # type: ignore[no-any-return]
    batch_norm_2d: Any = norm
    result = batch_norm(x, batch_norm_2d.weight, batch_norm_2d.bias, batch_norm_2d.eps)
    if batch_norm_2d.running_mean is not None:
        with torch.no_grad():
            count = x.numel() // x.shape[1]
            momentum = batch_norm_2d.momentum
            batch_norm_2d.num_batches_tracked.add_(1)
            batch_norm_2d.running_mean.lerp_(result.mean, momentum)
            batch_norm_2d.running_var.mul_(1 - momentum).add_(result.variance, alpha=momentum * count / (count - 1))
    return result.y


def reasons_against_native(norm: nn.Module, x: Tensor) -> list[str]:
    """List why our kernels do not compute norm(x); empty if they do, which only happens in training."""
    if not is_unobserved_call() or not are_ordinary(x):
        return ["something compiles, traces or transforms the call"]
    if type(norm) is not nn.BatchNorm2d:
        return [f"{type(norm).__name__} is not a plain nn.BatchNorm2d"]
    if not (norm.training and torch.is_grad_enabled()):
        return ["no gradients are wanted of statistics of this batch"]
    if text := alteration(norm):
        return [text]
    if norm._forward_pre_hooks or torch.nn.modules.module._has_any_global_hook():
        return ["it has hooks, or there are hooks for all modules"]
    if norm.momentum is None or x.shape[1:2] != (norm.num_features,):
        return ["it has a cumulative average, or another number of channels"]
    values = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    if not all(value is None or _fits(value, x) for value in values):
        return ["its parameters or statistics are not plain float32 tensors, one value for each channel, beside the input"]
    statistics = {value is not None for value in (norm.running_mean, norm.running_var, norm.num_batches_tracked)}
    if statistics != {norm.track_running_stats}:
        return ["it keeps only some statistics, or keeps them without updates"]
    return reasons_against_batch_norm(x)


def _fits(value: Tensor, x: Tensor) -> bool:
    """Return whether a parameter or a statistic of a norm is one plain number for each channel of x."""
    return are_ordinary(value) and value.dtype is torch.float32 and value.shape == x.shape[1:2] and value.device == x.device


def _is_plain(norm: nn.Module) -> bool:
    """Return whether the class of `norm` computes a batch norm and nothing else in evaluation.

    A class with a forward of its own says so by the attribute `plain_in_evaluation`; its subclasses must say it again.
    """
    if vars(type(norm)).get("plain_in_evaluation", False):
        return isinstance(norm, nn.modules.batchnorm._BatchNorm)
    return isinstance(norm, _BATCH_NORMS) and type(norm).forward in {kind.forward for kind in _BATCH_NORMS}


def _is_frozen(norm: nn.Module) -> bool:
    """Return whether `norm` is torchvision's FrozenBatchNorm2d, recognized by name: this folder imports PyTorch only."""
    kind = type(norm)
    return kind.__name__ == "FrozenBatchNorm2d" and kind.__module__.startswith("torchvision.")
