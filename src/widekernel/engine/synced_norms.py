"""Batch norms whose statistics are those of the images of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from widekernel.engine.processes import Processes
from widekernel.errors import ConfigError
from widekernel.layers.alterations import alteration
from widekernel.layers.norms import PLAIN_FORWARDS


def convert_batch_norms(model: nn.Module, processes: Processes) -> nn.Module:
    """Return `model` with synchronized batch norms, which have the same parameters, buffers and names.

    Alone, a process returns `model` unchanged. On GPUs the norms are PyTorch's `SyncBatchNorm`; that one refuses tensors
    on a CPU, where they are `SyncedBatchNorm`. Norms with an activation of timm (`BatchNormAct2d`) keep it.

    Args:
        model: network; its batch norms are replaced in place.
        processes: processes that train the network.

    Raises:
        ConfigError: a batch norm has another computation or hooks, which a synchronized one would lose.
    """
    if processes.world_size == 1:
        return model
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (reason := _reason_against(module)):
            raise ConfigError(
                f"The batch norm {name or 'of the network'} cannot be synchronized: {reason}. Set loop.sync_batch_norm to "
                "false; each process then normalizes its own images."
            )
    if processes.device is not None and processes.device.type == "cuda":
        return convert_sync_batchnorm(model)
    made: dict[int, nn.Module] = {}
    return _converted(model, processes, made)


def _reason_against(norm: _BatchNorm) -> str:
    if isinstance(norm, SyncedBatchNorm):
        return ""
    if type(norm).forward not in {*PLAIN_FORWARDS, BatchNormAct2d.forward}:
        return f"{type(norm).__name__} is not a plain batch norm"
    if any(True for _ in norm.parameters(recurse=False)) and hasattr(norm, "parametrizations"):
        return "its parameters are parametrized"
    return alteration(norm)


def _converted(module: nn.Module, processes: Processes, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    result = module
    if isinstance(module, _BatchNorm) and not isinstance(module, SyncedBatchNorm):
        result = SyncedBatchNorm(module, processes)
        if isinstance(module, BatchNormAct2d):
            result = SyncedBatchNormAct(module, processes)
    made[id(module)] = made[id(result)] = result
    for name, child in list(result._modules.items()):
        if child is not None:
            result._modules[name] = _converted(child, processes, made)
    return result


class SyncedBatchNorm(_BatchNorm):
    """Batch norm over the images of all processes in training, and the usual one in evaluation.

    It takes the parameters and buffers of the norm that it replaces.

    Args:
        norm: batch norm of a network.
        processes: processes that train together.
    """

    plain_in_evaluation = True  # for layers.norms: it can be folded

    def __init__(self, norm: _BatchNorm, processes: Processes) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        self.affine, self.track_running_stats, self.training = norm.affine, norm.track_running_stats, norm.training
        self.processes = processes
        self._parameters.update(norm._parameters)
        self._buffers.update(norm._buffers)

    @override
    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"A batch norm takes (N, C, …), but the input has {input.dim()} dimension(s).")

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, (N, C, …); in training all processes must call this together, N may differ."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        average = self.momentum or 0.0
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                average = 1.0 / self.num_batches_tracked.item()
        mean, sum_of_squares, count = _statistics(input.detach(), self.processes)
        if count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got {count:.0f} over all processes.")
        if self.track_running_stats:
            with torch.no_grad():
                variance = sum_of_squares / (count - 1)
                for running, value in (self.running_mean, mean), (self.running_var, variance):
                    if running is not None:
                        running.lerp_(value.to(running.dtype), average)
        statistics = mean, sum_of_squares / count, count
        return _Normalize.apply(input, self.weight, self.bias, statistics, self.eps, self.processes)


class SyncedBatchNormAct(SyncedBatchNorm):
    """Synchronized form of timm's batch norm with activation.

    Args:
        norm: batch norm of a network.
        processes: processes that train together.
    """

    plain_in_evaluation = False

    def __init__(self, norm: BatchNormAct2d, processes: Processes) -> None:
        super().__init__(norm, processes)
        self.drop, self.act = norm.drop, norm.act

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, (N, C, H, W), and apply dropout and the activation."""
        return self.act(self.drop(super().forward(input)))


def _statistics(values: Tensor, processes: Processes) -> tuple[Tensor, Tensor, float]:
    """Return mean and sum of squared deviations per channel, (C,) in float64, and the number of values per channel.

    Each process contributes its own mean and deviations; they are combined around the common mean, so large means cost no
    accuracy as sums of squares would.
    """
    channels = values.shape[1]
    count = values.numel() // channels
    each = torch.zeros(processes.world_size, 2 * channels + 1, dtype=torch.float64, device=values.device)
    if count:
        axes = [axis for axis in range(values.dim()) if axis != 1]
        wide = values if values.dtype == torch.float64 else values.float()
        variance, mean = torch.var_mean(wide, axes, correction=0)
        each[processes.rank] = torch.cat([mean.double(), variance.double() * count, mean.new_tensor([count]).double()])
    each = processes.sum(each)  # the other rows are zero, so this gathers the rows
    means, deviations, counts = each[:, :channels], each[:, channels:-1], each[:, -1:]
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return mean, (deviations + counts * (means - mean).square()).sum(0), total.item()


class _Normalize(torch.autograd.Function):
    """Normalization by given statistics, whose gradient includes that through the statistics of all processes."""

    @staticmethod
    @override
    def forward(  # type: ignore[override]
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: tuple[Tensor, Tensor, float],
        eps: float,
        processes: Processes,
    ) -> Tensor:
        mean, variance, ctx.count = statistics
        kind = torch.float64 if input.dtype == torch.float64 else torch.float32
        mean, variance = mean.to(kind), variance.to(kind)
        ctx.save_for_backward(input, weight, mean, (variance + eps).rsqrt())
        ctx.processes, ctx.bias_type = processes, None if bias is None else bias.dtype
        wide = [None if value is None else value.to(kind) for value in (weight, bias)]
        return F.batch_norm(input.to(kind), mean, variance, wide[0], wide[1], False, 0.0, eps).to(input.dtype)

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, weight, mean, scale = ctx.saved_tensors
        shape = [1, -1] + [1] * (input.dim() - 2)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        normal = (input.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        wide = gradient.to(mean.dtype)
        sums = torch.stack([wide.sum(axes), (wide * normal).sum(axes)])
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        to_input = None
        if need_input:
            means = (ctx.processes.sum(sums.double()) / ctx.count).to(mean.dtype)
            factor = scale if weight is None else scale * weight.to(mean.dtype)
            to_input = (wide - means[0].view(shape) - normal * means[1].view(shape)) * factor.view(shape)
            to_input = to_input.to(input.dtype)
        to_weight = sums[1].to(weight.dtype) if need_weight and weight is not None else None
        to_bias = sums[0].to(ctx.bias_type) if need_bias and ctx.bias_type is not None else None
        return to_input, to_weight, to_bias, None, None, None
