"""The operators as PyTorch sees them: opaque, without derivatives, with a fake implementation and a batching rule.

Their derivatives are in `autograd`. A function `run_…` computes the same as an operator, but calls the implementation
directly where nothing needs the operator itself; see `eager`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from widekernel.ops import dispatch
from widekernel.ops.checks import check_algorithm, check_dilations, check_epilogue, check_sum, check_weight_grad
from widekernel.ops.dispatch import choose, choose_fused, dispatch_key
from widekernel.ops.eager import are_ordinary, is_ordinary_call, sum_key
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    Anchor,
    Anchors,
    Problem,
    in_layout,
    memory_format,
)
from widekernel.ops.registration import (
    LIBRARY,
    CallOptions,
    define_operator,
    flatten_anchors,
    given_options,
    merge_into_batch,
    merge_into_channels,
    on_gpu_of,
    operator_options,
    register_fake,
    register_implementation,
    unflatten_anchors,
)

define_operator("depthwise_sum", "Tensor x, Tensor[] kernels, SymInt[] anchors, Tensor? bias, Tensor? scale, bool relu")
define_operator("depthwise_weight_grad", "Tensor x, Tensor grad, SymInt[] geometry")
define_operator("depthwise_sum_of_taps", "Tensor x, Tensor taps, SymInt[] geometry")
define_operator("depthwise_branches", "Tensor x, Tensor[] kernels, SymInt[] anchors", "Tensor[]")
define_operator("depthwise_sum_of_branches", "Tensor[] xs, Tensor[] kernels, SymInt[] anchors")


# ---- The sum of rectangles


def run_sum(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[Anchor],
    options: CallOptions,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Compute `depthwise_sum` without derivatives."""
    if is_ordinary_call() and are_ordinary(x, bias, scale, *kernels):
        return _sum(x, kernels, tuple(map(tuple, anchors)), options, bias, scale, relu)  # type: ignore[arg-type]
    return depthwise_sum_op(x, kernels, flatten_anchors(anchors), bias, scale, relu, *operator_options(options))


@register_implementation("depthwise_sum")
def depthwise_sum_op(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[int],
    bias: Tensor | None,
    scale: Tensor | None,
    relu: bool,
    backend: str | None,
    algorithm: Any,
    dilations: Sequence[int] = (),
) -> Tensor:
    """Compute `depthwise_sum`; `anchors` is a flat list of numbers."""
    options = given_options(backend, algorithm, dilations)
    return _sum(x, kernels, unflatten_anchors(anchors), options, bias, scale, relu)


