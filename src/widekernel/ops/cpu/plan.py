"""Execution plans of the native library: which kernels are merged, and which algorithm each one uses.

The *direct* algorithm works tap by tap. The *hybrid* algorithm applies a Fourier transform along one axis and is direct
along the other; it takes fewer operations if a kernel is long and the image is not small. A cost model decides. It counts
processor cycles for one block of channels of one image, with constants fitted to measurements (see `widekernel bench ops`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from widekernel.ops.cpu.library import DIRECT, HYBRID_ALONG_COLUMNS, HYBRID_ALONG_ROWS, MOST_PASSES
from widekernel.ops.problem import DEPTHWISE_SUM, Problem, touching

METHODS = {DIRECT: "direct", HYBRID_ALONG_ROWS: "hybrid along rows", HYBRID_ALONG_COLUMNS: "hybrid along columns"}

# The longest transform; wider kernels are computed directly.
LONGEST_TRANSFORM = 256
# Vector multiply-adds per cycle of the micro-kernels, and the overhead of each micro-kernel call in cycles.
DIRECT_RATE, DIRECT_TILE = 1.8, 35
COMPLEX_RATE, COMPLEX_TILE = 1.75, 45
TRANSFORM_RATE, TRANSFORM_TILE = 1.8, 230
# Widths of the register tiles.
DIRECT_WIDTH, COMPLEX_WIDTH, WAVES, LINES = 10, 5, 5, 4
# Cycles for packing and unpacking one vector, and for fetching a vector of a transformed kernel into the cache.
PACKING, FETCHING = 12, 2.5
# Images with fewer elements than this take less time than the call overhead.
SMALL_CALL = 1 << 16


@dataclass(frozen=True)
class Piece:
    """A kernel: (rows, columns) and the anchor (row, column)."""

    rows: int
    columns: int
    row: int
    column: int

    def covers(self, other: Piece) -> bool:
        """Return whether every tap of `other` coincides with a tap of this kernel when the anchors are aligned."""
        return (
            other.row <= self.row
            and other.column <= self.column
            and other.rows - other.row <= self.rows - self.row
            and other.columns - other.column <= self.columns - self.column
        )


@dataclass(frozen=True)
class Pass:
    """A kernel as executed, and the method (a key of `METHODS`)."""

    piece: Piece
    method: int

    def __str__(self) -> str:
        return f"{self.piece.rows}x{self.piece.columns} {METHODS[self.method]}"


@dataclass(frozen=True)
class Plan:
    """The passes of a call, the pass that each kernel is merged into, the number of threads, and the estimated cycles."""

    passes: tuple[Pass, ...]
    targets: tuple[int, ...]
    threads: int
    cycles: float

    def __str__(self) -> str:
        return " + ".join(str(step) for step in self.passes)


@lru_cache(maxsize=4096)
def plan(problem: Problem, threads: int, lanes: int) -> Plan:
    """Choose the cheapest way to compute `problem`."""
    _, _, height, width = problem.shape
    pieces = [_cropped(size, anchor, height, width) for size, anchor in zip(problem.kernels, problem.anchors)]
    best: tuple[float, tuple[Pass, ...], tuple[int, ...]] | None = None
    for groups in _groupings(pieces) if problem.op == DEPTHWISE_SUM else [[[0]]]:
        passes, cycles = [], 0.0
        for group in groups:
            step, cost = _cheapest(_bounding([pieces[i] for i in group]), problem)
            passes.append(step)
            cycles += cost
        targets = [next(n for n, group in enumerate(groups) if i in group) for i in range(len(pieces))]
        if best is None or cycles < best[0]:
            best = cycles, tuple(passes), tuple(targets)
    assert best is not None
    blocks = problem.shape[0] * math.ceil(problem.shape[1] / lanes)
    total = blocks * (best[0] + 2 * PACKING * height * width)
    return Plan(best[1], best[2], _worthwhile_threads(total, threads), total)


def reason_for_pytorch(problem: Problem) -> str | None:
    """Return why PyTorch's convolution should compute the problem instead, or None if it should not.

    Measured on one and two threads, AVX-512, with 16 to 1,024 channels and maps of 7 to 112 pixels. For channels_last
    images, oneDNN's kernels for up to 5x5 taps take 0.5 to 0.9 of our time, except on tensors so small that call overhead
    dominates. For 7x7 taps this holds only if the distance between pixels is a multiple of 2 KiB, which caches handle badly.
    """
    batch, channels, height, width = problem.shape
    if problem.op != DEPTHWISE_SUM or not problem.channels_last or len(problem.kernels) != 1:
        return None
    size, elements = max(problem.kernels[0]), batch * channels * height * width
    if size <= 5 and elements > SMALL_CALL:
        return f"PyTorch's convolution is faster for a kernel as small as {size} on a channels_last image"
    if size <= 7 and channels % 512 == 0 and elements > SMALL_CALL:
        return f"PyTorch's convolution is faster for a kernel as small as {size} on {channels} channels_last channels"
    return None


def _worthwhile_threads(cycles: float, threads: int) -> int:
    # Waking a passively waiting thread takes tens of microseconds.
    return threads if cycles > 60_000 else 1


def _cropped(size: tuple[int, int], anchor: tuple[int, int], height: int, width: int) -> Piece:
    """Return the kernel without the taps that only ever meet padding."""
    rows, columns = touching(size[0], anchor[0], height), touching(size[1], anchor[1], width)
    return Piece(rows.stop - rows.start, columns.stop - columns.start, anchor[0] - rows.start, anchor[1] - columns.start)


def _groupings(pieces: Sequence[Piece]) -> list[list[list[int]]]:
    """Return promising ways to merge kernels into passes: covered kernels into those that cover them, or all into one."""
    maximal: list[list[int]] = []
    order = sorted(range(len(pieces)), key=lambda i: -pieces[i].rows * pieces[i].columns)
    for i in order:
        home = next((group for group in maximal if pieces[group[0]].covers(pieces[i])), None)
        if home is None:
            maximal.append([i])
        else:
            home.append(i)
    together = [list(range(len(pieces)))]
    if len(maximal) == 1:
        return [maximal]
    return [maximal, together] if len(maximal) <= MOST_PASSES else [together]


def _bounding(pieces: Sequence[Piece]) -> Piece:
    row, column = max(p.row for p in pieces), max(p.column for p in pieces)
    below, right = max(p.rows - p.row for p in pieces), max(p.columns - p.column for p in pieces)
    return Piece(row + below, column + right, row, column)


def _cheapest(piece: Piece, problem: Problem) -> tuple[Pass, float]:
    images, _, height, width = problem.shape
    grad = problem.op != DEPTHWISE_SUM
    turned = Piece(piece.columns, piece.rows, piece.column, piece.row)
    options = [
        (DIRECT, _direct(piece if piece.columns >= piece.rows else turned, *_lines_and_extent(piece, height, width), grad))
    ]
    if problem.algorithm is None:
        options.append((HYBRID_ALONG_ROWS, _hybrid(piece, height, width, images, grad)))
        options.append((HYBRID_ALONG_COLUMNS, _hybrid(turned, width, height, images, grad)))
    method, cycles = min(options, key=lambda option: option[1])
    return Pass(piece, method), cycles


def _lines_and_extent(piece: Piece, height: int, width: int) -> tuple[int, int]:
    return (height, width) if piece.columns >= piece.rows else (width, height)


def _overlaps(taps: int, anchor: int, extent: int) -> int:
    """Count the pairs of an output pixel and a tap that meets an input pixel, along one axis."""
    return sum(min(extent, i + taps - anchor) - max(0, i - anchor) for i in range(extent))


def _direct(piece: Piece, lines: int, extent: int, grad: bool) -> float:
    """Estimate the cycles of the direct algorithm, which slides along `extent`."""
    work = _overlaps(piece.rows, piece.row, lines) * _overlaps(piece.columns, piece.column, extent)
    outputs, across, window = (piece.rows, piece.columns, extent) if grad else (lines, extent, piece.columns)
    tiles = math.ceil(outputs / 2) * math.ceil(across / min(DIRECT_WIDTH, max(window, 3)))
    return work / DIRECT_RATE + tiles * DIRECT_TILE


def _hybrid(piece: Piece, lines: int, extent: int, images: int, grad: bool) -> float:
    """Estimate the cycles of the hybrid algorithm with the transform along `extent`; infinite if that is too long."""
    reach = max(piece.column, piece.columns - 1 - piece.column)
    between = _overlaps(piece.rows, piece.row, lines)
    outputs, window = (piece.rows, lines) if grad else (lines, piece.rows)
    best = math.inf
    for tiles in range(1, 9):
        tile = math.ceil(extent / tiles)
        length = 4 * math.ceil((extent + reach if tiles == 1 else tile + 2 * reach) / 4)
        if length > LONGEST_TRANSFORM:
            continue
        seen = tile // 2 + (0 if tiles == 1 else reach)
        cycles = _transform(lines, length, seen) + _transform(lines, length, tile // 2)
        cycles += (length // 2 + 1) * math.ceil(outputs / min(COMPLEX_WIDTH, window)) * COMPLEX_TILE
        cycles += 3 * (length // 2 + 1) * between / COMPLEX_RATE
        cycles += FETCHING * 3 * (length // 2 + 1) * piece.rows
        best = min(best, tiles * cycles + _transform(piece.rows, length, reach) / images)
    return best


def _transform(lines: int, length: int, reach: int) -> float:
    waves = length // 4 + 1
    rounds = math.ceil(lines / LINES)
    products = LINES * waves * (2 * reach + 1) / TRANSFORM_RATE
    return rounds * (8 * reach + math.ceil(waves / WAVES) * TRANSFORM_TILE + products)
