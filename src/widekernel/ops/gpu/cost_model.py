"""A model of the time that a configuration takes, in cycles. It decides until a GPU has been measured.

For each step of a program, the model computes the time in the tensor cores, on the path from the L2 cache, on the path into
shared memory and for issuing instructions, and takes the longest. The rates are from data sheets and published measurements
of caches; none was fitted to these kernels.
"""

from __future__ import annotations

import math

import torch

from widekernel.ops.gpu.kernel_configs import (
    Chip,
    DirectNchw,
    DirectNhwc,
    DirectNhwcGrad,
    Flat,
    FlatGrad,
    KernelConfig,
    Toeplitz,
    ToeplitzGrad,
)
from widekernel.ops.gpu.launch_geometry import (
    blocks_across,
    expanded_length,
    flat_splits,
    grad_splits,
    in_pixels,
    itemsize,
    leading_columns,
    next_power_of_two,
    output_rows_met,
    padded_width,
    transposed,
    visited_rows,
    visited_rows_above,
)
from widekernel.ops.problem import Problem

# Dense bfloat16 operations of the tensor cores of a multiprocessor per cycle, by compute capability.
_TENSOR = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192}
_TENSOR_OF_OTHERS = 1024
# Float32 operations of the ordinary units per cycle, and the approximate share of them that the direct kernels reach.
_MULTIPLY_ADDS, _DIRECT_SHARE = 256, 0.4
# Bytes per multiprocessor and cycle: from the L2 cache, and into shared memory.
_FROM_L2, _INTO_SHARED = 28, 64
# Cycles to start and finish a program, and to launch a kernel.
_PROGRAM, _LAUNCH = 1500, 4000
# Instructions per warp and pipeline step, and per load of a thread, counted in programs compiled for sm_90.
_STEP, _COPY, _COPY_FOR_GRADIENT = 55, 9, 28
_COPIED = 20  # bytes per multiprocessor and cycle, from device memory to device memory
_ISSUED = 4  # instructions per multiprocessor and cycle
_LOADS_EACH = 32  # loads of single elements per cycle


def estimated_cycles(problem: Problem, config: KernelConfig, chip: Chip) -> float:
    """Estimate the cycles of the whole problem on the whole GPU."""
    if isinstance(config, Toeplitz):
        return _toeplitz(problem, config, chip)
    if isinstance(config, Flat):
        return _flat(problem, config, chip)
    if isinstance(config, ToeplitzGrad):
        return _toeplitz_grad(problem, config, chip)
    if isinstance(config, FlatGrad):
        return _flat_grad(problem, config, chip)
    if isinstance(config, (DirectNchw, DirectNhwc)):
        return _direct(problem, config, chip)
    assert isinstance(config, DirectNhwcGrad)
    return _direct_nhwc_grad(problem, config, chip)


def tensor_rate(problem: Problem, chip: Chip, rows: int) -> float:
    """Return the operations per cycle of products with `rows` rows of accumulators."""
    rate = float(_TENSOR.get(chip.capability, _TENSOR_OF_OTHERS))
    if chip.capability[0] >= 9 and rows < 64:
        rate /= 2  # these products use the instructions of the previous generation
    if problem.dtype == torch.float32:
        rate /= 2 if problem.tf32 else 6
    return rate


def _over(programs: float, each: float, chip: Chip, resident: int) -> float:
    """Return the time of `programs` programs, of which `resident` share a multiprocessor; few waves are rounded up."""
    places = chip.processors * resident
    waves = programs / places
    return _LAUNCH + each * resident * (math.ceil(waves) if waves < 4 else waves)


def _step(problem: Problem, chip: Chip, block: tuple[int, int, int], l2: float, shared: float, instructions: float) -> float:
    """Return the cycles of one product of blocks (rows, columns, depth): those of the slowest resource.

    Args:
        problem: the problem; it determines the type.
        chip: the GPU; it determines the rates.
        block: rows and columns of accumulators, and depth.
        l2: numbers read from the L2 cache.
        shared: numbers written to shared memory.
        instructions: of all warps together.
    """
    rows, columns, depth = block
    tensor = 2 * rows * columns * depth / tensor_rate(problem, chip, rows)
    bytes_each = itemsize(problem.dtype)
    return max(tensor, l2 * bytes_each / _FROM_L2, shared * bytes_each / _INTO_SHARED, instructions / _ISSUED)


