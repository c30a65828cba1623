"""The two operators and their registration with PyTorch.

Each is an opaque `torch.library` operator, so that compilation and export keep it whole, wrapped in an
`autograd.Function` with `setup_context` and `vmap`, so that `torch.func` transforms and higher derivatives work. There is
no `jvp`: forward-mode differentiation raises instead of returning a wrong zero tangent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from widekernel.ops.problem import (
    DEPTHWISE_SUM,
    DEPTHWISE_WEIGHT_GRAD,
    Anchor,
    Problem,
    check_sum,
    check_weight_grad,
    in_layout,
    is_channels_last,
    memory_format,
    middles,
    mirror,
)
from widekernel.ops.select import Explanation, explain_problem, record, select


def depthwise_sum(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[Anchor] | None = None,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Add up depthwise convolutions of one input with several rectangular kernels: stride 1, same size.

        y[n, c, i, j] = bias[c] + Σ_r Σ_uv kernels[r][c, 0, u, v] · x[n, c, i + u - row_r, j + v - column_r]

    Pixels outside the image are zero. Differentiable in `x`, `kernels` and `bias`, to any order; under autocast the
    arguments are converted to the autocast type, as for a convolution.

    Args:
        x: (N, C, H, W), contiguous or channels_last; the result has the same layout.
        kernels: rectangles (C, 1, kh, kw) of any sizes, even ones included.
        anchors: for each rectangle the (row, column) of the tap that sits on the output pixel; by default the middle
            one, `(kh // 2, kw // 2)`.
        bias: (C,) or None.
        backend: name of the backend that must compute the call and its gradients; by default the best one that can.

    Raises:
        ValueError: if shapes, types or anchors do not fit together.
        NoBackendError: if no backend, or not the one asked for, can compute the call.
    """
    kernels = list(kernels)
    anchors = middles(kernels) if anchors is None else anchors
    x, kernels, bias = _autocast(x, kernels, bias)
    check_sum(x, kernels, anchors, bias)
    geometry = tuple((k.shape[2], k.shape[3], int(row), int(column)) for k, (row, column) in zip(kernels, anchors))
    return _DepthwiseSum.apply(x, _joined(kernels), bias, geometry, backend or "")


def depthwise_weight_grad(
    x: Tensor, grad: Tensor, kernel_size: tuple[int, int], anchor: Anchor | None = None, *, backend: str | None = None
) -> Tensor:
    """Compute the gradient of one rectangle of `depthwise_sum`: the channel-wise correlation of input and gradient.

        w[c, 0, u, v] = Σ_nij grad[n, c, i, j] · x[n, c, i + u - row, j + v - column]

    Args:
        x: (N, C, H, W), the input of the forward pass.
        grad: (N, C, H, W), the gradient of its output.
        kernel_size: (kh, kw).
        anchor: (row, column), by default the middle tap.
        backend: as in `depthwise_sum`.

    Returns:
        (C, 1, kh, kw)
    """
    if anchor is None:
        anchor = (kernel_size[0] // 2, kernel_size[-1] // 2)
    check_weight_grad(x, grad, kernel_size, anchor)
    return _DepthwiseWeightGrad.apply(x, grad, (*kernel_size, *anchor), backend or "")


def explain(
    x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor] | None = None, *, backend: str | None = None
) -> list[Explanation]:
    """Say which backend computes a call of `depthwise_sum`, its input gradient and its weight gradients, and why.

    Takes the arguments of `depthwise_sum`; nothing is computed. The first explanation is for the forward pass, the second
    for the input gradient, the others for the weight gradient of each rectangle. Under autocast they speak of its type.
    """
    anchors = middles(kernels) if anchors is None else anchors
    x, kernels, _ = _autocast(x, list(kernels), None)
    check_sum(x, kernels, anchors, None)
    mirrored = [mirror(kernel.shape[2:], anchor) for kernel, anchor in zip(kernels, anchors)]
    problems = [_sum_problem(x, kernels, list(anchors)), _sum_problem(x, kernels, mirrored)]
    for kernel, anchor in zip(kernels, anchors):
        problems.append(_weight_grad_problem(x, (kernel.shape[2], kernel.shape[3]), anchor))
    return [explain_problem(problem, backend) for problem in problems]


def _autocast(x: Tensor, kernels: list[Tensor], bias: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor | None]:
    device = x.device.type
    # Asking about the meta device, which knows no autocast, is an error.
    if (
        device == "meta"
        or not torch.is_autocast_enabled(device)
        or x.dtype == torch.float64
        or not x.dtype.is_floating_point
    ):
        return x, kernels, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), [kernel.to(dtype) for kernel in kernels], None if bias is None else bias.to(dtype)


