"""How long a configuration should take: a model in cycles of one multiprocessor, to choose by until a GPU has been measured.

It counts what each step of a program needs of the tensor cores, of the path from the L2 cache and of the path into shared
memory, takes the largest, and adds what a step costs to issue. The rates are those of data sheets and of published
measurements of caches; none of them was fitted to these kernels.
"""

from __future__ import annotations

import math

import torch

from widekernel.ops.gpu.configs import (
    Channels,
    ChannelsGrad,
    Chip,
    Config,
    Flat,
    FlatGrad,
    Planes,
    Toeplitz,
    ToeplitzGrad,
    blocks_across,
    expanded_length,
    itemsize,
    lead_of,
    padded_width,
    power_of_two,
    turned,
)
from widekernel.ops.problem import Problem

# Dense bfloat16 operations of tensor cores in a cycle of a multiprocessor, by compute capability.
_TENSOR = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192}
_TENSOR_OF_OTHERS = 1024
# Float32 operations of the ordinary units; of these the direct kernels reach about the share below.
_MULTIPLY_ADDS, _DIRECT_SHARE = 256, 0.4
# Bytes in a cycle of a multiprocessor: from L2, into shared memory, and of loads that hit the L1 cache.
_FROM_L2, _INTO_SHARED = 28, 64
# Cycles that a program takes to start and finish, and to launch a kernel.
_PROGRAM, _LAUNCH = 1500, 4000
# Instructions of each warp in a step of the pipeline, and for each load of a thread: counted in what was compiled for sm_90.
_STEP, _COPY, _COPY_FOR_GRADIENT = 55, 9, 28
_COPIED = 20  # bytes in a cycle of a multiprocessor, between device memory and device memory
_ISSUED = 4  # instructions in a cycle of a multiprocessor
_LOADS_EACH = 32  # of one element, in a cycle


def cycles(problem: Problem, config: Config, chip: Chip) -> float:
    """Estimate the cycles of the whole problem on the whole GPU."""
    if isinstance(config, Toeplitz):
        return _toeplitz(problem, config, chip)
    if isinstance(config, Flat):
        return _flat(problem, config, chip)
    if isinstance(config, ToeplitzGrad):
        return _toeplitz_grad(problem, config, chip)
    if isinstance(config, FlatGrad):
        return _flat_grad(problem, config, chip)
    if isinstance(config, (Planes, Channels)):
        return _direct(problem, config, chip)
    assert isinstance(config, ChannelsGrad)
    return _channels_grad(problem, config, chip)


def tensor_rate(problem: Problem, chip: Chip, rows: int) -> float:
    """Give the operations a cycle of products with so many rows of accumulators."""
    rate = float(_TENSOR.get(chip.capability, _TENSOR_OF_OTHERS))
    if chip.capability[0] >= 9 and rows < 64:
        rate /= 2  # the instructions of the generation before
    if problem.dtype == torch.float32:
        rate /= 2 if problem.tf32 else 6
    return rate


def _over(programs: float, each: float, chip: Chip, resident: int) -> float:
    """Give the time of so many programs, of which `resident` share a multiprocessor: whole waves while they are few."""
    places = chip.processors * resident
    waves = programs / places
    return _LAUNCH + each * resident * (math.ceil(waves) if waves < 4 else waves)


def _step(problem: Problem, chip: Chip, block: tuple[int, int, int], l2: float, shared: float, instructions: float) -> float:
    """Give the cycles of one product of blocks (rows, columns, depth), of which the largest demand counts.

    Args:
        problem: says the type.
        chip: says the rates.
        block: rows and columns of accumulators, and depth.
        l2: numbers that come from the L2 cache.
        shared: numbers that are written to shared memory.
        instructions: of all warps together.
    """
    rows, columns, depth = block
    tensor = 2 * rows * columns * depth / tensor_rate(problem, chip, rows)
    bytes_each = itemsize(problem.dtype)
    return max(tensor, l2 * bytes_each / _FROM_L2, shared * bytes_each / _INTO_SHARED, instructions / _ISSUED)


def _instructions(config: Config, loads: float, of_each: int) -> float:
    """Give the instructions of all warps in a step in which the threads load so many pieces."""
    return _STEP * config.warps + of_each * loads / 32


