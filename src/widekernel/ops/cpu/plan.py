"""Execution plans of the native library: which kernels are merged, and which algorithm each one uses.

The *direct* algorithm works tap by tap. The *hybrid* algorithm applies a Fourier transform along one axis and is direct
along the other; it takes fewer operations if a kernel is long and the image is not small. A dilated kernel is computed
directly, or its gaps are filled with zeros, which allows everything that an undilated kernel does. A cost model decides. It
counts processor cycles for one block of channels of one image, with constants measured for each instruction set (costs.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from widekernel.ops.cpu.costs import AVX512, Costs
from widekernel.ops.cpu.library import DIRECT, HYBRID_ALONG_COLUMNS, HYBRID_ALONG_ROWS, MOST_PASSES
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    Problem,
    touching,
)
from widekernel.ops.problem import DIRECT as DIRECT_ALGORITHM

BRANCHES = (DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES)
METHODS = {DIRECT: "direct", HYBRID_ALONG_ROWS: "hybrid along rows", HYBRID_ALONG_COLUMNS: "hybrid along columns"}

# The longest transform; wider kernels are computed directly.
LONGEST_TRANSFORM = 256
# Images with fewer elements than this take less time than the call overhead.
SMALL_CALL = 1 << 16
# Sides of small kernels, and the most elements of a channels_last image on which ours are faster than PyTorch's.
_FEW_TAPS = ((5, SMALL_CALL),)
_FEW_TAPS_ON_AMD = ((3, 1 << 20), (5, 3 << 20))


@dataclass(frozen=True)
class Piece:
    """A kernel: (rows, columns) and the anchor (row, column), in taps, and the distance between neighboring taps."""

    rows: int
    columns: int
    row: int
    column: int
    dilation: int = 1

    def covers(self, other: Piece) -> bool:
        """Return whether this kernel has the dilation of `other` and all of its taps when the anchors are aligned."""
        return (
            other.dilation == self.dilation
            and other.row <= self.row
            and other.column <= self.column
            and other.rows - other.row <= self.rows - self.row
            and other.columns - other.column <= self.columns - self.column
        )

    def filled(self) -> Piece:
        """Return the kernel without dilation that has zeros in the gaps of this one."""
        d = self.dilation
        return Piece((self.rows - 1) * d + 1, (self.columns - 1) * d + 1, self.row * d, self.column * d)


@dataclass(frozen=True)
class Pass:
    """A kernel as executed, and the method (a key of `METHODS`)."""

    piece: Piece
    method: int

    def __str__(self) -> str:
        dilation = f" with dilation {self.piece.dilation}" if self.piece.dilation > 1 else ""
        return f"{self.piece.rows}x{self.piece.columns}{dilation} {METHODS[self.method]}"


@dataclass(frozen=True)
class Plan:
    """The passes of a call, the pass that each kernel is merged into, the number of threads, and the estimated cycles.

    Attributes:
        filled: the dilated kernels that are merged into a pass with a smaller dilation.
    """

    passes: tuple[Pass, ...]
    targets: tuple[int, ...]
    threads: int
    cycles: float
    filled: tuple[int, ...] = ()

    def __str__(self) -> str:
        gaps = f", gaps of {len(self.filled)} of {len(self.targets)} kernels filled with zeros" if self.filled else ""
        return " + ".join(str(step) for step in self.passes) + gaps


@lru_cache(maxsize=4096)
def plan(problem: Problem, threads: int, lanes: int, costs: Costs = AVX512) -> Plan:
    """Choose the cheapest way to compute `problem`."""
    images, channels, height, width = problem.shape
    rects = zip(problem.kernels, problem.anchors, problem.dilations)
    pieces = [_cropped(size, anchor, dilation, height, width) for size, anchor, dilation in rects]
    # Zeros between the taps of a kernel would spread an infinity to its gaps.
    no_zeros = problem.algorithm == DIRECT_ALGORITHM
    best: tuple[float, tuple[Pass, ...], list[list[int]], list[Piece]] | None = None
    groupings = _groupings(pieces, no_zeros) if problem.op == DEPTHWISE_SUM else [_one_by_one(pieces, problem, costs)]
    for taken, groups in groupings:
        steps = [_cheapest(_bounding([taken[i] for i in group]), problem, costs) for group in groups]
        cycles = sum(cost for _, cost in steps)
        if best is None or cycles < best[0]:
            best = cycles, tuple(step for step, _ in steps), groups, taken
    assert best is not None
    cycles, passes, groups, taken = best
    targets = tuple(next(n for n, group in enumerate(groups) if i in group) for i in range(len(pieces)))
    blocks = images * math.ceil(channels / lanes)
    packed = 1 + len(pieces) if problem.op in BRANCHES else 2
    total = blocks * (cycles + packed * costs.packing * height * width)
    filled = tuple(i for i, piece in enumerate(pieces) if taken[i] != piece)
    return Plan(passes, targets, _worthwhile_threads(total, threads), total, filled)


def reason_for_pytorch(problem: Problem, processor: str, isa: str) -> str | None:
    """Return why PyTorch's convolution should compute the problem instead, or None if it should not.

    On AMD's processors, measured on one (Zen 5) with two threads: with AVX-512, none of 20 channels_last shapes of up
    to 8x8 taps took more than about a tenth longer with ours (on a Zen 4, 4x4 taps on 512 channels took 1.4 times as long,
    and the other 59 forward cells of a sweep at most a tenth longer). With AVX2, oneDNN's kernels for few taps are
    mostly faster on large channels_last images, and for 7x7 taps on 1,024 channels.

    On others, the rule is that of measurements with AVX-512 before images passed through a rolling buffer, 16 to 1,024
    channels and maps of 7 to 112 pixels: oneDNN's kernels for up to 5x5 taps took 0.5 to 0.9 of our time on channels_last
    images, except on tensors so small that call overhead dominates. For 7x7 taps this held only if the distance between
    pixels was a multiple of 2 KiB, which caches handle badly.

    Args:
        problem: the problem.
        processor: as the native library names it.
        isa: name of the instruction set in use.
    """
    batch, channels, height, width = problem.shape
    if problem.op != DEPTHWISE_SUM or not problem.channels_last or len(problem.kernels) != 1:
        return None
    is_amd = processor in ("amd", "zen4")
    if is_amd and isa == "avx512":
        return None
    size, elements = max(problem.kernels[0]), batch * channels * height * width
    few_taps, unfavorable = (_FEW_TAPS_ON_AMD, 1024) if is_amd else (_FEW_TAPS, 512)
    largest = next((most for taps, most in few_taps if size <= taps), None)
    if largest is not None and elements > largest:
        return f"PyTorch's convolution is faster for a kernel as small as {size} on a channels_last image as large as this"
    if 5 < size <= 7 and channels % unfavorable == 0 and elements > SMALL_CALL:
        return f"PyTorch's convolution is faster for a kernel as small as {size} on {channels} channels_last channels"
    return None


def _worthwhile_threads(cycles: float, threads: int) -> int:
    # Waking a passively waiting thread takes tens of microseconds.
    return threads if cycles > 60_000 else 1


def _cropped(size: tuple[int, int], anchor: tuple[int, int], dilation: int, height: int, width: int) -> Piece:
    """Return the kernel without the taps that only ever meet padding."""
    rows, columns = touching(size[0], anchor[0], height, dilation), touching(size[1], anchor[1], width, dilation)
    extent = rows.stop - rows.start, columns.stop - columns.start
    # A kernel that keeps one tap has no gaps.
    return Piece(*extent, anchor[0] - rows.start, anchor[1] - columns.start, 1 if extent == (1, 1) else dilation)


def _groupings(pieces: list[Piece], no_zeros: bool) -> Iterator[tuple[list[Piece], list[list[int]]]]:
    """Return promising ways to merge kernels into passes, each with the kernels that are merged, some of them filled.

    Covered kernels are merged into those that cover them, or all kernels of one dilation into one. With `no_zeros`, no
    kernel reads pixels between its taps, unless there are too many for one call.
    """
    dense = [piece for piece in pieces if piece.dilation == 1]
    filled = [piece.filled() for piece in pieces]
    covered = [full if any(d.covers(full) for d in dense) else piece for piece, full in zip(pieces, filled)]
    # Without dilations, all three are the same.
    for taken in [pieces] if pieces == filled else [pieces, covered] if no_zeros else [pieces, covered, filled]:
        maximal: list[list[int]] = []
        for i in sorted(range(len(taken)), key=lambda i: -taken[i].rows * taken[i].columns):
            home = next((group for group in maximal if taken[group[0]].covers(taken[i])), None)
            if home is None:
                maximal.append([i])
            else:
                home.append(i)
        dilations = sorted({piece.dilation for piece in taken})
        together = [[i for i, piece in enumerate(taken) if piece.dilation == dilation] for dilation in dilations]
        if len(maximal) <= MOST_PASSES:
            yield taken, maximal
        if not no_zeros and len(together) < len(maximal) and len(together) <= MOST_PASSES:
            yield taken, together
    if no_zeros and len(maximal) > MOST_PASSES:
        yield filled, [list(range(len(pieces)))]


def _one_by_one(pieces: list[Piece], problem: Problem, costs: Costs) -> tuple[list[Piece], list[list[int]]]:
    """Return the cheaper form of each kernel, dilated or filled, and one group for each."""
    taken = pieces
    if problem.algorithm != DIRECT_ALGORITHM:
        taken = [min([piece, piece.filled()], key=lambda form: _cheapest(form, problem, costs)[1]) for piece in pieces]
    return taken, [[i] for i in range(len(pieces))]


def _bounding(pieces: Sequence[Piece]) -> Piece:
    row, column = max(p.row for p in pieces), max(p.column for p in pieces)
    below, right = max(p.rows - p.row for p in pieces), max(p.columns - p.column for p in pieces)
    return Piece(row + below, column + right, row, column, pieces[0].dilation)


def _cheapest(piece: Piece, problem: Problem, costs: Costs) -> tuple[Pass, float]:
    methods = METHODS if piece.dilation == 1 and problem.algorithm is None else (DIRECT,)
    options = [
        (step := Pass(piece, method), estimate(step, problem, costs) - _saved(step, problem, costs)) for method in methods
    ]
    return min(options, key=lambda option: option[1])


def _saved(step: Pass, problem: Problem, costs: Costs) -> float:
    """Estimate the cycles that a pass saves because it works on the image and the result in place, for most strides."""
    piece = step.piece
    in_place = (
        (problem.op, problem.dtype, len(problem.kernels)) == (DEPTHWISE_SUM, torch.float32, 1)
        and problem.channels_last
        and (step.method, piece.dilation) == (DIRECT, 1)
        and piece.rows * piece.columns <= costs.in_place
    )
    return 2 * costs.packing * problem.shape[2] * problem.shape[3] if in_place else 0.0


def estimate(step: Pass, problem: Problem, costs: Costs) -> float:
    """Estimate the cycles of a pass on one block of channels of one image, without packing."""
    piece = step.piece
    images, _, height, width = problem.shape
    grad = problem.op == DEPTHWISE_WEIGHT_GRAD
    if piece.dilation > 1:
        return _dilated(piece, height, width, grad, costs)
    turned = Piece(piece.columns, piece.rows, piece.column, piece.row)
    if step.method == DIRECT:
        wide = piece.columns >= piece.rows
        return _direct(piece, height, width, grad, costs) if wide else _direct(turned, width, height, grad, costs)
    if step.method == HYBRID_ALONG_ROWS:
        return _hybrid(piece, height, width, images, grad, costs)
    return _hybrid(turned, width, height, images, grad, costs)


def _overlaps(taps: int, anchor: int, extent: int, dilation: int = 1) -> int:
    """Count the pairs of an output pixel and a tap that meets an input pixel, along one axis."""
    return sum(max(0, extent - dilation * abs(tap - anchor)) for tap in range(taps))


def _dilated(piece: Piece, height: int, width: int, grad: bool, costs: Costs) -> float:
    """Estimate the cycles of a dilated kernel, whose columns are multiplied with the zeros beside the image, too."""
    work = _overlaps(piece.rows, piece.row, height, piece.dilation) * piece.columns * width
    outputs = (piece.rows, piece.columns) if grad else (height, width)
    return work / costs.dilated_rate + outputs[0] * math.ceil(outputs[1] / costs.direct_width) * costs.dilated_tile


def _direct(piece: Piece, lines: int, extent: int, grad: bool, costs: Costs) -> float:
    """Estimate the cycles of the direct algorithm, which slides along `extent`."""
    work = _overlaps(piece.rows, piece.row, lines) * _overlaps(piece.columns, piece.column, extent)
    outputs, across, window = (piece.rows, piece.columns, extent) if grad else (lines, extent, piece.columns)
    tiles = math.ceil(outputs / 2) * math.ceil(across / min(costs.direct_width, max(window, 3)))
    return work / costs.direct_rate + tiles * costs.direct_tile


def _hybrid(piece: Piece, lines: int, extent: int, images: int, grad: bool, costs: Costs) -> float:
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
        cycles = _transform(lines, length, seen, costs) + _transform(lines, length, tile // 2, costs)
        cycles += (length // 2 + 1) * math.ceil(outputs / min(costs.complex_width, window)) * costs.complex_tile
        cycles += 3 * (length // 2 + 1) * between / costs.complex_rate
        cycles += costs.fetching * 3 * (length // 2 + 1) * piece.rows
        best = min(best, tiles * cycles + _transform(piece.rows, length, reach, costs) / images)
    return best


def _transform(lines: int, length: int, reach: int, costs: Costs) -> float:
    waves = length // 4 + 1
    rounds = math.ceil(lines / costs.lines)
    products = costs.lines * waves * (2 * reach + 1) / costs.transform_rate
    return rounds * (8 * reach + math.ceil(waves / costs.waves) * costs.transform_tile + products)