def _sum(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Anchors,
    options: CallOptions,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    key = sum_key(x, tuple([kernel.shape for kernel in kernels]), anchors, bias, scale, *options)
    choice = dispatch.registry.choices.get(key)
    if choice is None:
        algorithm = check_algorithm(options.algorithm)
        check_sum(x, kernels, anchors, bias)
        check_epilogue(x, scale, relu)
        check_dilations(options.dilations or None, len(kernels))
        with on_gpu_of(x):
            problem = Problem.of_sum(x, kernels, anchors, algorithm, options.dilations)
            choice = choose(key, problem, options.backend or None)
    return choice(x, kernels, anchors, bias, scale, relu)


@register_fake("depthwise_sum")
def _(x: Tensor, kernels: Any, anchors: Any, bias: Any, scale: Any, relu: bool, *options: Any) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


@torch.library.register_vmap("widekernel::depthwise_sum", lib=LIBRARY)
def _(
    info: Any, dims: Any, x: Tensor, kernels: Any, anchors: Any, bias: Any, scale: Any, relu: bool, *options: Any
) -> tuple[Tensor, int]:
    size, kernel_dims = info.batch_size, dims[1] or [None] * len(kernels)
    if dims[3] is None and dims[4] is None and all(dim is None for dim in kernel_dims):
        y = depthwise_sum_op(merge_into_batch(x, dims[0], size), kernels, anchors, bias, scale, relu, *options)
        return y.unflatten(0, (size, -1)), 0
    # Kernels that differ along the mapped dimension become channels of their own.
    images = merge_into_channels(x, dims[0], size)
    rects = [merge_into_batch(kernel, dim, size) for kernel, dim in zip(kernels, kernel_dims)]
    shift, factor = (None if v is None else merge_into_batch(v, dim, size) for v, dim in zip((bias, scale), dims[3:5]))
    return depthwise_sum_op(images, rects, anchors, shift, factor, relu, *options).unflatten(1, (size, -1)), 1


@register_implementation("depthwise_sum_of_taps")
def depthwise_sum_of_taps_op(
    x: Tensor,
    taps: Tensor,
    geometry: Sequence[int],
    backend: str | None,
    algorithm: Any,
    dilations: Sequence[int] = (),
) -> Tensor:
    """Compute `depthwise_sum` with all kernels in one tensor, in the form of `join_kernels`.

    For batched gradients, PyTorch can repeat an operator, but not one that takes a list of tensors.

    Args:
        x: (N, C, H, W).
        taps: (C, Σ kh·kw).
        geometry: kh, kw, anchor row and anchor column of each rectangle, concatenated.
        backend: the requested backend, or None.
        algorithm: the requested algorithm, or None.
        dilations: the dilation of each rectangle; empty if all are 1.
    """
    kernels = split_kernels(taps, tuple(zip(geometry[::4], geometry[1::4])))
    options = given_options(backend, algorithm, dilations)
    return _sum(x, kernels, tuple(zip(geometry[2::4], geometry[3::4])), options)


@register_fake("depthwise_sum_of_taps")
def _(x: Tensor, taps: Tensor, geometry: Sequence[int], *options: Any) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def join_kernels(kernels: Sequence[Tensor]) -> Tensor:
    """Join kernels (C, 1, kh, kw) into taps (C, Σ kh·kw)."""
    flat = [kernel.reshape(kernel.shape[0], kernel.shape[2] * kernel.shape[3]) for kernel in kernels]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


def split_kernels(taps: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Split taps (C, Σ kh·kw) into kernels (C, 1, kh, kw)."""
    parts = taps.split([kh * kw for kh, kw in sizes], 1)
    return [part.reshape(taps.shape[0], 1, kh, kw) for part, (kh, kw) in zip(parts, sizes)]


# ---- The gradient of a rectangle


def run_weight_grad(x: Tensor, grad: Tensor, geometry: tuple[int, int, int, int], options: CallOptions) -> Tensor:
    """Compute `depthwise_weight_grad` without derivatives; the geometry is (kh, kw, anchor row, anchor column)."""
    if is_ordinary_call() and are_ordinary(x, grad):
        return _weight_grad(x, grad, geometry, options)
    return depthwise_weight_grad_op(x, grad, geometry, *operator_options(options))


@register_implementation("depthwise_weight_grad")
def depthwise_weight_grad_op(
    x: Tensor,
    grad: Tensor,
    geometry: Sequence[int],
    backend: str | None,
    algorithm: Any,
    dilations: Sequence[int] = (),
) -> Tensor:
    """Compute `depthwise_weight_grad`; the geometry is (kh, kw, anchor row, anchor column)."""
    return _weight_grad(x, grad, tuple(geometry), given_options(backend, algorithm, dilations))


def _weight_grad(x: Tensor, grad: Tensor, geometry: tuple[int, ...], options: CallOptions) -> Tensor:
    size, anchor = geometry[:2], geometry[2:]
    key = dispatch_key(DEPTHWISE_WEIGHT_GRAD, x, grad.shape, geometry, *options)
    choice = dispatch.registry.choices.get(key)
    if choice is None:
        algorithm = check_algorithm(options.algorithm)
        check_weight_grad(x, grad, size, anchor)
        check_dilations(options.dilations or None, 1)
        with on_gpu_of(x):
            problem = Problem.of_weight_grad(x, size, anchor, algorithm, options.dilations)  # type: ignore[arg-type]
            choice = choose(key, problem, options.backend or None)
    return choice(x, grad, size, anchor)


@register_fake("depthwise_weight_grad")
def _(x: Tensor, grad: Tensor, geometry: Sequence[int], *options: Any) -> Tensor:
    return x.new_empty(x.shape[1], 1, geometry[0], geometry[1])


@torch.library.register_vmap("widekernel::depthwise_weight_grad", lib=LIBRARY)
def _(info: Any, dims: Any, x: Tensor, grad: Tensor, geometry: Any, *options: Any) -> tuple[Tensor, int]:
    size = info.batch_size
    images, grads = merge_into_channels(x, dims[0], size), merge_into_channels(grad, dims[1], size)
    return depthwise_weight_grad_op(images, grads, geometry, *options).unflatten(0, (size, -1)), 0


# ---- Branches


def run_branches(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], options: CallOptions) -> Sequence[Tensor]:
    """Compute `depthwise_branches` without derivatives."""
    if is_ordinary_call() and are_ordinary(x, *kernels):
        return _branches(x, kernels, tuple(anchors), options)
    return depthwise_branches_op(x, kernels, flatten_anchors(anchors), *operator_options(options))


@register_implementation("depthwise_branches")
def depthwise_branches_op(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[int],
    backend: str | None,
    algorithm: Any,
    dilations: Sequence[int] = (),
) -> list[Tensor]:
    """Compute `depthwise_branches`; `anchors` is a flat list of numbers."""
    return _branches(x, kernels, unflatten_anchors(anchors), given_options(backend, algorithm, dilations))


def _branches(x: Tensor, kernels: Sequence[Tensor], anchors: Anchors, options: CallOptions) -> list[Tensor]:
    key = dispatch_key(DEPTHWISE_BRANCHES, x, tuple([kernel.shape for kernel in kernels]), anchors, *options)
    choice = dispatch.registry.choices.get(key)
    if choice is None:
        algorithm = check_algorithm(options.algorithm)
        check_sum(x, kernels, anchors, None, DEPTHWISE_BRANCHES)
        check_dilations(options.dilations or None, len(kernels))

        def branch_by_branch(x: Tensor, kernels: Sequence[Tensor], anchors: Anchors) -> list[Tensor]:
            rects = enumerate(zip(kernels, anchors))
            return [run_sum(x, [kernel], (anchor,), options.of([b])) for b, (kernel, anchor) in rects]

        with on_gpu_of(x):
            problem = Problem.of_branches(x, kernels, anchors, algorithm, options.dilations)
            choice = choose_fused(key, problem, options.backend or None, branch_by_branch)
    return choice(x, kernels, anchors)


@register_fake("depthwise_branches")
def _(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[int], *options: Any) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=memory_format(x)) for _ in kernels]


@torch.library.register_vmap("widekernel::depthwise_branches", lib=LIBRARY)
def _(info: Any, dims: Any, x: Tensor, kernels: Any, anchors: Any, *options: Any) -> tuple[list[Tensor], list[int]]:
    size, kernel_dims = info.batch_size, dims[1] or [None] * len(kernels)
    shared = all(dim is None for dim in kernel_dims)
    # Kernels that differ along the mapped dimension become channels of their own.
    images = merge_into_batch(x, dims[0], size) if shared else merge_into_channels(x, dims[0], size)
    rects = kernels if shared else [merge_into_batch(kernel, dim, size) for kernel, dim in zip(kernels, kernel_dims)]
    out = 0 if shared else 1
    ys = depthwise_branches_op(images, rects, anchors, *options)
    return [y.unflatten(out, (size, -1)) for y in ys], [out] * len(ys)


def run_sum_of_branches(
    xs: Sequence[Tensor], kernels: Sequence[Tensor], anchors: Sequence[Anchor], options: CallOptions
) -> Tensor:
    """Compute `depthwise_sum_of_branches` without derivatives."""
    if is_ordinary_call() and are_ordinary(*xs, *kernels):
        return _sum_of_branches(xs, kernels, tuple(anchors), options)
    return depthwise_sum_of_branches_op(xs, kernels, flatten_anchors(anchors), *operator_options(options))


@register_implementation("depthwise_sum_of_branches")
def depthwise_sum_of_branches_op(
    xs: Sequence[Tensor],
    kernels: Sequence[Tensor],
    anchors: Sequence[int],
    backend: str | None,
    algorithm: Any,
    dilations: Sequence[int] = (),
) -> Tensor:
    """Compute `depthwise_sum_of_branches`; `anchors` is a flat list of numbers."""
    return _sum_of_branches(xs, kernels, unflatten_anchors(anchors), given_options(backend, algorithm, dilations))


def _sum_of_branches(xs: Sequence[Tensor], kernels: Sequence[Tensor], anchors: Anchors, options: CallOptions) -> Tensor:
    sizes = tuple([kernel.shape for kernel in kernels])
    key = dispatch_key(DEPTHWISE_SUM_OF_BRANCHES, xs[0], sizes, anchors, *options)
    choice = dispatch.registry.choices.get(key)
    if choice is None:
        algorithm = check_algorithm(options.algorithm)
        for x, kernel, anchor in zip(xs, kernels, anchors):
            check_sum(x, [kernel], [anchor], None, DEPTHWISE_SUM_OF_BRANCHES)
        check_dilations(options.dilations or None, len(kernels))

        def branch_by_branch(xs: Sequence[Tensor], kernels: Sequence[Tensor], anchors: Anchors) -> Tensor:
            total: Tensor | None = None
            # In the order in which autograd adds the gradients of separate calls, so that rounding is the same.
            for b, (x, kernel, anchor) in reversed(list(enumerate(zip(xs, kernels, anchors)))):
                part = run_sum(x, [kernel], (anchor,), options.of([b]))
                total = part if total is None else total.add_(part)
            assert total is not None
            return in_layout(total, memory_format(xs[0]))

        with on_gpu_of(xs[0]):
            problem = Problem.of_sum_of_branches(xs[0], kernels, anchors, algorithm, options.dilations)
            choice = choose_fused(key, problem, options.backend or None, branch_by_branch)
    return choice(xs, kernels, anchors)


@register_fake("depthwise_sum_of_branches")
def _(xs: Sequence[Tensor], kernels: Sequence[Tensor], anchors: Sequence[int], *options: Any) -> Tensor:
    return torch.empty_like(xs[0], memory_format=memory_format(xs[0]))


@torch.library.register_vmap("widekernel::depthwise_sum_of_branches", lib=LIBRARY)
def _(info: Any, dims: Any, xs: Any, kernels: Any, anchors: Any, *options: Any) -> tuple[Tensor, int]:
    size, x_dims, kernel_dims = info.batch_size, dims[0] or [None] * len(xs), dims[1] or [None] * len(kernels)
    shared = all(dim is None for dim in kernel_dims)
    merge = merge_into_batch if shared else merge_into_channels
    images = [merge(x, dim, size) for x, dim in zip(xs, x_dims)]
    rects = kernels if shared else [merge_into_batch(kernel, dim, size) for kernel, dim in zip(kernels, kernel_dims)]
    out = 0 if shared else 1
    return depthwise_sum_of_branches_op(images, rects, anchors, *options).unflatten(out, (size, -1)), out
