"""Groups of four: which weights form a group, and views of a weight as a list of groups."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from widekernel.errors import ArgumentError, ShapeError
from widekernel.sparsity.semi_structured.config import Axis, check_axis


def paper_padding(rows: int, columns: int) -> tuple[int, int]:
    """Return the padded size (rows, columns) of a weight matrix in the paper's grouping (Danhofer, arXiv 2411.00288).

    A matrix is padded only if its number of elements is not a multiple of 4. Then the columns (inputs) are padded to a
    multiple of 4 if that adds fewer elements than padding the rows (outputs); otherwise, the rows are padded.
    """
    if rows * columns % 4 == 0:
        return rows, columns
    if rows * _up(columns) < _up(rows) * columns:
        return rows, _up(columns)
    return _up(rows), columns


def group_view(weight: Tensor, axis: Axis = "channels", groups: int = 1) -> tuple[Tensor, Tensor]:
    """Return the groups of four of a weight, one per row.

    * "channels": four consecutive input channels of one output and one tap. Groups come in the order (out, kh, kw, in), the
      order of a channels-last weight, which sparse matrix units need. Input channels are padded to a multiple of 4.
    * "im2col": four consecutive elements of the matrix (out, in·kh·kw) of each convolution group, one group after the other;
      padded by `paper_padding`. Groups may straddle taps and rows.
    * "taps": four consecutive taps of one output and input channel, padded to a multiple of 4. No hardware supports this.

    Args:
        weight: (out, in / groups, kh, kw) or (out, in), of any type, strides and memory format.
        axis: the grouping.
        groups: number of groups of the convolution; matters for "im2col" only.

    Returns:
        The weights (G, 4) with zeros in padded slots, and which slots are real, (G, 4) bool.
    """
    _check(tuple(weight.shape), axis, groups)
    real = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    return _grouped(weight, axis, groups), _grouped(real, axis, groups)


def valid_slots(
    shape: Sequence[int], axis: Axis = "channels", groups: int = 1, device: torch.device | str = "cpu"
) -> Tensor:
    """Return which slots of a weight of this shape are real: (G, 4) bool, False where padded."""
    _check(shape, axis, groups)
    return _grouped(torch.ones(tuple(shape), dtype=torch.bool, device=device), axis, groups)


def ungroup(values: Tensor, shape: Sequence[int], axis: Axis = "channels", groups: int = 1) -> Tensor:
    """Undo `group_view`: (G, 4) -> a contiguous tensor of `shape`; values in padded slots are dropped."""
    _check(shape, axis, groups)
    rows, columns = matrix_shape(shape, axis, groups)
    padded_rows, padded_columns = _padded(rows, columns, axis)
    pieces = groups if axis == "im2col" else 1
    if values.numel() != pieces * padded_rows * padded_columns:
        raise ShapeError(
            f"there are {values.numel() // 4} groups, but a weight of shape {tuple(shape)} has "
            f"{pieces * padded_rows * padded_columns // 4} along axis={axis!r}: give what group_view returned for it"
        )
    matrix = values.reshape(pieces, padded_rows, padded_columns)[:, :rows, :columns]
    if axis == "channels" and len(shape) == 4:
        out, inner, high, wide = shape
        return matrix.reshape(out, high, wide, inner).permute(0, 3, 1, 2).contiguous()
    return matrix.reshape(tuple(shape))


def group_count(shape: Sequence[int], axis: Axis = "channels", groups: int = 1) -> int:
    """Return G, the number of groups of four of a weight of this shape."""
    _check(shape, axis, groups)
    return (groups if axis == "im2col" else 1) * prod(_padded(*matrix_shape(shape, axis, groups), axis)) // 4


def matrix_shape(shape: Sequence[int], axis: Axis, groups: int = 1) -> tuple[int, int]:
    """Return rows and columns of the matrix whose rows are divided into groups; for "im2col", of one convolution group."""
    if axis == "im2col":
        return shape[0] // groups, prod(shape[1:])
    if len(shape) == 2:
        return shape[0], shape[1]
    out, inner, high, wide = shape
    return (out * inner, high * wide) if axis == "taps" else (out * high * wide, inner)


def describe(index: int, shape: Sequence[int], axis: Axis, groups: int = 1) -> str:
    """Return a description of the position of a group in a weight."""
    rows, columns = _padded(*matrix_shape(shape, axis, groups), axis)
    if axis == "im2col":
        first = index * 4 % (rows * columns)
        return f"elements {first}..{first + 3} of the matrix of convolution group {index * 4 // (rows * columns)}"
    row, start = index * 4 // columns, index * 4 % columns
    if axis == "taps":
        return f"output {row // shape[1]}, input channel {row % shape[1]}, taps {start}..{start + 3}"
    taps = prod(shape[2:])
    tap = f", tap {divmod(row % taps, shape[3])}" if taps > 1 else ""
    return f"output {row // taps}{tap}, input channels {start}..{start + 3}"


def _grouped(weight: Tensor, axis: Axis, groups: int) -> Tensor:
    rows, columns = matrix_shape(weight.shape, axis, groups)
    if axis == "channels" and weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1)
    matrix = weight.reshape(groups if axis == "im2col" else 1, rows, columns)
    padded_rows, padded_columns = _padded(rows, columns, axis)
    if (padded_rows, padded_columns) != (rows, columns):
        matrix = F.pad(matrix, (0, padded_columns - columns, 0, padded_rows - rows))
    return matrix.reshape(-1, 4)


def _padded(rows: int, columns: int, axis: Axis) -> tuple[int, int]:
    return paper_padding(rows, columns) if axis == "im2col" else (rows, _up(columns))


def _up(size: int) -> int:
    return -(-size // 4) * 4


def _check(shape: Sequence[int], axis: Axis, groups: int) -> None:
    check_axis(axis)
    if len(shape) not in (2, 4) or 0 in shape:
        raise ShapeError(
            f"a weight of shape {tuple(shape)} has no groups of four: it must be (out, in) or (out, in / groups, kh, kw), "
            "and not empty"
        )
    if axis == "taps" and len(shape) == 2:
        raise ShapeError(f"a weight of shape {tuple(shape)} has no taps: use axis='channels' for a matrix")
    if groups < 1 or shape[0] % groups:
        raise ArgumentError(f"groups={groups} must divide the {shape[0]} outputs of the weight")