def _toeplitz(problem: Problem, config: Toeplitz, chip: Chip) -> float:
    problem = turned(problem) if config.turned else problem
    batch, channels, height, width = problem.shape
    align = 16 // itemsize(problem.dtype)
    steps = 0
    for (kh, kw), (row, column) in zip(problem.kernels, problem.anchors):
        reach = config.rows * config.row_blocks
        visited = 0
        for h0 in range(0, height, reach):
            first = max(-row, -h0 - (config.row_blocks - 1) * config.rows)
            visited += max(0, min(config.rows + kh - 1 - row, height - h0) - first)
        blocks = 0
        for w0 in range(0, width, config.columns):
            lead = lead_of(config, kw, column, align)
            left = w0 - lead + max(lead - w0, 0) // config.depth * config.depth
            blocks += max(0, math.ceil((min(w0 + config.columns + kw - 1 - column, width) - left) / config.depth))
        steps += visited * blocks
    tiles = math.ceil(height / (config.rows * config.row_blocks)) * math.ceil(width / config.columns)
    rows, columns = config.rows * config.columns, config.images * config.row_blocks
    # Maps whose rows do not begin at multiples of 16 bytes are loaded in smaller pieces.
    loads = config.depth * (rows / align + columns / _pieces(problem, width, config.turned))
    image, both = columns * config.depth, (rows + columns) * config.depth
    step = _step(problem, chip, (rows, columns, config.depth), image, both, _instructions(config, loads, _COPY))
    programs = tiles * channels * math.ceil(batch / config.images)
    each = steps / tiles * step + _PROGRAM + 2 * rows * columns / _LOADS_EACH
    return _expanding(problem, config, chip) + _over(programs, each, chip, 2 if rows * columns <= 128 * 128 else 1)


def _expanding(problem: Problem, config: Toeplitz, chip: Chip) -> float:
    """Give the time of storing the kernels between zeros, which are then read again."""
    copies = 16 // itemsize(problem.dtype)
    numbers = 0
    for (kh, kw), (_, column) in zip(problem.kernels, problem.anchors):
        pad = config.columns + lead_of(config, kw, column, copies) - column
        numbers += problem.shape[1] * kh * copies * expanded_length(config, pad, kw)
    return _LAUNCH * len(problem.kernels) + 2 * numbers * itemsize(problem.dtype) / _COPIED / chip.processors


def _pieces(problem: Problem, width: int, is_turned: bool | int) -> float:
    """Give the numbers that are loaded at once: rows of some maps do not begin at multiples of 16 bytes."""
    return 1 if is_turned else math.gcd(16, width * itemsize(problem.dtype)) / itemsize(problem.dtype)


def _flat(problem: Problem, config: Flat, chip: Chip) -> float:
    batch, channels = problem.shape[:2]
    numbers = 2 * config.pixels * config.images
    block = (config.pixels, config.images, config.pixels)
    step = _step(problem, chip, block, numbers, 0, _instructions(config, numbers, _COPY)) + _STEP
    matrix = len(problem.kernels) * config.pixels**2 / _LOADS_EACH
    splits = flat_splits(problem, config, chip)
    each = matrix + _PROGRAM + math.ceil(batch / config.images / splits) * step
    return _over(channels * splits, each, chip, 3)


def flat_splits(problem: Problem, config: Flat | FlatGrad, chip: Chip) -> int:
    """Give the number of programs among which the images of one channel are divided."""
    blocks = math.ceil(problem.shape[0] / config.images)
    return max(1, min(blocks, math.ceil(3 * chip.processors / max(1, problem.shape[1]))))


def flat_share(problem: Problem, config: Flat | FlatGrad, splits: int) -> int:
    """Give the images of each of so many programs: whole blocks, so that no image is in two of them."""
    return math.ceil(math.ceil(problem.shape[0] / config.images) / splits) * config.images


