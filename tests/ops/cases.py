"""Shared parts of the operator tests: shapes, storage layouts, the definition, and one table of tolerances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest error allowed, as a share of the largest value of the exact result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Case:
    """An image and rectangles with their anchors; an anchor of None is the middle tap, dilations of None are all 1."""

    name: str
    shape: tuple[int, int, int, int]
    rects: tuple[tuple[int, int, tuple[int, int] | None], ...]
    dilations: tuple[int, ...] | None = None

    @property
    def anchors(self) -> list[tuple[int, int]]:
        return [anchor or (kh // 2, kw // 2) for kh, kw, anchor in self.rects]

    def __str__(self) -> str:
        return self.name

    def tensors(self, dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Tensor, list[Tensor], Tensor | None]:
        channels = self.shape[1]
        x = torch.randn(self.shape, dtype=torch.float64).to(dtype)
        kernels = [torch.randn(channels, 1, kh, kw, dtype=torch.float64).to(dtype) for kh, kw, _ in self.rects]
        return x, kernels, torch.randn(channels, dtype=torch.float64).to(dtype) if bias else None


CASES = [
    Case("square", (2, 3, 7, 6), ((3, 3, None),)),
    Case("single-tap", (2, 3, 4, 5), ((1, 1, None),)),
    Case("one-pixel-image", (2, 3, 1, 1), ((3, 5, None),)),
    Case("one-channel", (3, 1, 6, 5), ((5, 3, None),)),
    Case("one-column-image", (1, 2, 5, 1), ((9, 9, None),)),
    Case("one-row-image", (1, 2, 1, 6), ((3, 11, (2, 7)),)),
    Case("kernel-larger-than-image", (2, 2, 4, 5), ((11, 13, None),)),
    Case("far-anchor-larger-than-image", (1, 2, 3, 4), ((5, 23, (0, 22)),)),
    Case("even", (2, 3, 7, 6), ((4, 2, None),)),
    Case("even-single-axis", (2, 2, 5, 6), ((2, 1, (0, 0)),)),
    Case("top-left-anchor", (2, 2, 6, 7), ((3, 4, (0, 0)),)),
    Case("bottom-right-anchor", (2, 2, 6, 7), ((3, 4, (2, 3)),)),
    Case("wide-anchored-left", (2, 2, 5, 12), ((3, 17, (1, 2)),)),
    Case("crossed-strips", (2, 3, 9, 8), ((13, 3, None), (3, 13, None), (3, 3, None))),
    Case("strips-of-tiles", (2, 2, 8, 9), ((3, 15, (1, 6)), (15, 3, (6, 1)), (1, 1, None))),
]
DILATED = [
    Case("dilated", (2, 3, 9, 8), ((3, 3, None),), (2,)),
    Case("dilated-block", (1, 2, 9, 10), ((7, 7, None), (5, 5, None), (3, 3, None), (3, 3, None)), (1, 2, 3, 4)),
    Case("dilated-even-anchored", (2, 2, 7, 6), ((4, 2, (3, 0)), (2, 11, (0, 8)), (1, 1, None)), (2, 3, 6)),
    Case("dilated-beyond-the-image", (2, 2, 3, 5), ((3, 3, None), (5, 4, (0, 3)), (2, 2, None)), (3, 2, 6)),
]
EMPTY = [
    Case("no-image", (0, 3, 4, 4), ((3, 3, None), (3, 11, None))),
    Case("no-row", (2, 3, 0, 4), ((3, 3, None),)),
    Case("no-column", (2, 3, 4, 0), ((3, 3, None),)),
    Case("no-channel", (2, 0, 4, 4), ((3, 3, None),)),
]


def _every_second(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]), 7.0, dtype=x.dtype)
    wide[..., ::2, 1::2] = x
    return wide[..., ::2, 1::2]


def _in_the_middle(x: Tensor) -> Tensor:
    more = torch.full((x.shape[0], x.shape[1] + 2, *x.shape[2:]), 7.0, dtype=x.dtype)
    more[:, 1:-1] = x
    return more[:, 1:-1]


# Ways of storing the same image; "expanded" changes it to one image repeated.
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch-inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": _every_second,
    "some-channels": _in_the_middle,
    "expanded": lambda x: x[:1].expand_as(x) if len(x) else x,
}


def definition(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[tuple[int, int]],
    bias: Tensor | None = None,
    dilations: Sequence[int] | None = None,
) -> Tensor:
    """Compute the operator by padding, slicing and multiplying, which PyTorch differentiates automatically."""
    height, width = x.shape[-2:]
    y = torch.zeros_like(x) if bias is None else torch.zeros_like(x) + bias.view(-1, 1, 1)
    for kernel, (row, column), d in zip(kernels, anchors, dilations or [1] * len(kernels)):
        kh, kw = kernel.shape[-2:]
        padded = F.pad(x, (column * d, (kw - 1 - column) * d, row * d, (kh - 1 - row) * d))
        for u in range(kh):
            for v in range(kw):
                read = padded[..., u * d : u * d + height, v * d : v * d + width]
                y = y + kernel[:, 0, u, v].view(-1, 1, 1) * read
    return y


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the largest error as a share of the largest expected value; shapes must agree."""
    assert got.shape == want.shape
    if not want.numel():
        return 0.0
    largest = want.double().abs().max().item()
    error = (got.double() - want.double()).abs().max().item()
    return error / largest if largest else error


def assert_close(got: Tensor, want: Tensor, tolerance: float | None = None) -> None:
    """Compare with the table's tolerance for the type of `got`; NaN fails."""
    limit = TOLERANCE[got.dtype] if tolerance is None else tolerance
    error = relative_error(got, want)
    assert error <= limit, f"relative error {error:.3g} of {got.dtype} exceeds {limit:.3g}"
