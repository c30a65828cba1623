"""The derivatives of the operators, to any order.

Each rule is an `autograd.Function` with `setup_context`, so that `torch.func` transforms work. There is no `jvp`, so
forward-mode differentiation raises instead of returning a wrong zero tangent.

The gradients have the dilations of the call.

    operator                     gradient in the images                  gradient in a kernel
    depthwise_sum                depthwise_sum of flipped kernels        depthwise_weight_grad
    depthwise_weight_grad        depthwise_sum (the rule is bilinear)
    depthwise_branches           depthwise_sum_of_branches, flipped      depthwise_weight_grad
    depthwise_sum_of_branches    depthwise_branches, flipped             depthwise_weight_grad
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widekernel.ops.operators import (
    depthwise_sum_of_taps_op,
    join_kernels,
    run_branches,
    run_sum,
    run_sum_of_branches,
    run_weight_grad,
    split_kernels,
)
from widekernel.ops.problem import Anchor, Anchors, flipped, mirror, mirror_anchors
from widekernel.ops.registration import CallOptions, has_batched_gradients, needs_derivatives, operator_options

Gradients = tuple[Tensor | None, ...]


def differentiable_sum(
    x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], bias: Tensor | None, options: CallOptions
) -> Tensor:
    """Compute a differentiable `depthwise_sum`; the arguments are already converted and checked."""
    if has_batched_gradients(x, *kernels):
        return _apply_to_taps(x, kernels, anchors, bias, options)
    if not needs_derivatives(x, bias, *kernels):
        return run_sum(x, kernels, anchors, options, bias)
    if _is_compiling_a_transform():
        return _apply_to_taps(x, kernels, anchors, bias, options)
    return _DepthwiseSum.apply(x, bias, tuple(anchors), options, *kernels)


def differentiable_weight_grad(
    x: Tensor, grad: Tensor, kernel_size: Sequence[int], anchor: Anchor, options: CallOptions
) -> Tensor:
    """Compute a differentiable `depthwise_weight_grad`; the arguments are already checked."""
    if not needs_derivatives(x, grad):
        return run_weight_grad(x, grad, (*kernel_size, *anchor), options)  # type: ignore[arg-type]
    return _DepthwiseWeightGrad.apply(x, grad, (*kernel_size, *anchor), options)


def differentiable_branches(
    x: Tensor, kernels: Sequence[Tensor], anchors: Anchors, options: CallOptions
) -> Sequence[Tensor]:
    """Compute a differentiable `depthwise_branches`; the arguments are already converted and checked."""
    if len(kernels) == 1 or has_batched_gradients(x, *kernels):
        rects = enumerate(zip(kernels, anchors))
        return [_rectangle(x, kernel, anchor, options.of([b])) for b, (kernel, anchor) in rects]
    # In some versions, the compiler traces a function with a variable number of arguments only if it needs a gradient.
    if not needs_derivatives(x, *kernels):
        return run_branches(x, kernels, anchors, options)
    return _DepthwiseBranches.apply(x, anchors, options, *kernels)


def differentiable_sum_of_branches(
    xs: Sequence[Tensor], kernels: Sequence[Tensor], anchors: Anchors, options: CallOptions
) -> Tensor:
    """Compute a differentiable `depthwise_sum_of_branches`."""
    if len(kernels) == 1 or has_batched_gradients(*xs, *kernels):
        rects = enumerate(zip(xs, kernels, anchors))
        parts = [_rectangle(x, kernel, anchor, options.of([b])) for b, (x, kernel, anchor) in rects]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    if not needs_derivatives(*xs, *kernels):
        return run_sum_of_branches(xs, kernels, anchors, options)
    return _DepthwiseSumOfBranches.apply(anchors, options, *xs, *kernels)


def _is_compiling_a_transform() -> bool:
    """Return whether a function transform is being compiled.

    Inside one, the compiler of some versions traces only functions with a fixed number of arguments.
    """
    return torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _rectangle(x: Tensor, kernel: Tensor, anchor: Anchor, options: CallOptions) -> Tensor:
    """Convolve with one rectangle."""
    return _apply_to_taps(x, [kernel], (anchor,), None, options)


def _apply_to_taps(
    x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], bias: Tensor | None, options: CallOptions
) -> Tensor:
    geometry = tuple((kernel.shape[2], kernel.shape[3], *anchor) for kernel, anchor in zip(kernels, anchors))
    return _DepthwiseSumOfTaps.apply(x, join_kernels(kernels), bias, _Call(geometry, options))


def _with_signature(function: Callable[..., Any]) -> Callable[..., Any]:
    """Attach the signature: PyTorch reads it in every call of a rule, and would otherwise derive it again each time."""
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function


class _DepthwiseSum(torch.autograd.Function):
    """The rule of `depthwise_sum` without scale and rectifier."""

    generate_vmap_rule = True

    @staticmethod
    @_with_signature
    def forward(x: Tensor, bias: Tensor | None, anchors: Anchors, options: CallOptions, *kernels: Tensor) -> Tensor:
        return run_sum(x, kernels, anchors, options, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _bias, ctx.anchors, ctx.options, *kernels = inputs
        ctx.save_for_backward(x, *kernels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:  # type: ignore[override]
        x, *kernels = ctx.saved_tensors
        for_x = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = differentiable_sum(grad, flipped(kernels), mirror_anchors(kernels, ctx.anchors), None, ctx.options)
        for_kernels = [
            differentiable_weight_grad(x, grad, kernel.shape[2:], anchor, ctx.options.of([r])) if wanted else None
            for r, (kernel, anchor, wanted) in enumerate(zip(kernels, ctx.anchors, ctx.needs_input_grad[4:]))
        ]
        if ctx.needs_input_grad[1]:
            for_bias = grad.sum((0, 2, 3))
        return for_x, for_bias, None, None, *for_kernels


class _Call(NamedTuple):
    """The arguments of `depthwise_sum_of_taps` that are not tensors.

    Attributes:
        geometry: (kh, kw, anchor row, anchor column) of every rectangle.
        options: backend, algorithm and dilations.
    """

    geometry: tuple[tuple[int, int, int, int], ...]
    options: CallOptions

    def mirrored(self) -> _Call:
        """Return the call that computes the input gradient."""
        rects = ((kh, kw, *mirror((kh, kw), (row, column))) for kh, kw, row, column in self.geometry)
        return self._replace(geometry=tuple(rects))

    def split(self, taps: Tensor) -> list[Tensor]:
        """Turn taps (C, Σ kh·kw) into kernels (C, 1, kh, kw)."""
        return split_kernels(taps, [rect[:2] for rect in self.geometry])


class _DepthwiseSumOfTaps(torch.autograd.Function):
    """The rule of `depthwise_sum` with all kernels in one tensor (C, Σ kh·kw), so that the number of arguments is fixed."""

    generate_vmap_rule = True

    @staticmethod
    @_with_signature
    def forward(x: Tensor, taps: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
        if has_batched_gradients(x, taps):
            numbers = [number for rect in call.geometry for number in rect]
            y = depthwise_sum_of_taps_op(x, taps, numbers, *operator_options(call.options))
            return y if bias is None else y + bias.view(-1, 1, 1)
        return run_sum(x, call.split(taps), tuple(rect[2:] for rect in call.geometry), call.options, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, taps, _bias, ctx.call = inputs
        ctx.save_for_backward(x, taps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:  # type: ignore[override]
        x, taps = ctx.saved_tensors
        call = ctx.call
        for_x = for_taps = for_bias = None
        if ctx.needs_input_grad[0]:
            turned = join_kernels(flipped(call.split(taps)))
            for_x = _DepthwiseSumOfTaps.apply(grad, turned, None, call.mirrored())
        if ctx.needs_input_grad[1]:
            for_taps = join_kernels(
                [
                    differentiable_weight_grad(x, grad, rect[:2], rect[2:], call.options.of([r]))
                    for r, rect in enumerate(call.geometry)
                ]
            )
        if ctx.needs_input_grad[2]:
            for_bias = grad.sum((0, 2, 3))
        return for_x, for_taps, for_bias, None


class _DepthwiseWeightGrad(torch.autograd.Function):
    """The rule of `depthwise_weight_grad`, which is bilinear: both its gradients are `depthwise_sum`."""

    generate_vmap_rule = True

    @staticmethod
    @_with_signature
    def forward(x: Tensor, grad: Tensor, geometry: tuple[int, int, int, int], options: CallOptions) -> Tensor:
        return run_weight_grad(x, grad, geometry, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, grad, ctx.geometry, ctx.options = inputs
        ctx.save_for_backward(x, grad)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Gradients:  # type: ignore[override]
        x, grad = ctx.saved_tensors
        call = _Call((ctx.geometry,), ctx.options)
        for_x = for_grad = None
        if ctx.needs_input_grad[0]:
            turned = join_kernels(flipped([cotangent]))
            for_x = _DepthwiseSumOfTaps.apply(grad, turned, None, call.mirrored())
        if ctx.needs_input_grad[1]:
            for_grad = _DepthwiseSumOfTaps.apply(x, join_kernels([cotangent]), None, call)
        return for_x, for_grad, None, None


class _DepthwiseBranches(torch.autograd.Function):
    """The rule of `depthwise_branches`; its input gradient is `depthwise_sum_of_branches`."""

    generate_vmap_rule = True

    @staticmethod
    @_with_signature
    def forward(x: Tensor, anchors: Anchors, options: CallOptions, *kernels: Tensor) -> tuple[Tensor, ...]:
        return tuple(run_branches(x, list(kernels), anchors, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.anchors, ctx.options, *kernels = inputs
        ctx.save_for_backward(x, *kernels)
        # An output without a gradient then gets None instead of zeros, and nothing is computed for it.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:  # type: ignore[override]
        x, *kernels = ctx.saved_tensors
        for_x: Tensor | None = None
        for_kernels: list[Tensor | None] = [None] * len(kernels)
        used = [(b, grad) for b, grad in enumerate(grads) if grad is not None]
        if ctx.needs_input_grad[0] and used:
            rects = [kernels[b] for b, _ in used]
            mirrored = mirror_anchors(rects, [ctx.anchors[b] for b, _ in used])
            options = ctx.options.of([b for b, _ in used])
            for_x = differentiable_sum_of_branches([grad for _, grad in used], flipped(rects), mirrored, options)
        for b, grad in used:
            if ctx.needs_input_grad[3 + b]:
                size, anchor = kernels[b].shape[2:], ctx.anchors[b]
                for_kernels[b] = differentiable_weight_grad(x, grad, size, anchor, ctx.options.of([b]))
        return for_x, None, None, *for_kernels


class _DepthwiseSumOfBranches(torch.autograd.Function):
    """The rule of `depthwise_sum_of_branches`, called with all inputs and then all kernels."""

    generate_vmap_rule = True

    @staticmethod
    @_with_signature
    def forward(anchors: Anchors, options: CallOptions, *tensors: Tensor) -> Tensor:
        count = len(anchors)
        return run_sum_of_branches(list(tensors[:count]), list(tensors[count:]), anchors, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.anchors, ctx.options, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:  # type: ignore[override]
        count = len(ctx.anchors)
        xs, kernels = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        gradients: list[Tensor | None] = [None] * (2 * count)
        wanted = [b for b in range(count) if ctx.needs_input_grad[2 + b]]
        if wanted:
            rects = [kernels[b] for b in wanted]
            mirrored = mirror_anchors(rects, [ctx.anchors[b] for b in wanted])
            found = differentiable_branches(grad, flipped(rects), mirrored, ctx.options.of(wanted))
            for b, for_x in zip(wanted, found):
                gradients[b] = for_x
        for b in range(count):
            if ctx.needs_input_grad[2 + count + b]:
                size, anchor = kernels[b].shape[2:], ctx.anchors[b]
                gradients[count + b] = differentiable_weight_grad(xs[b], grad, size, anchor, ctx.options.of([b]))
        return None, None, *gradients
