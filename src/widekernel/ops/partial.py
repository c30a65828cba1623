"""Depthwise sums of some channels of an image, with the other channels behind them, scaled and shifted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widekernel.ops import call_trace, dispatch, plain, recording
from widekernel.ops.backends.native import NativeBackend
from widekernel.ops.call_trace import PartialCall
from widekernel.ops.cpu.partial import PreparedPartialSum, Selection
from widekernel.ops.dispatch import dispatch_key
from widekernel.ops.eager import TENSOR_TYPES, is_ordinary_call
from widekernel.ops.problem import DEPTHWISE_SUM, Anchor, Problem, is_channels_last
from widekernel.ops.registration import needs_derivatives


def partial_depthwise_sum(
    x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], bias: Tensor, selection: Selection
) -> Tensor:
    """Define the operation, in PyTorch's own operators.

        y[:, :S] = depthwise_sum(x[:, selected], kernels, anchors, bias)
        y[:, S + i] = scale[i] · x[:, others[i]] + shift[i]

    Args:
        x: (N, C, H, W).
        kernels: rectangles (S, 1, kh, kw).
        anchors: for each rectangle the tap that sits on the output pixel.
        bias: (S,).
        selection: the channels of `x`.

    Returns:
        (N, S + G, H, W).
    """
    selected, others, scale, shift = selection
    convolved = plain.depthwise_sum(x.index_select(1, selected), list(kernels), list(anchors), bias)
    return torch.cat([convolved, torch.addcmul(shift, x.index_select(1, others), scale)], 1)


def native_partial_sum(
    x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], bias: Tensor, selection: Selection
) -> Tensor | None:
    """Compute `partial_depthwise_sum` in one native call.

    It takes the arguments of `partial_depthwise_sum`.

    Returns:
        the result, in the layout of `x`; None if the call is not covered. It is covered if nothing observes the operators,
        no derivatives are wanted, `x` is a float32 image on a CPU without gaps in memory, the tables are int32, all tensors
        are plain, those of weights and channels contiguous, and the native backend is the one chosen for these channels.

    Raises:
        ArgumentError: if a table names a channel that `x` does not have.
    """
    floats, tables = (*kernels, bias, selection.scale, selection.shift), selection[:2]
    if not is_ordinary_call() or torch._C._is_any_autocast_enabled() or needs_derivatives(x, *floats):
        return None
    if not _is_covered(x, torch.float32) or x.dim() != 4 or x.numel() == 0:
        return None
    if not x.is_contiguous() and not is_channels_last(x):
        return None
    dense = all(_is_covered(values, torch.float32) and values.is_contiguous() for values in floats)
    if not dense or not all(_is_covered(table, torch.int32) and table.is_contiguous() for table in tables):
        return None
    shapes = tuple([values.shape for values in (*floats, *tables)])
    key = dispatch_key("partial_depthwise_sum", x, shapes, tuple(anchors))
    choices = dispatch.registry.choices
    if key not in choices:
        dispatch.registry.remember(key, _choice(x, shapes, tuple(anchors)))
    choice = choices[key]
    return None if choice is None else choice(x, kernels, bias, selection)


class _Choice(NamedTuple):
    """How the problem of the selected channels is computed, and what traces have of it."""

    problem: Problem
    call: PartialCall
    prepared: PreparedPartialSum

    def __call__(self, *arguments: Any) -> Tensor:
        y = self.prepared(*arguments)
        if call_trace.OPEN_TRACES:
            self.note()
        if recording.OPEN:
            recording.note_event(self.note)
        return y

    def note(self) -> None:
        """Note the call in open traces."""
        call_trace.record(NativeBackend.name, self.problem)
        call_trace.record_partial(self.call)


def _is_covered(values: Tensor, dtype: torch.dtype) -> bool:
    if (
        type(values) not in TENSOR_TYPES
        or values.dtype is not dtype
        or not values.is_cpu
        or values.layout is not torch.strided
    ):
        return False
    return not values.is_neg() and not values._is_zerotensor()


def _choice(x: Tensor, shapes: tuple[torch.Size, ...], anchors: tuple[Anchor, ...]) -> _Choice | None:
    *kernels, bias, scale, shift, selected, others = shapes
    count, rest = selected.numel(), others.numel()
    fits = all(len(kernel) == 4 and tuple(kernel[:2]) == (count, 1) and 0 not in kernel for kernel in kernels)
    fits = fits and tuple(bias) == (count,) and scale.numel() == shift.numel() == rest
    if not fits or not kernels or len(kernels) != len(anchors) or not count or count + rest < 2 or x.shape[1] < 2:
        return None
    shape = x.shape[0], count, x.shape[2], x.shape[3]
    sizes = tuple((kernel[2], kernel[3]) for kernel in kernels)
    last = is_channels_last(x) and count > 1
    problem = Problem(DEPTHWISE_SUM, x.device.type, x.dtype, shape, sizes, anchors, last)
    backend = dispatch.select(problem)
    if not isinstance(backend, NativeBackend):
        return None
    return _Choice(problem, PartialCall(tuple(x.shape), count), backend.prepare_partial(problem))
