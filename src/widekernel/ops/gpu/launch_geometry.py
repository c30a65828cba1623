"""The geometry of launches: how blocks cover images and kernels, and how sums are split among programs.

The launches and the cost model both depend on it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from widekernel.ops.gpu.kernel_configs import Chip, Flat, FlatGrad, Toeplitz, ToeplitzGrad
from widekernel.ops.problem import Problem

GRAD_LAUNCH_COLUMNS = 64
"""Number of kernel columns that one launch of the weight gradient computes; wider kernels take several launches."""


def next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is not less than `number`."""
    return 1 << max(0, number - 1).bit_length()


def itemsize(dtype: torch.dtype) -> int:
    """Return the bytes per number."""
    return torch.empty((), dtype=dtype, device="meta").element_size()


def transposed(problem: Problem) -> Problem:
    """Return the problem with rows and columns exchanged."""
    batch, channels, height, width = problem.shape
    kernels = tuple((kw, kh) for kh, kw in problem.kernels)
    anchors = tuple((column, row) for row, column in problem.anchors)
    return replace(problem, shape=(batch, channels, width, height), kernels=kernels, anchors=anchors)


def in_pixels(taps: int, column: int, dilation: int) -> tuple[int, int]:
    """Return the extent of a kernel axis and the position of its anchor in pixels, including the gaps between taps."""
    return (taps - 1) * dilation + 1, column * dilation


def visited_rows(rows: int, taps: int, dilation: int) -> int:
    """Return how many input rows a block of adjacent output rows depends on, for a kernel of `taps` rows."""
    return rows + (taps - 1) * min(dilation, rows)


def visited_rows_above(row: int, rows: int, dilation: int) -> int:
    """Return how many of the rows that a block depends on lie above `row`, counted from the first of them."""
    periods, rest = divmod(max(row, 0), dilation)
    return periods * min(dilation, rows) + min(rest, rows)


def leading_columns(config: Toeplitz, kw: int, column: int, copies: int) -> int:
    """Return how many columns before the outputs the blocks of input columns begin, at least `column`.

    Here and in the functions below, `kw` and `column` are in pixels: see `in_pixels`.

    Asynchronous copies of 16 bytes require multiples of `copies`. Halves and quarters of that are used where they save a
    block.
    """

    def blocks(lead: int) -> int:
        return math.ceil((lead + config.columns + kw - 1 - column) / config.depth)

    leads = [-(-column // unit) * unit for unit in (copies, copies // 2, copies // 4)]
    return min(leads, key=blocks)


def expanded_length(config: Toeplitz, pad: int, kw: int) -> int:
    """Return the length of a kernel row with `pad` zeros before it and as many zeros after it as blocks extend beyond it."""
    return -(-(pad + kw + config.columns + config.depth) // 16) * 16


def padded_width(width: int, dtype: torch.dtype) -> int:
    """Return the smallest number of columns, at least `width`, for which rows are a multiple of 16 bytes."""
    numbers = 16 // itemsize(dtype)
    return -(-width // numbers) * numbers


def blocks_across(config: ToeplitzGrad, width: int, kw: int, column: int, align: int) -> tuple[int, int]:
    """Return where the blocks of input columns begin, relative to a block of output columns, and their number."""
    if width <= config.outputs:
        return 0, math.ceil(width / config.inputs)
    offset = -column // align * align
    return offset, math.ceil((config.outputs + kw - 1 - column - offset) / config.inputs)


def output_rows_met(config: ToeplitzGrad, height: int, row: int, dilation: int) -> int:
    """Return the number of output rows between the first and the last for which a block of kernel rows lies on the image.

    Args:
        config: the configuration.
        height: rows of the image.
        row: kernel row on the output pixel, counted from the first of the block.
        dilation: distance between kernel rows.
    """
    first = max((row - (config.kernel_rows - 1)) * dilation, 0)
    return max(0, min(height + row * dilation, height) - first)


def flat_splits(problem: Problem, config: Flat | FlatGrad, chip: Chip) -> int:
    """Return the number of programs among which the images of one channel are divided."""
    blocks = math.ceil(problem.shape[0] / config.images)
    return max(1, min(blocks, math.ceil(3 * chip.processors / max(1, problem.shape[1]))))


def flat_images_each(problem: Problem, config: Flat | FlatGrad, splits: int) -> int:
    """Return the number of images per program for `splits` programs: whole blocks, so that no image is in two programs."""
    return math.ceil(math.ceil(problem.shape[0] / config.images) / splits) * config.images


def grad_splits(programs: int, steps: int, chip: Chip) -> int:
    """Return the number of parts of a sum over `steps`: enough to fill the GPU, but none with too little work."""
    return max(1, min(math.ceil(6 * chip.processors / max(1, programs)), steps // 8))
