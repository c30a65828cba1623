"""The candidate configurations that fit on a GPU, for each problem."""

from __future__ import annotations

from dataclasses import replace

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
from widekernel.ops.gpu.launch_geometry import GRAD_LAUNCH_COLUMNS, itemsize, next_power_of_two, transposed
from widekernel.ops.problem import DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD, DIRECT, Problem

MOST_FLAT_PIXELS = 128
"""Largest number of pixels of a plane that is computed at once: its matrix has the square of that many elements."""
LARGEST_DIRECT = 9
"""Largest kernel side for which channels_last images keep their layout."""
LARGEST_DIRECT_PLANES = 25
"""Largest number of kernel taps for which contiguous planes are computed by multiply-adds."""
_ACCUMULATORS = 256 * 128
_MOST_GATHERED = 64
_MOST_SQUARE = 64
_MOST_IN_PARTS = 64 * 32
_MOST_UNROLLED = 400
# Major compute capabilities whose tensor cores read from shared memory; all others read from registers.
_FROM_SHARED = (9, 10)
# Matrix elements that a thread may keep in registers, by the size of a number in 16-bit words.
_MOST_KEPT = {1: 96, 2: 48}
# Matrix elements of all branches, beyond which 4 warps spill although tensor cores read from shared memory.
_MOST_OF_FOUR_WARPS = 3 * 64**2


def candidates(problem: Problem, chip: Chip) -> list[KernelConfig]:
    """Return the configurations with which the problem can run on a GPU like `chip`, in no particular order."""
    if problem.op == DEPTHWISE_WEIGHT_GRAD:
        if small_channels_last(problem) or problem.algorithm == DIRECT:
            return _direct_nhwc_grads(problem)
        return _toeplitz_grads(problem, chip) + _flat_grads(problem, chip)
    if small_channels_last(problem):
        return _direct_nhwc(problem)
    if problem.algorithm == DIRECT:
        return _direct_nchw(problem)
    return _toeplitz(problem, chip) + _flat(problem, chip) + _direct_nchw(problem)


def small_channels_last(problem: Problem) -> bool:
    """Return whether images stay channels_last: for these kernels, changing the layout would take longer than it saves."""
    return problem.channels_last and small(problem)


def small(problem: Problem) -> bool:
    """Return whether the kernels are small enough for multiply-adds on channels_last images."""
    return all(max(size) <= LARGEST_DIRECT for size in problem.kernels)


def small_contiguous(problem: Problem) -> bool:
    """Return whether multiply-adds on contiguous planes may compute the sum."""
    few = all(kh * kw <= LARGEST_DIRECT_PLANES for kh, kw in problem.kernels)
    return problem.op == DEPTHWISE_SUM and few and not problem.channels_last


# Output pixels in M: rows by columns.
_TILES = [(1, 16), (4, 16), (8, 16), (16, 16), (8, 8), (16, 8), (32, 8), (2, 32), (4, 32), (1, 64), (2, 64), (4, 64)]


def _toeplitz(problem: Problem, chip: Chip) -> list[KernelConfig]:
    found: list[KernelConfig] = []
    for columns_in_m, each in ((0, problem), (1, transposed(problem))):
        # Loads along the other axis are slow. They are worth trying for tall kernels, with nothing but columns in M.
        if columns_in_m and not any(kw > 2 * kh for kh, kw in each.kernels):
            continue
        batch, _, height, width = each.shape
        # Unaligned rows are copied in small pieces, whose addresses occupy registers.
        most = _ACCUMULATORS // (1 if width * itemsize(problem.dtype) % 16 == 0 else 2)
        for rows, columns in _TILES[:1] + _TILES[9:10] if columns_in_m else _TILES:
            if columns > max(16, next_power_of_two(width)) or rows > next_power_of_two(height):
                continue
            for row_blocks in (1, 2, 4, 8, 16, 32, 64):
                if (row_blocks > 1 and rows * row_blocks >= 2 * next_power_of_two(height)) or (
                    columns_in_m and row_blocks < 16
                ):
                    continue
                for total in (16, 32, 64, 128, 256):
                    images = total // row_blocks
                    if not 1 <= images <= max(next_power_of_two(batch), 16) or rows * columns * total > most:
                        continue
                    for depth in (16, 32, 64):
                        stages = 4 if depth < 64 else 3
                        held = (rows * columns + total) * depth * itemsize(problem.dtype) * stages
                        if held <= min(chip.shared_bytes, 160 * 1024) - 4096 and depth < max(
                            2 * next_power_of_two(width), 32
                        ):
                            # Float32 occupies twice the registers on the way to the tensor cores.
                            few = 128 * 64 if itemsize(problem.dtype) < 4 else 64 * 64
                            warps = 4 if rows * columns * total <= few else 8
                            found.append(Toeplitz(warps, stages, rows, columns, row_blocks, images, depth, columns_in_m))
    return found


