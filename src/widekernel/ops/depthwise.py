"""The public functions `depthwise_sum` and `depthwise_weight_grad`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from widekernel.ops import traced_calls
from widekernel.ops.autograd import differentiable_sum, differentiable_weight_grad
from widekernel.ops.checks import (
    check_algorithm,
    check_dilation,
    check_dilations,
    check_epilogue,
    check_sum,
    check_weight_grad,
)
from widekernel.ops.eager import find_sum, is_ordinary_call
from widekernel.ops.jit_trace import is_tracing
from widekernel.ops.operators import run_sum
from widekernel.ops.problem import Anchor, center_anchors, only_dilated
from widekernel.ops.reference import epilogue
from widekernel.ops.registration import CallOptions, autocast, needs_derivatives


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
    dilations: Sequence[int] | None = None,
) -> Tensor:
    """Add up depthwise convolutions of one input with several rectangular kernels: stride 1, same size.

        s[n, c, i, j] = Σ_r Σ_uv kernels[r][c, 0, u, v] · x[n, c, i + (u - row_r)·d_r, j + (v - column_r)·d_r]
        y[n, c, i, j] = scale[c] · s[n, c, i, j] + bias[c], followed by ReLU if `relu`

    Pixels outside the image are zero. Differentiable in every tensor, to any order. Under autocast, the arguments are
    converted to the autocast type, as for a convolution. If no gradient is needed, our kernels apply scale, bias and ReLU
    before they store the result, which saves a pass over the image; otherwise the sum is first rounded to the type of `x`.

    Args:
        x: (N, C, H, W), contiguous or channels_last; the result has the same layout.
        kernels: rectangles (C, 1, kh, kw) of any sizes, even ones included.
        anchors: for each rectangle the (row, column) of the tap that sits on the output pixel; by default the middle
            one, `(kh // 2, kw // 2)`.
        bias: (C,) or None.
        scale: (C,) or None; with `bias` the affine map of a batch norm in evaluation.
        relu: whether to apply ReLU.
        backend: name of the backend that must compute the call and its gradients; by default the best one that can.
        algorithm: "direct" restricts each sum to the pixels under the kernel, in the gradients too. The default is the
            fastest algorithm, which on a CPU may be a Fourier transform of whole rows: its error is then relative to the
            largest value in the row, and one NaN or infinity spreads to the whole row.
        dilations: for each rectangle the distance d between neighboring taps in pixels, along both axes; by default 1.

    Raises:
        ValueError: if shapes, types, anchors or dilations do not fit together.
        NoBackendError: if no backend can compute the call, or the requested one cannot.
    """
    if is_ordinary_call() and (relu is False or relu is True):
        found = find_sum(x, kernels, anchors, bias, scale, backend, algorithm, dilations)
        if found is not None:
            places = found.problem.anchors
            if not needs_derivatives(x, bias, scale, *kernels):
                return found(x, kernels, places, bias, scale, relu)
            gaps = () if dilations is None else only_dilated(dilations)
            options = CallOptions(backend, found.problem.algorithm, gaps)
            return _differentiable(x, kernels, places, bias, scale, relu, options)
    options = CallOptions(backend or None, check_algorithm(algorithm), check_dilations(dilations, len(kernels)))
    if is_tracing():
        return traced_calls.depthwise_sum(x, kernels, anchors, bias, scale, relu, options)
    anchors = center_anchors(kernels) if anchors is None else anchors
    x, kernels, bias, scale = autocast(x, kernels, bias, scale)
    check_sum(x, kernels, anchors, bias)
    check_epilogue(x, scale, relu)
    if not needs_derivatives(x, bias, scale, *kernels):
        return run_sum(x, kernels, anchors, options, bias, scale, relu)
    return _differentiable(x, kernels, anchors, bias, scale, relu, options)


def _differentiable(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[Anchor],
    bias: Tensor | None,
    scale: Tensor | None,
    relu: bool,
    options: CallOptions,
) -> Tensor:
    if scale is None:
        return epilogue(differentiable_sum(x, kernels, anchors, bias, options), None, None, relu)
    return epilogue(differentiable_sum(x, kernels, anchors, None, options), scale, bias, relu)


def depthwise_weight_grad(
    x: Tensor,
    grad: Tensor,
    kernel_size: tuple[int, int],
    anchor: Anchor | None = None,
    *,
    backend: str | None = None,
    algorithm: str | None = None,
    dilation: int = 1,
) -> Tensor:
    """Compute the gradient of one rectangle of `depthwise_sum`: the channel-wise correlation of input and gradient.

        w[c, 0, u, v] = Σ_nij grad[n, c, i, j] · x[n, c, i + (u - row)·d, j + (v - column)·d]

    Args:
        x: (N, C, H, W), the input of the forward pass.
        grad: (N, C, H, W), the gradient of its output.
        kernel_size: (kh, kw).
        anchor: (row, column), by default the middle tap.
        backend: as in `depthwise_sum`.
        algorithm: as in `depthwise_sum`.
        dilation: the distance d between neighboring taps in pixels.

    Returns:
        (C, 1, kh, kw), the gradient of the taps; the gaps between them have none.

    Raises:
        ValueError: if shapes, types, the anchor or the dilation do not fit together.
        NoBackendError: if no backend can compute the call, or the requested one cannot.
    """
    check_dilation("dilation", dilation)
    options = CallOptions(backend or None, check_algorithm(algorithm), only_dilated([dilation]))
    if is_tracing():
        return traced_calls.depthwise_weight_grad(x, grad, kernel_size, anchor, options)
    if anchor is None:
        anchor = (kernel_size[0] // 2, kernel_size[-1] // 2)
    check_weight_grad(x, grad, kernel_size, anchor)
    return differentiable_weight_grad(x, grad, kernel_size, anchor, options)
