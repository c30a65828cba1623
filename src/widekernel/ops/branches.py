"""Several rectangles of one input, each with an output of its own; and its adjoint, the sum over inputs of their own.

    branches           y_b = depthwise(x, kernel_b, anchor_b)
    sum of branches    y = Σ_b depthwise(x_b, kernel_b, anchor_b)

The gradient of either in its images is the other, with flipped kernels and mirrored anchors. A backend that has them reads
or writes the shared image once. On the others every branch is an ordinary call of `depthwise_sum`, chosen, prepared and
recorded as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from widekernel.ops import tracing
from widekernel.ops.depthwise import depthwise_sum_op, grad_of_one, of_one, summed
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    Anchor,
    Problem,
    check_algorithm,
    check_sum,
    in_layout,
    memory_format,
    middles,
    mirror,
)
from widekernel.ops.registration import (
    LIBRARY,
    How,
    autocast,
    chosen_for,
    define,
    differentiated,
    facts,
    flattened,
    has_batched_gradients,
    implements,
    into_batch,
    into_channels,
    pairs,
    promises,
)
from widekernel.ops.select import fused, prepare, prepared, remember


def depthwise_branches(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[Anchor] | None = None,
    *,
    backend: str | None = None,
    algorithm: str | None = None,
) -> list[Tensor]:
    """Convolve one input with each of several rectangular kernels: stride 1, same size.

        y_b[n, c, i, j] = Σ_uv kernels[b][c, 0, u, v] · x[n, c, i + u - row_b, j + v - column_b]

    The values of `depthwise_sum(x, [kernel_b], [anchor_b])` for every b, in one call where a backend has one for them, its
    gradients included; otherwise one after the other. Differentiable in `x` and `kernels`, to any order; an output that is
    not used costs no gradient. Under autocast the arguments are converted to the autocast type.

    Args:
        x: (N, C, H, W), contiguous or channels_last; the results have the same layout.
        kernels: rectangles (C, 1, kh, kw) of any sizes.
        anchors: as in `depthwise_sum`.
        backend: as in `depthwise_sum`; one that computes branches only one by one does that.
        algorithm: as in `depthwise_sum`.

    Returns:
        a list of (N, C, H, W), one for each kernel.

    Raises:
        ValueError: if shapes, types or anchors do not fit together.
        NoBackendError: if no backend, or not the one asked for, can compute the call.
    """
    if torch._C._get_tracing_state() is not None:
        return tracing.depthwise_branches(x, kernels, anchors, backend, algorithm)
    anchors = middles(kernels) if anchors is None else anchors
    x, kernels = autocast(x, kernels)
    how = How(backend or "", algorithm or "")
    check_algorithm(how.algorithm)
    check_sum(x, kernels, anchors, None, DEPTHWISE_BRANCHES)
    if len(kernels) == 1 or not _at_once(x, kernels, anchors, how):
        return [summed(x, [kernel], [anchor], None, how) for kernel, anchor in zip(kernels, anchors)]
    return list(_branches(x, kernels, tuple(tuple(anchor) for anchor in anchors), how))  # type: ignore[misc]


def _at_once(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], how: How) -> bool:
    """Whether to call the operator for all branches: if a backend is fused forward or backward, or one cannot know yet.

    Otherwise calls of `depthwise_sum` do the same for less, and autograd adds their gradients to those of the other users of
    `x` one at a time, which fixes the last bit.
    """
    # What is compiled or exported here may run elsewhere, and what is transformed has another shape inside. Of both at the
    # same time the compiler of some versions is able only with functions of a fixed number of arguments.
    compiling, transformed = torch.compiler.is_compiling(), torch._C._are_functorch_transforms_active()
    if compiling or transformed:
        return not (compiling and transformed)
    numbers = flattened(anchors)
    key = ("at once", *facts(x), tuple([kernel.shape for kernel in kernels]), tuple(numbers), *how)
    try:
        known = prepared(key)
    except TypeError:  # sizes that are symbols have no hash
        return True
    if known is None:
        problems = (
            Problem.of_branches(x, kernels, pairs(numbers), how.algorithm),
            Problem.of_sum_of_branches(x, kernels, _mirrored(kernels, pairs(numbers)), how.algorithm),
        )
        with chosen_for(x):
            known = remember(key, any(fused(problem, how.backend or None) is not None for problem in problems))
    return bool(known)


def _mirrored(kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> tuple[Anchor, ...]:
    return tuple(mirror(kernel.shape[2:], anchor) for kernel, anchor in zip(kernels, anchors))


define("depthwise_branches", "Tensor x, Tensor[] kernels, SymInt[] anchors", "Tensor[]")
define("depthwise_sum_of_branches", "Tensor[] xs, Tensor[] kernels, SymInt[] anchors")


@implements("depthwise_branches")
def _branches_op(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[int], backend: str, algorithm: str) -> list[Tensor]:
    sizes = tuple([kernel.shape for kernel in kernels])
    key = ("branches", *facts(x), sizes, tuple(anchors), backend, algorithm)
    run = prepared(key)
    if run is None:

        def one_by_one(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> list[Tensor]:
            rects = zip(kernels, anchors)
            return [depthwise_sum_op(x, [kernel], anchor, None, None, False, backend, algorithm) for kernel, anchor in rects]

        with chosen_for(x):
            run = prepare(key, Problem.of_branches(x, kernels, pairs(anchors), algorithm), backend, one_by_one)
    return run(x, kernels, pairs(anchors))


@promises("depthwise_branches")
def _(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[int], backend: str, algorithm: str) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=memory_format(x)) for _ in kernels]


@torch.library.register_vmap("widekernel::depthwise_branches", lib=LIBRARY)
def _(
    info: Any, dims: Any, x: Tensor, kernels: Any, anchors: Any, backend: str, algorithm: str
) -> tuple[list[Tensor], list[int]]:
    size, of_kernels = info.batch_size, dims[1] or [None] * len(kernels)
    shared = all(dim is None for dim in of_kernels)
    # Kernels that differ along the mapped dimension become channels of their own.
    planes = into_batch(x, dims[0], size) if shared else into_channels(x, dims[0], size)
    wide = kernels if shared else [into_batch(kernel, dim, size) for kernel, dim in zip(kernels, of_kernels)]
    out = 0 if shared else 1
    ys = _branches_op(planes, wide, anchors, backend, algorithm)
    return [y.unflatten(out, (size, -1)) for y in ys], [out] * len(ys)


@implements("depthwise_sum_of_branches")
def _sum_of_branches_op(
    xs: Sequence[Tensor], kernels: Sequence[Tensor], anchors: Sequence[int], backend: str, algorithm: str
) -> Tensor:
    sizes = tuple([kernel.shape for kernel in kernels])
    key = ("sum of branches", *facts(xs[0]), sizes, tuple(anchors), backend, algorithm)
    run = prepared(key)
    if run is None:

        def one_by_one(xs: Sequence[Tensor], kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> Tensor:
            total: Tensor | None = None
            # In the order in which autograd adds the gradients of separate calls, so that the last bit is the same.
            for x, kernel, anchor in reversed(list(zip(xs, kernels, anchors))):
                part = depthwise_sum_op(x, [kernel], anchor, None, None, False, backend, algorithm)
                total = part if total is None else total.add_(part)
            assert total is not None
            return in_layout(total, memory_format(xs[0]))

        with chosen_for(xs[0]):
            run = prepare(key, Problem.of_sum_of_branches(xs[0], kernels, pairs(anchors), algorithm), backend, one_by_one)
    return run(xs, kernels, pairs(anchors))


@promises("depthwise_sum_of_branches")
def _(xs: Sequence[Tensor], kernels: Sequence[Tensor], anchors: Sequence[int], backend: str, algorithm: str) -> Tensor:
    return torch.empty_like(xs[0], memory_format=memory_format(xs[0]))


@torch.library.register_vmap("widekernel::depthwise_sum_of_branches", lib=LIBRARY)
def _(info: Any, dims: Any, xs: Any, kernels: Any, anchors: Any, backend: str, algorithm: str) -> tuple[Tensor, int]:
    size, of_xs, of_kernels = info.batch_size, dims[0] or [None] * len(xs), dims[1] or [None] * len(kernels)
    shared = all(dim is None for dim in of_kernels)
    planes = [into_batch(x, d, size) if shared else into_channels(x, d, size) for x, d in zip(xs, of_xs)]
    wide = kernels if shared else [into_batch(kernel, dim, size) for kernel, dim in zip(kernels, of_kernels)]
    out = 0 if shared else 1
    return _sum_of_branches_op(planes, wide, anchors, backend, algorithm).unflatten(out, (size, -1)), out


class _DepthwiseBranches(torch.autograd.Function):
    """The autograd rule of `depthwise_branches`; its input gradient is `depthwise_sum_of_branches`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, anchors: tuple[Anchor, ...], how: How, *kernels: Tensor) -> tuple[Tensor, ...]:
        return tuple(_branches_op(x, list(kernels), flattened(anchors), *how))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.anchors, ctx.how, *kernels = inputs
        ctx.save_for_backward(x, *kernels)
        # An output that nobody differentiated gives None instead of zeros, for which nothing need be computed.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *kernels = ctx.saved_tensors
        for_x: Tensor | None = None
        for_kernels: list[Tensor | None] = [None] * len(kernels)
        used = [b for b, grad in enumerate(grads) if grad is not None]
        if ctx.needs_input_grad[0] and used:
            rects = [kernels[b] for b in used]
            mirrored = _mirrored(rects, [ctx.anchors[b] for b in used])
            flipped = [kernel.flip(-1, -2) for kernel in rects]
            for_x = _sum_of_branches([grads[b] for b in used], flipped, mirrored, ctx.how)  # type: ignore[misc]
        for b in used:
            if ctx.needs_input_grad[3 + b]:
                for_kernels[b] = grad_of_one(x, grads[b], kernels[b], ctx.anchors[b], ctx.how)  # type: ignore[arg-type]
        return for_x, None, None, *for_kernels


