"""Batch norm in training, computed by our kernels where they can run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from widekernel.ops import call_trace
from widekernel.ops.cpu import batch_norm as native
from widekernel.ops.cpu import library
from widekernel.ops.eager import are_ordinary, is_unobserved_call
from widekernel.ops.registration import has_batched_gradients


class Normalized(NamedTuple):
    """The result of a batch norm.

    Attributes:
        y: (N, C, H, W).
        mean: (C,), without gradient.
        variance: (C,), with the number of pixels as divisor, without gradient.
    """

    y: Tensor
    mean: Tensor
    variance: Tensor


def reasons_against_batch_norm(x: Tensor) -> list[str]:
    """List why our kernels do not compute a batch norm of this input in training; empty if they do.

    `accelerate` measures where they are faster than PyTorch's. Compilers fuse batch norms with their neighbors, so PyTorch's
    batch norm runs under `torch.compile`.
    """
    if not is_unobserved_call() or not are_ordinary(x):
        return ["something compiles, traces or transforms the call"]
    if x.device.type != "cpu":
        return [f"it runs on a CPU, not on {x.device}"]
    if x.dtype is not torch.float32 or x.dim() != 4:
        return [f"it computes maps (N, C, H, W) in float32, not {x.dim()} dimensions in {x.dtype}"]
    if torch.is_autocast_enabled("cpu"):
        return ["autocast chooses the types"]
    if x.shape[0] * x.shape[2] * x.shape[3] < 2 or x.shape[1] == 0:
        return ["there is no variance without two numbers for each channel"]
    if native.layout_of(x) is None or x.is_neg():
        return ["the map is neither contiguous nor channels_last"]
    reason = library.load().reason
    if reason is not None:
        return [reason]
    # A task computes one channel, or a vector of adjacent ones. With fewer tasks than threads, some threads would idle.
    threads, together = torch.get_num_threads(), 1 if x.is_contiguous() else library.load().lanes
    if x.shape[1] < threads * together:
        return [f"{x.shape[1]} channels are too few for {threads} threads"]
    return []


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Normalized:
    """Normalize every channel over all images and pixels, with our kernels; differentiable to any order.

        y = (x - mean) / sqrt(variance + eps) · weight + bias

    Results do not depend on the number of threads.

    Args:
        x: (N, C, H, W) without `reasons_against_batch_norm`.
        weight: (C,), float32, or None for 1.
        bias: (C,), float32, or None for 0.
        eps: added to the variance, not negative.
    """
    return Normalized(*_BatchNorm.apply(x, weight, bias, eps))


class _BatchNorm(torch.autograd.Function):
    """The rule of batch norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:  # type: ignore[override]
        if call_trace.OPEN_TRACES:
            call_trace.record_batch_norm(tuple(x.shape))
        weight, bias = (None if values is None else values.contiguous() for values in (weight, bias))
        y, found = native.batch_norm(x, weight, bias, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, *found)
        ctx.mark_non_differentiable(found.mean, found.variance)
        ctx.set_materialize_grads(False)
        return y, found.mean, found.variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return None, None, None, None
        x, weight, *found = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        observed = torch.is_grad_enabled() or has_batched_gradients(grad) or not is_unobserved_call()
        layout = native.layout_of(x)
        are_plain = x.dtype is torch.float32 and all(map(_is_contiguous_float, (weight, *found)))
        if observed or not are_ordinary(grad) or layout is None or not are_plain:
            # PyTorch's gradients have derivatives of their own, rules for transforms, and take what hooks on saved tensors
            # have made of these.
            backward = torch.ops.aten.native_batch_norm_backward
            saved = found[0], found[2]
            parts = backward(grad, x, weight, None, None, *saved, True, ctx.eps, [*wanted[:1], True, True])
        else:
            grad = grad.resolve_neg().contiguous(memory_format=layout)
            parts = native.batch_norm_backward(grad, x, weight, native.Statistics(*found))
        return *(part if needed else None for part, needed in zip(parts, wanted)), None


def _is_contiguous_float(values: Tensor | None) -> bool:
    return values is None or (values.dtype is torch.float32 and values.is_contiguous())