def _sum_problem(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> Problem:
    sizes = tuple((kernel.shape[2], kernel.shape[3]) for kernel in kernels)
    batch, channels, height, width = x.shape
    shape = (batch, channels, height, width)
    return Problem(DEPTHWISE_SUM, x.device.type, x.dtype, shape, sizes, tuple(anchors), is_channels_last(x))


def _weight_grad_problem(x: Tensor, kernel: tuple[int, int], anchor: Anchor) -> Problem:
    batch, channels, height, width = x.shape
    shape = (batch, channels, height, width)
    return Problem(DEPTHWISE_WEIGHT_GRAD, x.device.type, x.dtype, shape, (kernel,), (anchor,), is_channels_last(x))


def _pairs(flat: Sequence[int]) -> list[Anchor]:
    return list(zip(flat[::2], flat[1::2]))


@torch.library.custom_op("widekernel::depthwise_sum", mutates_args=())
def _depthwise_sum_op(
    x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[int], bias: Tensor | None, backend: str
) -> Tensor:
    problem = _sum_problem(x, kernels, _pairs(anchors))
    chosen = select(problem, backend or None)
    record(chosen.name, problem)
    return in_layout(chosen.depthwise_sum(x, kernels, _pairs(anchors), bias), memory_format(x))


@_depthwise_sum_op.register_fake
def _(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[int], bias: Tensor | None, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


@torch.library.custom_op("widekernel::depthwise_weight_grad", mutates_args=())
def _depthwise_weight_grad_op(x: Tensor, grad: Tensor, geometry: Sequence[int], backend: str) -> Tensor:
    kh, kw, row, column = geometry
    problem = _weight_grad_problem(x, (kh, kw), (row, column))
    chosen = select(problem, backend or None)
    record(chosen.name, problem)
    return chosen.depthwise_weight_grad(x, grad, (kh, kw), (row, column))


@_depthwise_weight_grad_op.register_fake
def _(x: Tensor, grad: Tensor, geometry: Sequence[int], backend: str) -> Tensor:
    return x.new_empty(x.shape[1], 1, geometry[0], geometry[1])


# (kh, kw, anchor row, anchor column) of every rectangle
_Geometry = tuple[tuple[int, int, int, int], ...]


class _DepthwiseSum(torch.autograd.Function):
    """The autograd rule of `depthwise_sum`; its input gradient is itself with flipped kernels and mirrored anchors.

    The kernels come as one tensor of taps (C, Σ kh·kw): a fixed number of arguments, which every version of the compiler
    can trace.
    """

    @staticmethod
    def forward(x: Tensor, taps: Tensor, bias: Tensor | None, geometry: _Geometry, backend: str) -> Tensor:
        anchors = [a for _, _, row, column in geometry for a in (row, column)]
        return _depthwise_sum_op(x, _parted(taps, geometry), anchors, bias, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, taps, _bias, ctx.geometry, ctx.backend = inputs
        ctx.save_for_backward(x, taps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, taps = ctx.saved_tensors
        grad = grad.contiguous(memory_format=memory_format(x))
        for_x = for_taps = for_bias = None
        if ctx.needs_input_grad[0]:
            flipped = _joined([kernel.flip(-1, -2) for kernel in _parted(taps, ctx.geometry)])
            mirrored = tuple((kh, kw, *mirror((kh, kw), (row, column))) for kh, kw, row, column in ctx.geometry)
            for_x = _DepthwiseSum.apply(grad, flipped, None, mirrored, ctx.backend)
        if ctx.needs_input_grad[1]:
            for_taps = _joined([_DepthwiseWeightGrad.apply(x, grad, rect, ctx.backend) for rect in ctx.geometry])
        if ctx.needs_input_grad[2]:
            for_bias = grad.sum((0, 2, 3))
        return for_x, for_taps, for_bias, None, None

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], x: Tensor, taps: Tensor, bias: Any, geometry: _Geometry, backend: str
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        if dims[1] is None and dims[2] is None:
            y = _DepthwiseSum.apply(x.movedim(dims[0], 0).flatten(0, 1), taps, bias, geometry, backend)
            return y.unflatten(0, (size, -1)), 0
        # Kernels that differ along the mapped dimension become channels of their own.
        planes = _into_channels(_mapped(x, dims[0], size))
        wide = _mapped(taps, dims[1], size).flatten(0, 1)
        shift = None if bias is None else _mapped(bias, dims[2], size).flatten(0, 1)
        return _DepthwiseSum.apply(planes, wide, shift, geometry, backend).unflatten(1, (size, -1)), 1


class _DepthwiseWeightGrad(torch.autograd.Function):
    """The autograd rule of `depthwise_weight_grad`, which is bilinear: both its gradients are `depthwise_sum`."""

    @staticmethod
    def forward(x: Tensor, grad: Tensor, geometry: tuple[int, int, int, int], backend: str) -> Tensor:
        return _depthwise_weight_grad_op(x, grad, geometry, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, grad, ctx.geometry, ctx.backend = inputs
        ctx.save_for_backward(x, grad)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, grad = ctx.saved_tensors
        kernel, anchor = ctx.geometry[:2], ctx.geometry[2:]
        for_x = for_grad = None
        if ctx.needs_input_grad[0]:
            flipped = cotangent.flip(-1, -2).flatten(1)
            for_x = _DepthwiseSum.apply(grad, flipped, None, ((*kernel, *mirror(kernel, anchor)),), ctx.backend)
        if ctx.needs_input_grad[1]:
            for_grad = _DepthwiseSum.apply(x, cotangent.flatten(1), None, (ctx.geometry,), ctx.backend)
        return for_x, for_grad, None, None

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], x: Tensor, grad: Tensor, geometry: Any, backend: str) -> tuple[Tensor, int]:
        size = info.batch_size
        planes, grads = (_into_channels(_mapped(t, dim, size)) for t, dim in zip((x, grad), dims))
        return _DepthwiseWeightGrad.apply(planes, grads, geometry, backend).unflatten(0, (size, -1)), 0


def _joined(kernels: Sequence[Tensor]) -> Tensor:
    """Turn kernels (C, 1, kh, kw) into taps (C, Σ kh·kw)."""
    flat = [kernel.flatten(1) for kernel in kernels]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


def _parted(taps: Tensor, geometry: _Geometry) -> list[Tensor]:
    """Turn taps (C, Σ kh·kw) back into kernels (C, 1, kh, kw)."""
    parts = taps.split([kh * kw for kh, kw, _, _ in geometry], 1)
    return [part.unflatten(1, (1, kh, kw)).contiguous() for part, (kh, kw, _, _) in zip(parts, geometry)]


def _mapped(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _into_channels(x: Tensor) -> Tensor:
    """Turn (B, N, C, H, W) into (N, B·C, H, W)."""
    return x.transpose(0, 1).flatten(1, 2)
