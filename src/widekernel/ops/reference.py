"""The operators written as their definition, tap by tap: slow, readable, and the truth for every other backend."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from widekernel.ops.problem import Anchor, Problem

name = "reference"


def reasons_against(problem: Problem) -> list[str]:
    """Give the reason why this backend never runs unasked."""
    return ["it is the slow definition, run only when asked for with backend='reference'"]


def can_run(problem: Problem) -> bool:
    """Whether the backend can run when asked for by name."""
    return True


def depthwise_sum(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], bias: Tensor | None) -> Tensor:
    """Compute y[n, c, i, j] = bias[c] + Σ_r Σ_uv kernels[r][c, 0, u, v] · x[n, c, i + u - row_r, j + v - column_r]."""
    y = torch.zeros_like(x)
    for kernel, (row, column) in zip(kernels, anchors):
        for u in range(kernel.shape[2]):
            for v in range(kernel.shape[3]):
                y += kernel[:, :, u, v].unsqueeze(-1) * shifted(x, u - row, v - column)
    return y if bias is None else y + bias.view(1, -1, 1, 1)


def epilogue(y: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool) -> Tensor:
    """Compute scale · y + shift (both (C,)) of images `y`, and its positive part if `relu`; NaN stays NaN."""
    if scale is not None:
        y = y * scale.view(-1, 1, 1)
    if shift is not None:
        y = y + shift.view(-1, 1, 1)
    return y.relu() if relu else y


def depthwise_weight_grad(x: Tensor, grad: Tensor, kernel: tuple[int, int], anchor: Anchor) -> Tensor:
    """Compute w[c, 0, u, v] = Σ_nij grad[n, c, i, j] · x[n, c, i + u - row, j + v - column], shape (C, 1, kh, kw)."""
    rows = []
    for u in range(kernel[0]):
        taps = [(grad * shifted(x, u - anchor[0], v - anchor[1])).sum((0, 2, 3)) for v in range(kernel[1])]
        rows.append(torch.stack(taps, -1))
    return torch.stack(rows, -2).unsqueeze(1)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Give the largest error as a share of the largest exact number; infinity if shapes differ."""
    if got.shape != exact.shape:
        return math.inf
    scale = exact.abs().max().item()
    return ((got - exact).abs().max() / (scale or 1.0)).item()


def shifted(x: Tensor, down: int, right: int) -> Tensor:
    """Give the tensor whose pixel (i, j) is x's pixel (i + down, j + right), zero where that lies outside."""
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