def grad_splits(problem: Problem, programs: int, steps: int, chip: Chip) -> int:
    """Give the number of parts of a sum over `steps`: enough to fill the GPU, none with little to do."""
    return max(1, min(math.ceil(6 * chip.processors / max(1, programs)), steps // 8))


def _toeplitz_grad(problem: Problem, config: ToeplitzGrad, chip: Chip) -> float:
    batch, channels = problem.shape[:2]
    problem = turned(problem) if config.turned else problem
    height, width = problem.shape[2:]
    width = padded_width(width, problem.dtype) if config.copied else width
    (kh, kw), (_, column) = problem.kernels[0], problem.anchors[0]
    align = 16 // itemsize(problem.dtype)
    _, across = blocks_across(config, width, kw, column, align)
    row_blocks = math.ceil(kh / config.kernel_rows)
    row = problem.anchors[0][0]
    column_blocks = math.ceil(width / config.outputs)
    steps = math.ceil(batch * height / config.depth) * column_blocks
    programs = channels * row_blocks * across
    splits = grad_splits(problem, programs, steps, chip)
    # Output rows that meet the image with some kernel row of each block.
    starts = range(0, kh, config.kernel_rows)
    met = [min(height + row - ky, height) - max(row - (ky + config.kernel_rows - 1), 0) for ky in starts]
    visited = sum(math.ceil(batch * max(rows, 0) / config.depth) for rows in met) * column_blocks
    rows = config.kernel_rows * config.inputs
    # Of the rows of x that the kernel rows of a block need, neighbours share all but one.
    fresh = (config.inputs * (1 + config.kernel_rows / 4) + config.outputs) * config.depth
    filled = (rows + config.outputs) * config.depth
    loads = filled / _pieces(problem, width, config.turned and not config.copied)
    block = (rows, config.outputs, config.depth)
    step = _step(problem, chip, block, fresh, filled, _instructions(config, loads, _COPY_FOR_GRADIENT))
    gathering = config.kernel_rows * 32 * config.outputs / _LOADS_EACH * 2
    each = visited / row_blocks / splits * step + _PROGRAM + gathering
    # Two images are read and written once more.
    copying = 4 * batch * channels * height * width * itemsize(problem.dtype) / _COPIED / chip.processors
    extra = 2 * _LAUNCH + copying * (2 if config.turned else 1) if config.copied else 0
    return extra + _over(programs * splits, each, chip, 1 if rows * config.outputs > 128 * 64 else 2)


def _flat_grad(problem: Problem, config: FlatGrad, chip: Chip) -> float:
    batch, channels = problem.shape[:2]
    kh, kw = problem.kernels[0]
    numbers = 2 * config.pixels * config.images
    block = (config.pixels, config.pixels, config.images)
    step = _step(problem, chip, block, numbers, 0, _instructions(config, numbers, _COPY)) + _STEP
    gathering = power_of_two(kh * kw) * config.pixels / _LOADS_EACH * 2
    splits = flat_splits(problem, config, chip)
    each = math.ceil(batch / config.images / splits) * step + _PROGRAM + gathering
    return _over(channels * splits, each, chip, 2)


def _direct(problem: Problem, config: Planes | Channels, chip: Chip) -> float:
    batch, channels, height, width = problem.shape
    taps = sum(kh * kw for kh, kw in problem.kernels)
    outputs = batch * channels * height * width
    work = 2 * outputs * taps / (_MULTIPLY_ADDS * _DIRECT_SHARE)
    if isinstance(config, Planes):
        programs = math.ceil(batch * channels / config.planes) * math.ceil(height * width / config.pixels)
        loads = outputs * taps / _LOADS_EACH
    else:
        tiles = math.ceil(height / config.rows) * math.ceil(width / config.columns)
        programs = batch * tiles * math.ceil(channels / config.channels)
        # Every value that is loaded serves all the rows of the block that see it.
        seen = sum((config.rows + kh - 1) * kw for kh, kw in problem.kernels) / config.rows
        waste = tiles * config.rows * config.columns / (height * width)
        loads = outputs * seen * waste / _LOADS_EACH / 2
        work *= waste
    return _over(programs, max(work, loads) / max(1, programs) + _PROGRAM / 4, chip, 4)


def _channels_grad(problem: Problem, config: ChannelsGrad, chip: Chip) -> float:
    batch, channels, height, width = problem.shape
    kh, kw = problem.kernels[0]
    lines = batch * height
    programs = math.ceil(channels / config.channels) * kh
    splits = grad_splits(problem, programs, lines, chip)
    numbers = config.columns * config.channels
    step = max(2 * numbers * kw / (_MULTIPLY_ADDS * _DIRECT_SHARE), numbers * (kw + 1) / _LOADS_EACH / 2)
    each = math.ceil(lines / splits) * math.ceil(width / config.columns) * step + _PROGRAM
    return _over(programs * splits, each, chip, 4)