class _DepthwiseSumOfBranches(torch.autograd.Function):
    """The autograd rule of `depthwise_sum_of_branches`, called with all inputs and then all kernels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(anchors: tuple[Anchor, ...], how: How, *tensors: Tensor) -> Tensor:
        count = len(anchors)
        return _sum_of_branches_op(list(tensors[:count]), list(tensors[count:]), flattened(anchors), *how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.anchors, ctx.how, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        count = len(ctx.anchors)
        xs, kernels = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        gradients: list[Tensor | None] = [None] * (2 * count)
        wanted = [b for b in range(count) if ctx.needs_input_grad[2 + b]]
        if wanted:
            rects = [kernels[b] for b in wanted]
            mirrored = _mirrored(rects, [ctx.anchors[b] for b in wanted])
            flipped = [kernel.flip(-1, -2) for kernel in rects]
            for b, for_x in zip(wanted, _branches(grad, flipped, mirrored, ctx.how)):
                gradients[b] = for_x
        for b in range(count):
            if ctx.needs_input_grad[2 + count + b]:
                gradients[count + b] = grad_of_one(xs[b], grad, kernels[b], ctx.anchors[b], ctx.how)
        return None, None, *gradients


def _branches(x: Tensor, kernels: Sequence[Tensor], anchors: tuple[Anchor, ...], how: How) -> Sequence[Tensor]:
    """Compute the branches of checked arguments, differentiably."""
    if len(kernels) == 1 or has_batched_gradients(x, *kernels):
        return [of_one(x, kernel, anchor, how) for kernel, anchor in zip(kernels, anchors)]
    # The compiler of some versions cannot trace a function of any number of arguments unless there is a gradient to take.
    if not differentiated(x, *kernels):
        return _branches_op(x, kernels, flattened(anchors), *how)
    return _DepthwiseBranches.apply(x, anchors, how, *kernels)


def _sum_of_branches(xs: Sequence[Tensor], kernels: Sequence[Tensor], anchors: tuple[Anchor, ...], how: How) -> Tensor:
    """Compute the sum of branches, differentiably."""
    if len(kernels) == 1 or has_batched_gradients(*xs, *kernels):
        parts = [of_one(x, kernel, anchor, how) for x, kernel, anchor in zip(xs, kernels, anchors)]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    if not differentiated(*xs, *kernels):
        return _sum_of_branches_op(xs, kernels, flattened(anchors), *how)
    return _DepthwiseSumOfBranches.apply(anchors, how, *xs, *kernels)