def _instructions(config: KernelConfig, loads: float, of_each: int) -> float:
    """Return the instructions of all warps in a step with `loads` loads of threads."""
    return _STEP * config.warps + of_each * loads / 32


def _toeplitz(problem: Problem, config: Toeplitz, chip: Chip) -> float:
    problem = transposed(problem) if config.transposed else problem
    batch, channels, height, width = problem.shape
    align = 16 // itemsize(problem.dtype)
    steps = 0
    for (kh, taps), (row, anchor), dilation in zip(problem.kernels, problem.anchors, problem.dilations):
        kw, column = in_pixels(taps, anchor, dilation)
        reach = config.rows * config.row_blocks
        visited = 0
        for h0 in range(0, height, reach):
            # Counted from the first row that the block depends on.
            top = row * dilation - h0
            first = visited_rows_above(top - (config.row_blocks - 1) * config.rows, config.rows, dilation)
            last = min(visited_rows(config.rows, kh, dilation), visited_rows_above(top + height, config.rows, dilation))
            visited += max(0, last - first)
        blocks = 0
        for w0 in range(0, width, config.columns):
            lead = leading_columns(config, kw, column, align)
            left = w0 - lead + max(lead - w0, 0) // config.depth * config.depth
            blocks += max(0, math.ceil((min(w0 + config.columns + kw - 1 - column, width) - left) / config.depth))
        steps += visited * blocks
    tiles = math.ceil(height / (config.rows * config.row_blocks)) * math.ceil(width / config.columns)
    rows, columns = config.rows * config.columns, config.images * config.row_blocks
    # Images whose rows do not begin at multiples of 16 bytes are loaded in smaller pieces.
    loads = config.depth * (rows / align + columns / _pieces(problem, width, config.transposed))
    image, both = columns * config.depth, (rows + columns) * config.depth
    step = _step(problem, chip, (rows, columns, config.depth), image, both, _instructions(config, loads, _COPY))
    programs = tiles * channels * math.ceil(batch / config.images)
    each = steps / tiles * step + _PROGRAM + 2 * rows * columns / _LOADS_EACH
    return _expanding(problem, config, chip) + _over(programs, each, chip, 2 if rows * columns <= 128 * 128 else 1)


def _expanding(problem: Problem, config: Toeplitz, chip: Chip) -> float:
    """Return the cycles of storing the zero-padded kernels, which are read again later."""
    copies = 16 // itemsize(problem.dtype)
    numbers = 0
    for (kh, taps), (_, anchor), dilation in zip(problem.kernels, problem.anchors, problem.dilations):
        kw, column = in_pixels(taps, anchor, dilation)
        pad = config.columns + leading_columns(config, kw, column, copies) - column
        numbers += problem.shape[1] * kh * copies * expanded_length(config, pad, kw)
    return _LAUNCH * len(problem.kernels) + 2 * numbers * itemsize(problem.dtype) / _COPIED / chip.processors


def _pieces(problem: Problem, width: int, is_transposed: bool | int) -> float:
    """Return how many numbers one load fetches: fewer if rows do not begin at multiples of 16 bytes."""
    return 1 if is_transposed else math.gcd(16, width * itemsize(problem.dtype)) / itemsize(problem.dtype)


def _flat(problem: Problem, config: Flat, chip: Chip) -> float:
    batch, channels = problem.shape[:2]
    numbers = 2 * config.pixels * config.images
    block = (config.pixels, config.images, config.pixels)
    step = _step(problem, chip, block, numbers, 0, _instructions(config, numbers, _COPY)) + _STEP
    matrix = len(problem.kernels) * config.pixels**2 / _LOADS_EACH
    splits = flat_splits(problem, config, chip)
    each = matrix + _PROGRAM + math.ceil(batch / config.images / splits) * step
    return _over(channels * splits, each, chip, 3)