def _plane_block(problem: Problem) -> int:
    """Return the size of a block for the pixels of a plane: a power of two, at least the minimum of a product."""
    return next_power_of_two(max(16, problem.shape[2] * problem.shape[3]))


def _flat(problem: Problem, chip: Chip) -> list[KernelConfig]:
    pixels = _plane_block(problem)
    if pixels > MOST_FLAT_PIXELS:
        return []
    most = next_power_of_two(max(16, problem.shape[0]))
    bytes_each = itemsize(problem.dtype)
    found: list[KernelConfig] = []
    one_matrix = problem.op == DEPTHWISE_SUM
    # Float32 is split into two parts. Both are held in shared memory, and may need more registers than there are.
    in_parts = problem.dtype == torch.float32 and not problem.tf32
    for images in (16, 32, 64, 128):
        warps = _flat_warps(problem, chip, pixels, images, in_parts)
        if images > most or not warps:
            continue
        # Matrices of several branches are pipelined like images; in float32 they are too large for that.
        for stages in (1, 2) if one_matrix or bytes_each < 4 else (1,):
            matrices = (2 if in_parts else 1) * (1 if one_matrix else stages)
            held = pixels * (pixels * matrices + images * (stages + 1)) * bytes_each
            if held <= chip.shared_bytes - 4096:
                found.append(Flat(warps, stages, pixels, images))
    return found


def _flat_warps(problem: Problem, chip: Chip, pixels: int, images: int, in_parts: bool) -> int:
    """Return the number of warps of a program with this configuration; 0 if it needs more registers than there are."""
    one_matrix = problem.op == DEPTHWISE_SUM
    if in_parts:
        few = pixels * images <= _MOST_IN_PARTS and (one_matrix or pixels <= 64)
        if not few and not (one_matrix and chip.capability[0] == 9):
            return 0
    from_shared = chip.capability[0] in _FROM_SHARED
    if from_shared and not one_matrix and pixels <= 64 and len(problem.kernels) * pixels**2 > _MOST_OF_FOUR_WARPS:
        return 8 if pixels * images <= _MOST_IN_PARTS else 0
    if one_matrix or from_shared:
        return 4 if pixels * images <= (64 * 16 if in_parts else 64 * 128) else 8
    # Unless they are large, the matrices of all branches stay in registers from one block of images to the next.
    warps = 8 if pixels == 64 else 4
    kept = 0 if pixels > 64 else len(problem.kernels) * pixels**2 // (32 * warps)
    words = itemsize(problem.dtype) // 2
    return warps if kept <= _MOST_KEPT[words] and words * pixels * images <= _MOST_IN_PARTS else 0


