"""Masks that are 2:4 along both rows and columns, so that the matrix product for the input gradient is sparse too."""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from widekernel.errors import ShapeError
from widekernel.sparsity.semi_structured.patterns import PATTERNS


@cache
def transposable_patterns() -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Return the 90 patterns of 4 x 4 that keep two in every row and every column, in lexicographic order."""
    every = product(PATTERNS, repeat=4)
    return tuple(rows for rows in every if all(sum(column) == 2 for column in zip(*rows)))


@torch.no_grad()
def transposable_mask(weight: Tensor) -> Tensor:
    """Return the mask of largest kept magnitude whose rows and columns are both 2:4.

    Each block of four outputs and four input channels, within one tap, gets the best of the 90 patterns. This is exact,
    since there are no others (Hubara et al., Accelerated Sparse Neural Training, NeurIPS 2021). Of equally good patterns
    the first is used. Borders are padded with zeros, so blocks there may keep less than half.

    Args:
        weight: (out, in) or (out, in, kh, kw), of a layer without groups.

    Returns:
        bool, of the weight's shape.
    """
    if weight.dim() not in (2, 4) or not weight.numel():
        raise ShapeError(
            f"a weight of shape {tuple(weight.shape)} has no 4 x 4 blocks: it must be (out, in) or (out, in, kh, kw)"
        )
    matrices = weight.detach().double().abs().nan_to_num(nan=torch.inf).clamp(max=torch.finfo(torch.float32).max)
    matrices = matrices.reshape(*weight.shape[:2], -1).permute(2, 0, 1)  # (taps, out, in)
    taps, rows, columns = matrices.shape
    padded = F.pad(matrices, (0, -columns % 4, 0, -rows % 4))
    high, wide = padded.shape[1] // 4, padded.shape[2] // 4
    blocks = padded.reshape(taps, high, 4, wide, 4).transpose(2, 3).reshape(-1, 16)
    table = torch.tensor(transposable_patterns(), dtype=torch.float64, device=weight.device).reshape(-1, 16)
    best = (blocks @ table.T).argmax(1)
    bits = (table[best] > 0).reshape(taps, high, wide, 4, 4).transpose(2, 3).reshape(taps, high * 4, wide * 4)
    return bits[:, :rows, :columns].permute(1, 2, 0).reshape(weight.shape).contiguous()
