"""The definition of the operators, tap by tap: slow and readable, the reference for every backend."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from widekernel.ops.problem import Anchor, Dilations


def depthwise_sum(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[Anchor],
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = False,
    dilations: Dilations = (),
) -> Tensor:
    """Compute the sum of rectangles, then the affine map and ReLU.

    s[n, c, i, j] = Σ_r Σ_uv kernels[r][c, 0, u, v] · x[n, c, i + (u - row_r)·d_r, j + (v - column_r)·d_r]
    y[n, c, i, j] = scale[c] · s[n, c, i, j] + bias[c], followed by ReLU if `relu`

    Without `dilations`, every d_r is 1.
    """
    y = torch.zeros_like(x)
    for kernel, (row, column), d in zip(kernels, anchors, dilations or (1,) * len(kernels)):
        for u in range(kernel.shape[2]):
            for v in range(kernel.shape[3]):
                y += kernel[:, :, u, v].unsqueeze(-1) * shifted(x, (u - row) * d, (v - column) * d)
    return epilogue(y, scale, bias, relu)


def epilogue(y: Tensor, scale: Tensor | None, bias: Tensor | None, relu: bool) -> Tensor:
    """Compute scale · y + bias (both (C,)) of images `y`, followed by ReLU if `relu`; NaN stays NaN."""
    if scale is not None:
        y = y * scale.view(-1, 1, 1)
    if bias is not None:
        y = y + bias.view(-1, 1, 1)
    return y.relu() if relu else y


def depthwise_weight_grad(
    x: Tensor, grad: Tensor, kernel_size: tuple[int, int], anchor: Anchor, dilation: int = 1
) -> Tensor:
    """Compute the gradient of the taps of one rectangle, shape (C, 1, kh, kw).

    w[c, 0, u, v] = Σ_nij grad[n, c, i, j] · x[n, c, i + (u - row)·dilation, j + (v - column)·dilation]
    """
    (row, column), d = anchor, dilation
    rows = []
    for u in range(kernel_size[0]):
        taps = [(grad * shifted(x, (u - row) * d, (v - column) * d)).sum((0, 2, 3)) for v in range(kernel_size[1])]
        rows.append(torch.stack(taps, -1))
    return torch.stack(rows, -2).unsqueeze(1)


def relative_error(computed: Tensor, exact: Tensor) -> float:
    """Return the largest error divided by the largest absolute value of `exact`; infinity if the shapes differ."""
    if computed.shape != exact.shape:
        return math.inf
    scale = exact.abs().max().item()
    return ((computed - exact).abs().max() / (scale or 1.0)).item()


def shifted(x: Tensor, down: int, right: int) -> Tensor:
    """Return the tensor whose pixel (i, j) is pixel (i + down, j + right) of `x`, or zero if that lies outside `x`."""
    height, width = x.shape[-2:]
    out = torch.zeros_like(x)
    if abs(down) >= height or abs(right) >= width:
        return out
    to_rows = slice(max(0, -down), min(height, height - down))
    to_columns = slice(max(0, -right), min(width, width - right))
    from_rows = slice(max(0, down), min(height, height + down))
    from_columns = slice(max(0, right), min(width, width + right))
    out[..., to_rows, to_columns] = x[..., from_rows, from_columns]
    return out
