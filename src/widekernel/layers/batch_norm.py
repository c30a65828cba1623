"""Batch norm whose training our kernels compute."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.ops.batch_norm import batch_norm, reasons_against_batch_norm
from widekernel.ops.cpu import library
from widekernel.ops.eager import are_ordinary


class NativeBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that our kernels compute in training, forward and backward, in float32 on a CPU.

    In evaluation, without gradients, and wherever `reasons_against` or `reasons_against_batch_norm` has a reason, PyTorch
    computes it. `accelerate` measures which of the two is faster. Constructor and state dict are those of PyTorch's class.
    """

    def reasons_against(self) -> list[str]:
        """List what prevents our kernels from computing the training of this norm; empty if nothing does."""
        return reasons_against_native(self)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if torch.jit.is_scripting():
            return self._scripted(input)
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            return self._computed(input)

    def _scripted(self, x: Tensor) -> Tensor:
        """Compute what `nn.BatchNorm2d` does, whose forward TorchScript cannot call."""
        self._check_input_dim(x)
        average = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                average = 1.0 / float(self.num_batches_tracked)
        uses = not self.training or self.track_running_stats
        mean, variance = self.running_mean if uses else None, self.running_var if uses else None
        of_batch = self.training or (self.running_mean is None and self.running_var is None)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, of_batch, average, self.eps)

    @torch.jit.unused
    def _computed(self, x: Tensor) -> Tensor:
        # Looked up at every call: users change the mode, the momentum and the parameters of existing layers.
        wanted = self.training and torch.is_grad_enabled()
        if not wanted or reasons_against_batch_norm(x) or x.shape[1] != self.num_features or self.reasons_against():
            return super().forward(x)
        result = batch_norm(x, self.weight, self.bias, self.eps)
        if self.running_mean is not None:
            self._track(result.mean, result.variance, x.numel() // x.shape[1])
        return result.y

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Update the running statistics by those of a batch with `count` pixels for each channel."""
        momentum: Any = self.momentum
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, momentum)  # type: ignore[union-attr]
        # The running variance is unbiased.
        self.running_var.mul_(1 - momentum).add_(variance, alpha=momentum * count / (count - 1))  # type: ignore[union-attr]


def reasons_against_native(norm: nn.BatchNorm2d) -> list[str]:
    """List what prevents our kernels from computing the training of a batch norm; empty if nothing does.

    The input of a call may give other reasons; see `reasons_against_batch_norm`.
    """
    reason = library.load().reason
    reasons = [] if reason is None else [reason]
    if norm.momentum is None:
        reasons.append("its statistics are cumulative averages")
    if norm.eps <= 0:
        reasons.append(f"its eps is {norm.eps}, which does not keep the divisor from being 0")
    statistics = {value is not None for value in (norm.running_mean, norm.running_var, norm.num_batches_tracked)}
    if statistics != {norm.track_running_stats}:
        reasons.append("it keeps only some statistics, or keeps them without updates")
    values = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    if not all(value is None or _fits(value, norm.num_features) for value in values):
        what = "plain float32 tensors on the CPU, one number for each channel in a place of its own"
        reasons.append(f"its parameters or statistics are not {what}")
    return reasons


def _fits(value: Tensor, channels: int) -> bool:
    """Return whether a parameter or a statistic of a norm is one plain number for each channel, in a place of its own."""
    plain = are_ordinary(value) and value.device.type == "cpu" and value.dtype is torch.float32
    return plain and value.shape == (channels,) and (channels == 1 or value.stride(0) != 0)
