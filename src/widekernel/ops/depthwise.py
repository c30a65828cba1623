"""The sum of rectangles and the gradient of a rectangle, and their registration with PyTorch.

Each is an opaque `torch.library` operator with a batching rule, so that compilation and export keep it whole, wrapped in an
`autograd.Function` with `setup_context`, so that `torch.func` transforms and higher derivatives work. There is no `jvp`:
forward-mode differentiation raises instead of returning a wrong zero tangent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widekernel.ops import tracing
from widekernel.ops.problem import (
    Anchor,
    Problem,
    check_algorithm,
    check_epilogue,
    check_sum,
    check_weight_grad,
    memory_format,
    middles,
    mirror,
)
from widekernel.ops.reference import epilogue
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
from widekernel.ops.select import prepare, prepared


def depthwise_sum(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[Anchor] | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    relu: bool = False,
    backend: str | None = None,
    algorithm: str | None = None,
) -> Tensor:
    """Add up depthwise convolutions of one input with several rectangular kernels: stride 1, same size.

        s[n, c, i, j] = Σ_r Σ_uv kernels[r][c, 0, u, v] · x[n, c, i + u - row_r, j + v - column_r]
        y[n, c, i, j] = scale[c] · s[n, c, i, j] + bias[c], and of that the positive part if `relu`

    Pixels outside the image are zero. Differentiable in every tensor, to any order; under autocast the arguments are
    converted to the autocast type, as for a convolution. Where no gradient is asked for, our kernels apply scale, bias and
    rectifier before they store, which saves a pass over the image; otherwise the sum is rounded to the type of `x` first.

    Args:
        x: (N, C, H, W), contiguous or channels_last; the result has the same layout.
        kernels: rectangles (C, 1, kh, kw) of any sizes, even ones included.
        anchors: for each rectangle the (row, column) of the tap that sits on the output pixel; by default the middle
            one, `(kh // 2, kw // 2)`.
        bias: (C,) or None.
        scale: (C,) or None; with `bias` the affine map of a batch norm in evaluation.
        relu: whether negative numbers become zero.
        backend: name of the backend that must compute the call and its gradients; by default the best one that can.
        algorithm: "direct" for sums over the pixels under the kernel and nothing else, in the gradients too; by default the
            fastest, which on a CPU may be a Fourier transform of whole rows: its error is relative to the largest value of
            a row, and one NaN or infinity reaches all of it.

    Raises:
        ValueError: if shapes, types or anchors do not fit together.
        NoBackendError: if no backend, or not the one asked for, can compute the call.
    """
    if torch._C._get_tracing_state() is not None:
        return tracing.depthwise_sum(x, kernels, anchors, bias, scale, relu, backend, algorithm)
    anchors = middles(kernels) if anchors is None else anchors
    x, kernels, bias, scale = autocast(x, kernels, bias, scale)
    how = How(backend or "", algorithm or "")
    check_algorithm(how.algorithm)
    check_sum(x, kernels, anchors, bias)
    check_epilogue(x, scale, relu)
    if not differentiated(x, bias, scale, *kernels):
        return depthwise_sum_op(x, kernels, flattened(anchors), bias, scale, relu, *how)
    if scale is None:
        return epilogue(summed(x, kernels, anchors, bias, how), None, None, relu)
    return epilogue(summed(x, kernels, anchors, None, how), scale, bias, relu)


def depthwise_weight_grad(
    x: Tensor,
    grad: Tensor,
    kernel_size: tuple[int, int],
    anchor: Anchor | None = None,
    *,
    backend: str | None = None,
    algorithm: str | None = None,
) -> Tensor:
    """Compute the gradient of one rectangle of `depthwise_sum`: the channel-wise correlation of input and gradient.

        w[c, 0, u, v] = Σ_nij grad[n, c, i, j] · x[n, c, i + u - row, j + v - column]

    Args:
        x: (N, C, H, W), the input of the forward pass.
        grad: (N, C, H, W), the gradient of its output.
        kernel_size: (kh, kw).
        anchor: (row, column), by default the middle tap.
        backend: as in `depthwise_sum`.
        algorithm: as in `depthwise_sum`.

    Returns:
        (C, 1, kh, kw)
    """
    if torch._C._get_tracing_state() is not None:
        return tracing.depthwise_weight_grad(x, grad, kernel_size, anchor, backend, algorithm)
    if anchor is None:
        anchor = (kernel_size[0] // 2, kernel_size[-1] // 2)
    how = How(backend or "", algorithm or "")
    check_algorithm(how.algorithm)
    check_weight_grad(x, grad, kernel_size, anchor)
    geometry = (*kernel_size, *anchor)
    if not differentiated(x, grad):
        return _depthwise_weight_grad_op(x, grad, geometry, *how)
    return _DepthwiseWeightGrad.apply(x, grad, geometry, how)


def summed(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], bias: Tensor | None, how: How) -> Tensor:
    """Compute `depthwise_sum` with derivatives, if any is wanted, of arguments that were converted and checked."""
    if not differentiated(x, bias, *kernels):
        return depthwise_sum_op(x, kernels, flattened(anchors), bias, None, False, *how)
    geometry = tuple((k.shape[2], k.shape[3], *anchor) for k, anchor in zip(kernels, anchors))
    # Under a function transform a tensor does not know what the outer levels ask of it.
    transformed = torch._C._are_functorch_transforms_active()
    trained = tuple(transformed or kernel.requires_grad for kernel in kernels)
    return _DepthwiseSum.apply(x, _joined(kernels), bias, _Call(geometry, trained, how))


def of_one(x: Tensor, kernel: Tensor, anchor: Anchor, how: How) -> Tensor:
    """Compute the convolution with one rectangle in a form that takes batched gradients too."""
    call = _Call(((kernel.shape[2], kernel.shape[3], *anchor),), (True,), how)
    return _DepthwiseSum.apply(x, _joined([kernel]), None, call)


def grad_of_one(x: Tensor, grad: Tensor, kernel: Tensor, anchor: Anchor, how: How) -> Tensor:
    """Compute the gradient of that in the rectangle."""
    return _DepthwiseWeightGrad.apply(x, grad, (kernel.shape[2], kernel.shape[3], *anchor), how)


define("depthwise_sum", "Tensor x, Tensor[] kernels, SymInt[] anchors, Tensor? bias, Tensor? scale, bool relu")
define("depthwise_weight_grad", "Tensor x, Tensor grad, SymInt[] geometry")
define("depthwise_sum_of_taps", "Tensor x, Tensor taps, SymInt[] geometry")


@implements("depthwise_sum")
def depthwise_sum_op(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[int],
    bias: Tensor | None,
    scale: Tensor | None,
    relu: bool,
    backend: str,
    algorithm: str,
) -> Tensor:
    """Compute `depthwise_sum` without derivatives; the anchors are one list of numbers."""
    sizes = tuple([kernel.shape for kernel in kernels])
    key = ("sum", *facts(x), sizes, tuple(anchors), backend, algorithm)
    run = prepared(key)
    if run is None:
        with chosen_for(x):
            run = prepare(key, Problem.of_sum(x, kernels, pairs(anchors), algorithm), backend)
    return run(x, kernels, pairs(anchors), bias, scale, relu)


@promises("depthwise_sum")
def _(x: Tensor, kernels: Any, anchors: Any, bias: Any, scale: Any, relu: bool, backend: str, algorithm: str) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


@torch.library.register_vmap("widekernel::depthwise_sum", lib=LIBRARY)
def _(
    info: Any, dims: Any, x: Tensor, kernels: Any, anchors: Any, bias: Any, scale: Any, relu: bool, *how: str
) -> tuple[Tensor, int]:
    size, of_kernels = info.batch_size, dims[1] or [None] * len(kernels)
    if dims[3] is None and dims[4] is None and all(dim is None for dim in of_kernels):
        y = depthwise_sum_op(into_batch(x, dims[0], size), kernels, anchors, bias, scale, relu, *how)
        return y.unflatten(0, (size, -1)), 0
    # Kernels that differ along the mapped dimension become channels of their own.
    planes = into_channels(x, dims[0], size)
    wide = [into_batch(kernel, dim, size) for kernel, dim in zip(kernels, of_kernels)]
    shift, factor = (None if v is None else into_batch(v, dim, size) for v, dim in zip((bias, scale), dims[3:5]))
    return depthwise_sum_op(planes, wide, anchors, shift, factor, relu, *how).unflatten(1, (size, -1)), 1


@implements("depthwise_weight_grad")
def _depthwise_weight_grad_op(x: Tensor, grad: Tensor, geometry: Sequence[int], backend: str, algorithm: str) -> Tensor:
    kh, kw, row, column = geometry
    key = ("weight grad", *facts(x), tuple(geometry), backend, algorithm)
    run = prepared(key)
    if run is None:
        with chosen_for(x):
            run = prepare(key, Problem.of_weight_grad(x, (kh, kw), (row, column), algorithm), backend)
    return run(x, grad, (kh, kw), (row, column))


@promises("depthwise_weight_grad")
def _(x: Tensor, grad: Tensor, geometry: Sequence[int], backend: str, algorithm: str) -> Tensor:
    return x.new_empty(x.shape[1], 1, geometry[0], geometry[1])


@torch.library.register_vmap("widekernel::depthwise_weight_grad", lib=LIBRARY)
def _(info: Any, dims: Any, x: Tensor, grad: Tensor, geometry: Any, backend: str, algorithm: str) -> tuple[Tensor, int]:
    size = info.batch_size
    planes, grads = into_channels(x, dims[0], size), into_channels(grad, dims[1], size)
    return _depthwise_weight_grad_op(planes, grads, geometry, backend, algorithm).unflatten(0, (size, -1)), 0


@implements("depthwise_sum_of_taps")
def _depthwise_sum_of_taps_op(x: Tensor, taps: Tensor, geometry: Sequence[int], backend: str, algorithm: str) -> Tensor:
    """Take the kernels in one tensor: for batched gradients PyTorch repeats an operator, but not one that takes a list."""
    rects = tuple(zip(geometry[::4], geometry[1::4], geometry[2::4], geometry[3::4]))
    return _DepthwiseSum.forward(x, taps, None, _Call(rects, (), How(backend, algorithm)))


@promises("depthwise_sum_of_taps")
def _(x: Tensor, taps: Tensor, geometry: Sequence[int], backend: str, algorithm: str) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


class _Call(NamedTuple):
    """What a call is made of besides tensors.

    Attributes:
        geometry: (kh, kw, anchor row, anchor column) of every rectangle.
        trained: which of the kernels want a gradient.
        how: backend and algorithm.
    """

    geometry: tuple[tuple[int, int, int, int], ...]
    trained: tuple[bool, ...]
    how: How

    def mirrored(self) -> _Call:
        """Give the call that computes the input gradient."""
        rects = ((kh, kw, *mirror((kh, kw), (row, column))) for kh, kw, row, column in self.geometry)
        return self._replace(geometry=tuple(rects))


class _DepthwiseSum(torch.autograd.Function):
    """The autograd rule of `depthwise_sum`; its input gradient is itself with flipped kernels and mirrored anchors.

    The kernels come as one tensor of taps (C, Σ kh·kw): a fixed number of arguments, which every version of the compiler
    can trace.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, taps: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
        if has_batched_gradients(x, taps):
            y = _depthwise_sum_of_taps_op(x, taps, [number for rect in call.geometry for number in rect], *call.how)
            return y if bias is None else y + bias.view(-1, 1, 1)
        anchors = [a for _, _, row, column in call.geometry for a in (row, column)]
        return depthwise_sum_op(x, _parted(taps, call), anchors, bias, None, False, *call.how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, taps, _bias, ctx.call = inputs
        ctx.save_for_backward(x, taps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, taps = ctx.saved_tensors
        call = ctx.call
        for_x = for_taps = for_bias = None
        if ctx.needs_input_grad[0]:
            flipped = _joined([kernel.flip(-1, -2) for kernel in _parted(taps, call)])
            for_x = _DepthwiseSum.apply(grad, flipped, None, call.mirrored())
        if ctx.needs_input_grad[1]:
            for_taps = _joined(
                [
                    _DepthwiseWeightGrad.apply(x, grad, rect, call.how)
                    if trained
                    else taps.new_zeros(taps.shape[0], 1, *rect[:2])
                    for rect, trained in zip(call.geometry, call.trained)
                ]
            )
        if ctx.needs_input_grad[2]:
            for_bias = grad.sum((0, 2, 3))
        return for_x, for_taps, for_bias, None


class _DepthwiseWeightGrad(torch.autograd.Function):
    """The autograd rule of `depthwise_weight_grad`, which is bilinear: both its gradients are `depthwise_sum`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, grad: Tensor, geometry: tuple[int, int, int, int], how: How) -> Tensor:
        return _depthwise_weight_grad_op(x, grad, geometry, *how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, grad, ctx.geometry, ctx.how = inputs
        ctx.save_for_backward(x, grad)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, grad = ctx.saved_tensors
        call = _Call((ctx.geometry,), (True,), ctx.how)
        for_x = for_grad = None
        if ctx.needs_input_grad[0]:
            for_x = _DepthwiseSum.apply(grad, _joined([cotangent.flip(-1, -2)]), None, call.mirrored())
        if ctx.needs_input_grad[1]:
            for_grad = _DepthwiseSum.apply(x, _joined([cotangent]), None, call)
        return for_x, for_grad, None, None


def _joined(kernels: Sequence[Tensor]) -> Tensor:
    """Turn kernels (C, 1, kh, kw) into taps (C, Σ kh·kw)."""
    flat = [kernel.reshape(kernel.shape[0], kernel.shape[2] * kernel.shape[3]) for kernel in kernels]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


def _parted(taps: Tensor, call: _Call) -> list[Tensor]:
    """Turn taps (C, Σ kh·kw) back into kernels (C, 1, kh, kw)."""
    sizes = [(kh, kw) for kh, kw, _, _ in call.geometry]
    parts = taps.split([kh * kw for kh, kw in sizes], 1)
    return [part.reshape(taps.shape[0], 1, kh, kw) for part, (kh, kw) in zip(parts, sizes)]