def _direct_nchw(problem: Problem) -> list[KernelConfig]:
    if not small_contiguous(problem):
        return []
    pixels = _plane_block(problem)
    # Loads of all taps, of all planes of a program, are in flight at once. More of them spill, up to 10 KiB each.
    totals = (256, 512, 1024) if pixels > 64 else (256, 512)
    return [DirectNchw(4, 1, max(1, total // pixels), min(pixels, total)) for total in totals]


def _direct_nhwc(problem: Problem) -> list[KernelConfig]:
    _, channels, height, width = problem.shape
    taps = sum(kh * kw for kh, kw in problem.kernels)
    found: list[KernelConfig] = []
    for rows in (1, 2, 4, 8):
        # Every tap of every row is a separate instruction. More of them take minutes to compile, and spill.
        if rows > 1 and rows * taps > _MOST_UNROLLED:
            break
        for columns, side in ((4, 32), (4, 64), (8, 32), (8, 64), (16, 32), (4, 128)):
            fits = rows <= next_power_of_two(height) and columns <= max(4, next_power_of_two(width))
            if fits and side <= max(32, next_power_of_two(channels)):
                # Two numbers per thread: for more, the taps of a column do not fit into registers; for one, loads are small.
                found += [DirectNhwc(warps, 1, rows, columns, side) for warps in (2, 4, 8) if columns * side == 64 * warps]
    return found


def _toeplitz_grads(problem: Problem, chip: Chip) -> list[KernelConfig]:
    found: list[KernelConfig] = []
    # Numbers that are split in two for products in TF32 occupy registers; with more, Triton 3.6 runs out of them.
    most = 128 * 64 if problem.dtype == torch.float32 and not problem.tf32 else _ACCUMULATORS
    for rows_in_m, each in ((0, problem), (1, transposed(problem))):
        (kh, kw), width = each.kernels[0], each.shape[3]
        if rows_in_m and kw <= 2 * kh:
            continue
        whole = max(16, next_power_of_two(width))
        for kernel_rows in (1, 2, 4, 8):
            for inputs in (16, 32, 64, 128):
                for outputs in (16, 32, 64):
                    rows = kernel_rows * inputs
                    if inputs > 2 * whole or outputs > whole or not 16 <= rows <= 256 or kernel_rows > next_power_of_two(kh):
                        continue
                    if rows * outputs > most:
                        continue
                    for depth in (32, 64):
                        stages = 3
                        # The pipeline, or the accumulators while their diagonals are gathered.
                        held = max((rows + outputs) * depth * itemsize(problem.dtype) * stages, rows * outputs * 4)
                        warps = 8 if rows * outputs > 64 * 64 else 4
                        # Diagonals that a thread gathers at the end. More of them spill.
                        gathered = kernel_rows * next_power_of_two(min(kw, GRAD_LAUNCH_COLUMNS)) * outputs // (32 * warps)
                        if held <= chip.shared_bytes - 4096 and gathered <= _MOST_GATHERED:
                            chosen = ToeplitzGrad(warps, stages, kernel_rows, inputs, outputs, depth, rows_in_m)
                            found.append(chosen)
                            if rows_in_m or width * itemsize(problem.dtype) % 16:
                                found.append(replace(chosen, copied=1))
    return found


def _flat_grads(problem: Problem, chip: Chip) -> list[KernelConfig]:
    pixels = _plane_block(problem)
    taps = next_power_of_two(max(16, problem.kernels[0][0] * problem.kernels[0][1]))
    bytes_each = itemsize(problem.dtype)
    found: list[KernelConfig] = []
    in_parts = problem.dtype == torch.float32 and not problem.tf32
    for images in (16, 32, 64):
        for warps in (4, 8):
            fits = max(2 * pixels * images * bytes_each, pixels * pixels * 4) <= chip.shared_bytes - 4096
            fits = fits and not (in_parts and images > 32)
            if fits and pixels <= _MOST_SQUARE and taps * pixels <= _MOST_GATHERED * 32 * warps:
                found.append(FlatGrad(warps, 2, pixels, images))
    return found


def _direct_nhwc_grads(problem: Problem) -> list[KernelConfig]:
    channels, width = problem.shape[1], problem.shape[3]
    found: list[KernelConfig] = []
    for columns, side in ((4, 32), (4, 64), (8, 32), (8, 64), (16, 32)):
        if columns <= max(4, next_power_of_two(width)) and side <= max(32, next_power_of_two(channels)):
            found.append(DirectNhwcGrad(4, 1, columns, side))
    return found