def _toeplitz_grad(problem: Problem, config: ToeplitzGrad, chip: Chip) -> float:
    batch, channels = problem.shape[:2]
    problem = transposed(problem) if config.transposed else problem
    height, width = problem.shape[2:]
    width = padded_width(width, problem.dtype) if config.copied else width
    (kh, kw), (row, column), dilation = problem.kernels[0], problem.anchors[0], problem.dilations[0]
    align = 16 // itemsize(problem.dtype)
    _, across = blocks_across(config, width, *in_pixels(kw, column, dilation), align)
    row_blocks = math.ceil(kh / config.kernel_rows)
    column_blocks = math.ceil(width / config.outputs)
    steps = math.ceil(batch * height / config.depth) * column_blocks
    programs = channels * row_blocks * across
    splits = grad_splits(programs, steps, chip)
    # Number of output rows for which some kernel row of the block lies on the image, for each block.
    met = [output_rows_met(config, height, row - start, dilation) for start in range(0, kh, config.kernel_rows)]
    visited = sum(math.ceil(batch * rows / config.depth) for rows in met) * column_blocks
    rows = config.kernel_rows * config.inputs
    # Adjacent kernel rows of a block need the same rows of x except for one, or as many as the dilation.
    apart = min(dilation, 4) if min(config.kernel_rows, kh) > 1 else 1
    fresh = (config.inputs * (1 + config.kernel_rows * apart / 4) + config.outputs) * config.depth
    filled = (rows + config.outputs) * config.depth
    loads = filled / _pieces(problem, width, config.transposed and not config.copied)
    block = (rows, config.outputs, config.depth)
    step = _step(problem, chip, block, fresh, filled, _instructions(config, loads, _COPY_FOR_GRADIENT))
    gathering = config.kernel_rows * 32 * config.outputs / _LOADS_EACH * 2
    each = visited / row_blocks / splits * step + _PROGRAM + gathering
    # Both images are read and written once more.
    copying = 4 * batch * channels * height * width * itemsize(problem.dtype) / _COPIED / chip.processors
    extra = 2 * _LAUNCH + copying * (2 if config.transposed else 1) if config.copied else 0
    return extra + _over(programs * splits, each, chip, 1 if rows * config.outputs > 128 * 64 else 2)


def _flat_grad(problem: Problem, config: FlatGrad, chip: Chip) -> float:
    batch, channels = problem.shape[:2]
    kh, kw = problem.kernels[0]
    numbers = 2 * config.pixels * config.images
    block = (config.pixels, config.pixels, config.images)
    step = _step(problem, chip, block, numbers, 0, _instructions(config, numbers, _COPY)) + _STEP
    gathering = next_power_of_two(kh * kw) * config.pixels / _LOADS_EACH * 2
    splits = flat_splits(problem, config, chip)
    each = math.ceil(batch / config.images / splits) * step + _PROGRAM + gathering
    return _over(channels * splits, each, chip, 2)


def _direct(problem: Problem, config: DirectNchw | DirectNhwc, chip: Chip) -> float:
    batch, channels, height, width = problem.shape
    taps = sum(kh * kw for kh, kw in problem.kernels)
    outputs = batch * channels * height * width
    work = 2 * outputs * taps / (_MULTIPLY_ADDS * _DIRECT_SHARE)
    if isinstance(config, DirectNchw):
        programs = math.ceil(batch * channels / config.planes) * math.ceil(height * width / config.pixels)
        loads = outputs * taps / _LOADS_EACH
    else:
        tiles = math.ceil(height / config.rows) * math.ceil(width / config.columns)
        programs = batch * tiles * math.ceil(channels / config.channels)
        # Every value that is loaded is used for all rows of the block that it affects.
        rects = zip(problem.kernels, problem.dilations)
        seen = sum(visited_rows(config.rows, kh, dilation) * kw for (kh, kw), dilation in rects) / config.rows
        waste = tiles * config.rows * config.columns / (height * width)
        loads = outputs * seen * waste / _LOADS_EACH / 2
        work *= waste
    return _over(programs, max(work, loads) / max(1, programs) + _PROGRAM / 4, chip, 4)


def _direct_nhwc_grad(problem: Problem, config: DirectNhwcGrad, chip: Chip) -> float:
    batch, channels, height, width = problem.shape
    kh, kw = problem.kernels[0]
    lines = batch * height
    programs = math.ceil(channels / config.channels) * kh
    splits = grad_splits(programs, lines, chip)
    numbers = config.columns * config.channels
    step = max(2 * numbers * kw / (_MULTIPLY_ADDS * _DIRECT_SHARE), numbers * (kw + 1) / _LOADS_EACH / 2)
    each = math.ceil(lines / splits) * math.ceil(width / config.columns) * step + _PROGRAM
    return _over(programs * splits, each, chip, 4)
