"""Several rectangles of one input, each with an output of its own: y_b = depthwise(x, kernel_b, anchor_b, dilation_b).

A backend that computes them fused reads the input once. On the others, every branch is an ordinary call of `depthwise_sum`,
dispatched, prepared and recorded as such. The input gradient is the sum of branches, y = Σ_b depthwise(x_b, kernel_b,
anchor_b, dilation_b), applied to the output gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from widekernel.ops import dispatch, traced_calls
from widekernel.ops.autograd import differentiable_branches, differentiable_sum
from widekernel.ops.checks import check_algorithm, check_dilations, check_sum
from widekernel.ops.dispatch import BackendChoice, dispatch_key, select_fused
from widekernel.ops.eager import find_sum, is_ordinary_call
from widekernel.ops.jit_trace import is_tracing
from widekernel.ops.problem import DEPTHWISE_BRANCHES, Anchor, Problem, center_anchors, mirror_anchors, only_dilated
from widekernel.ops.registration import CallOptions, autocast, needs_derivatives, on_gpu_of

_IS_FUSED = "branches are fused"


def depthwise_branches(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[Anchor] | None = None,
    *,
    backend: str | None = None,
    algorithm: str | None = None,
    dilations: Sequence[int] | None = None,
) -> list[Tensor]:
    """Convolve one input with each of several rectangular kernels: stride 1, same size.

        y_b[n, c, i, j] = Σ_uv kernels[b][c, 0, u, v] · x[n, c, i + (u - row_b)·d_b, j + (v - column_b)·d_b]

    Output b equals `depthwise_sum(x, [kernel_b], [anchor_b], dilations=[d_b])`. All outputs are computed in one call if a
    backend computes the branches fused, forward or backward; otherwise one after the other. Differentiable in `x` and
    `kernels`, to any order; an unused output costs no gradient. Under autocast, the arguments are converted to the autocast
    type.

    Args:
        x: (N, C, H, W), contiguous or channels_last; the results have the same layout.
        kernels: rectangles (C, 1, kh, kw) of any sizes.
        anchors: as in `depthwise_sum`.
        backend: as in `depthwise_sum`; if it does not compute branches fused, it computes them one by one.
        algorithm: as in `depthwise_sum`.
        dilations: as in `depthwise_sum`.

    Returns:
        a list of (N, C, H, W), one for each kernel.

    Raises:
        ValueError: if shapes, types, anchors or dilations do not fit together.
        NoBackendError: if no backend can compute the call, or the requested one cannot.
    """
    if is_ordinary_call() and (found := _find_separate_calls(x, kernels, anchors, backend, algorithm, dilations)):
        places = [choice.problem.anchors[0] for choice in found]
        options = CallOptions(backend, found[0].problem.algorithm, () if dilations is None else only_dilated(dilations))
        if not _are_one_call(x, kernels, places, options):
            if needs_derivatives(x, *kernels):
                return _separate_calls(x, kernels, places, options)
            return [choice(x, [k], (at,), None, None, False) for choice, k, at in zip(found, kernels, places)]
    options = CallOptions(backend or None, check_algorithm(algorithm), check_dilations(dilations, len(kernels)))
    if is_tracing():
        return traced_calls.depthwise_branches(x, kernels, anchors, options)
    anchors = center_anchors(kernels) if anchors is None else anchors
    x, kernels = autocast(x, kernels)
    check_sum(x, kernels, anchors, None, DEPTHWISE_BRANCHES)
    if len(kernels) == 1 or not _are_one_call(x, kernels, anchors, options):
        return _separate_calls(x, kernels, anchors, options)
    return list(differentiable_branches(x, kernels, tuple(map(tuple, anchors)), options))  # type: ignore[arg-type]


def _find_separate_calls(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[Anchor] | None,
    backend: str | None,
    algorithm: str | None,
    dilations: Sequence[int] | None,
) -> list[BackendChoice]:
    """Return the choices made for earlier calls of `depthwise_sum`, one per kernel; empty unless all are known."""
    if type(kernels) not in (list, tuple) or (anchors is not None and len(anchors) != len(kernels)):
        return []
    if dilations is not None and (type(dilations) not in (list, tuple) or len(dilations) != len(kernels)):
        return []
    found = []
    for i, kernel in enumerate(kernels):
        anchor = None if anchors is None else anchors[i : i + 1]
        dilation = None if dilations is None else dilations[i : i + 1]
        choice = find_sum(x, [kernel], anchor, None, None, backend, algorithm, dilation)
        if choice is None:
            return []
        found.append(choice)
    return found


def _separate_calls(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], options: CallOptions) -> list[Tensor]:
    rects = enumerate(zip(kernels, anchors))
    return [differentiable_sum(x, [kernel], [anchor], None, options.of([b])) for b, (kernel, anchor) in rects]


def _are_one_call(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], options: CallOptions) -> bool:
    """Return whether to call the operator of all branches: when a backend computes them fused, forward or backward, or may.

    Otherwise, separate calls of `depthwise_sum` cost less, and autograd adds their gradients to those of the other users of
    `x` one at a time, which determines the rounding.
    """
    # A compiled or exported program may run on another machine, and a transformed function sees other shapes inside. In some
    # versions, the compiler supports both at once only for functions with a fixed number of arguments.
    compiling, transformed = torch.compiler.is_compiling(), torch._C._are_functorch_transforms_active()
    if compiling or transformed:
        return not (compiling and transformed)
    places = tuple(tuple(anchor) for anchor in anchors)
    key = dispatch_key(_IS_FUSED, x, tuple([kernel.shape for kernel in kernels]), places, *options)
    registry = dispatch.registry
    try:
        is_fused = registry.choices.get(key)
    except TypeError:  # symbolic sizes have no hash
        return True
    if is_fused is None:
        problems = (
            Problem.of_branches(x, kernels, places, *options[1:]),  # type: ignore[arg-type]
            Problem.of_sum_of_branches(x, kernels, mirror_anchors(kernels, places), *options[1:]),  # type: ignore[arg-type]
        )
        with on_gpu_of(x):
            is_fused = any(select_fused(problem, options.backend) is not None for problem in problems)
        registry.remember(key, is_fused)
    return is_fused
