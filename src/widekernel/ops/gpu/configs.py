"""The configurations of each kernel: block shapes, warps and pipeline stages, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch

from widekernel.errors import ArgumentError
from widekernel.ops.problem import Problem

OLDEST = (8, 0)
"""Compute capability of the oldest GPUs whose tensor cores take bfloat16 and whose loads are asynchronous."""


@dataclass(frozen=True)
class Chip:
    """What the choice of a configuration needs to know of a GPU.

    Attributes:
        capability: compute capability (major, minor).
        processors: streaming multiprocessors.
        shared_bytes: shared memory that one program may have.
    """

    capability: tuple[int, int]
    processors: int
    shared_bytes: int

    @property
    def name(self) -> str:
        """Give the architecture as compilers call it."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Config:
    """How a kernel is run.

    Attributes:
        warps: of a program, 32 threads each.
        stages: blocks in flight while loads are pipelined.
    """

    method: ClassVar[str]
    warps: int
    stages: int

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value}" for name, value in asdict(self).items())
        return f"{self.method} ({numbers})"

    def entry(self) -> dict[str, Any]:
        """Give what stands for it in a table."""
        return {"method": self.method, **asdict(self)}


@dataclass(frozen=True)
class Toeplitz(Config):
    """Banded Toeplitz products: M = rows·columns output pixels, N = images·row_blocks, K = depth input columns.

    With `turned` 1 rows are columns and columns rows.
    """

    method = "toeplitz"
    rows: int
    columns: int
    row_blocks: int
    images: int
    depth: int
    turned: int = 0


@dataclass(frozen=True)
class Flat(Config):
    """One product for a whole plane of at most `pixels` pixels, with `images` at a time."""

    method = "flat"
    pixels: int
    images: int


@dataclass(frozen=True)
class Planes(Config):
    """Multiply-adds on contiguous planes: `planes` by `pixels` outputs a program."""

    method = "direct"
    planes: int
    pixels: int


@dataclass(frozen=True)
class Channels(Config):
    """Multiply-adds on channels_last images: rows by columns by channels outputs a program."""

    method = "direct channels_last"
    rows: int
    columns: int
    channels: int


@dataclass(frozen=True)
class ToeplitzGrad(Config):
    """Weight gradient by products: M = kernel_rows·inputs, N = outputs columns, K = depth pairs of an image and a row.

    With `turned` 1 rows are columns and columns rows. With `copied` 1 both images are copied first, so that rows (or what is
    called so) are contiguous and begin at multiples of 16 bytes.
    """

    method = "toeplitz weight gradient"
    kernel_rows: int
    inputs: int
    outputs: int
    depth: int
    turned: int = 0
    copied: int = 0


@dataclass(frozen=True)
class FlatGrad(Config):
    """Weight gradient of small maps: one product of all `pixels` of a plane with all others, `images` at a time."""

    method = "flat weight gradient"
    pixels: int
    images: int


@dataclass(frozen=True)
class ChannelsGrad(Config):
    """Weight gradient by multiply-adds on channels_last images: columns by channels at a time."""

    method = "direct weight gradient, channels_last"
    columns: int
    channels: int


KINDS: dict[str, type[Config]] = {
    kind.method: kind for kind in (Toeplitz, Flat, Planes, Channels, ToeplitzGrad, FlatGrad, ChannelsGrad)
}
WIDEST_DIAGONALS = 64
"""Kernel columns of one launch of the weight gradient; wider kernels take several."""


def from_entry(entry: dict[str, Any]) -> Config:
    """Give the configuration that stands in a table.

    Raises:
        ArgumentError: if there is no such method or its numbers are not those that it has.
    """
    numbers = dict(entry)
    method = numbers.pop("method", None)
    if method not in KINDS:
        raise ArgumentError(f"there is no method {method!r}: it must be one of {', '.join(KINDS)}")
    names = {field.name for field in fields(KINDS[method])}
    whole = all(isinstance(number, int) and number >= (name not in ("turned", "copied")) for name, number in numbers.items())
    if set(numbers) != names or not whole:
        raise ArgumentError(f"{method} has {numbers}: it needs positive whole numbers {', '.join(sorted(names))}")
    return KINDS[method](**numbers)


def power_of_two(number: int) -> int:
    """Give the smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def itemsize(dtype: torch.dtype) -> int:
    """Give the bytes of a number."""
    return torch.empty((), dtype=dtype, device="meta").element_size()


def turned(problem: Problem) -> Problem:
    """Give the problem with rows and columns exchanged."""
    batch, channels, height, width = problem.shape
    kernels = tuple((kw, kh) for kh, kw in problem.kernels)
    anchors = tuple((column, row) for row, column in problem.anchors)
    return replace(problem, shape=(batch, channels, width, height), kernels=kernels, anchors=anchors)


def lead_of(config: Toeplitz, kw: int, column: int, copies: int) -> int:
    """Give how many columns before the outputs the blocks of input columns begin, at least `column`.

    Copies of 16 bytes want multiples of `copies`, but halves and quarters of that will do where they save a block.
    """

    def blocks(lead: int) -> int:
        return math.ceil((lead + config.columns + kw - 1 - column) / config.depth)

    leads = [-(-column // unit) * unit for unit in (copies, copies // 2, copies // 4)]
    return min(leads, key=blocks)


def expanded_length(config: Toeplitz, pad: int, kw: int) -> int:
    """Give the length of a kernel row between zeros, `pad` of them in front, as far as blocks reach over it."""
    return -(-(pad + kw + config.columns + config.depth) // 16) * 16


def padded_width(width: int, dtype: torch.dtype) -> int:
    """Give the number of columns, not below `width`, with which rows are a multiple of 16 bytes."""
    numbers = 16 // itemsize(dtype)
    return -(-width // numbers) * numbers


def blocks_across(config: ToeplitzGrad, width: int, kw: int, column: int, align: int) -> tuple[int, int]:
    """Give the column of x, relative to a block of output columns, at which its blocks begin, and how many there are."""
    if width <= config.outputs:
        return 0, math.ceil(width / config.inputs)
    offset = -column // align * align
    return offset, math.ceil((config.outputs + kw - 1 - column - offset) / config.inputs)
