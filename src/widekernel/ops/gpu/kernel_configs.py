"""The configurations of each kernel: block shapes, warps and pipeline stages, and their entries in tuning tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from widekernel.errors import ArgumentError

OLDEST_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs with bfloat16 in tensor cores and asynchronous loads."""


@dataclass(frozen=True)
class Chip:
    """The properties of a GPU that the choice of a configuration depends on.

    Attributes:
        capability: compute capability (major, minor).
        processors: number of streaming multiprocessors.
        shared_bytes: shared memory that one program may use.
    """

    capability: tuple[int, int]
    processors: int
    shared_bytes: int

    @property
    def name(self) -> str:
        """Name of the architecture in compilers, such as `sm_90`."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class KernelConfig:
    """The launch configuration of a kernel.

    Attributes:
        method: name of the kernel.
        gaps: what the kernel computes between the taps of a dilated kernel; '' if nothing.
        warps: number of warps of a program, 32 threads each.
        stages: number of blocks in flight while loads are pipelined.
    """

    method: ClassVar[str]
    gaps: ClassVar[str] = ""
    warps: int
    stages: int

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value}" for name, value in asdict(self).items())
        return f"{self.method} ({numbers})"

    def to_entry(self) -> dict[str, Any]:
        """Return the entry for tuning tables."""
        return {"method": self.method, **asdict(self)}


@dataclass(frozen=True)
class Toeplitz(KernelConfig):
    """Banded Toeplitz products: M = rows·columns output pixels, N = images·row_blocks, K = depth input columns.

    If `transposed` is 1, rows and columns are exchanged.
    """

    method = "toeplitz"
    gaps = "rows in the gaps of all outputs of a block are skipped, columns in gaps are multiplied by zero"
    rows: int
    columns: int
    row_blocks: int
    images: int
    depth: int
    transposed: int = 0


@dataclass(frozen=True)
class Flat(KernelConfig):
    """One product for a whole plane of at most `pixels` pixels, for `images` images at a time."""

    method = "flat"
    gaps = "gaps are zeros of the matrix, whose size does not depend on the taps"
    pixels: int
    images: int


@dataclass(frozen=True)
class DirectNchw(KernelConfig):
    """Multiply-adds on contiguous planes: each program computes `planes` by `pixels` outputs."""

    method = "direct"
    planes: int
    pixels: int


@dataclass(frozen=True)
class DirectNhwc(KernelConfig):
    """Multiply-adds on channels_last images: each program computes rows by columns by channels outputs."""

    method = "direct channels_last"
    rows: int
    columns: int
    channels: int


@dataclass(frozen=True)
class ToeplitzGrad(KernelConfig):
    """Weight gradient by products: M = kernel_rows·inputs, N = outputs columns, K = depth pairs of an image and a row.

    If `transposed` is 1, rows and columns are exchanged. If `copied` is 1, both images are copied first, so that rows (or
    columns, if transposed) are contiguous and begin at multiples of 16 bytes.
    """

    method = "toeplitz weight gradient"
    gaps = "rows in gaps are skipped, columns in gaps are multiplied, but not added up"
    kernel_rows: int
    inputs: int
    outputs: int
    depth: int
    transposed: int = 0
    copied: int = 0


@dataclass(frozen=True)
class FlatGrad(KernelConfig):
    """Weight gradient of small maps: one product of all pixels of a plane with all others, for `images` at a time."""

    method = "flat weight gradient"
    gaps = "all pairs of pixels are multiplied, whatever the taps"
    pixels: int
    images: int


@dataclass(frozen=True)
class DirectNhwcGrad(KernelConfig):
    """Weight gradient by multiply-adds on channels_last images: columns by channels at a time."""

    method = "direct weight gradient, channels_last"
    columns: int
    channels: int


CONFIG_TYPES: dict[str, type[KernelConfig]] = {
    kind.method: kind for kind in (Toeplitz, Flat, DirectNchw, DirectNhwc, ToeplitzGrad, FlatGrad, DirectNhwcGrad)
}
_SWITCHES = ("transposed", "copied")
_OLD_NAMES = {"turned": "transposed"}  # in tables of widekernel 0.4.0 and older


def config_from_entry(entry: dict[str, Any]) -> KernelConfig:
    """Return the configuration that a tuning table stores.

    Raises:
        ArgumentError: if the method is unknown, or its numbers are incomplete or not valid.
    """
    numbers = {_OLD_NAMES.get(name, name): number for name, number in entry.items()}
    method = numbers.pop("method", None)
    if method not in CONFIG_TYPES:
        raise ArgumentError(f"unknown method {method!r}: it must be one of {', '.join(CONFIG_TYPES)}")
    names = {field.name for field in fields(CONFIG_TYPES[method])}
    valid = all(isinstance(number, int) and number >= (name not in _SWITCHES) for name, number in numbers.items())
    if set(numbers) != names or not valid:
        raise ArgumentError(f"{method} has {numbers}: it needs positive whole numbers {', '.join(sorted(names))}")
    return CONFIG_TYPES[method](**numbers)
