"""The convolutions that are timed, in named sets, with the minimum work and memory traffic of each."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from widekernel.errors import ArgumentError, nearest
from widekernel.models.unireplknet import DILATED_BRANCHES
from widekernel.ops.checks import check_dilation

FORWARD, INPUT_GRAD, WEIGHT_GRAD = PASSES = ("forward", "input gradient", "weight gradient")
BYTES = 4
"""Bytes per number, unless stated otherwise: on the CPU everything is timed in float32."""
DEFAULT_BATCH = 8
BLOCK_SIZE = 13
BLOCK_BRANCHES = ((BLOCK_SIZE, 1), *DILATED_BRANCHES[BLOCK_SIZE])
"""(side, dilation) of the branches of UniRepLKNet's large layers."""
BLOCK_SHAPES = {
    f"unireplknet-{stage}": (DEFAULT_BATCH, 80 << (stage - 1), 112 >> stage, 112 >> stage) for stage in range(1, 5)
}
"""(N, C, H, W) of the maps of UniRepLKNet-T by stage, whose first one has no such layers."""

# A sweep leaves out cases that take minutes per call in the slowest implementation, or gigabytes in all of them.
LARGEST_TENSOR = 2**28
MOST_MACS = 40e9

SWEPT_KERNELS = (3, 5, 7, 9, 13, 21, 31, 51, 61)
SWEPT_EVEN = (4, 8, 16, 32)
SWEPT_STRIPS = (13, 21, 31, 51, 61)
SWEPT_MAPS = (7, 14, 28, 56, 112, 224)
SWEPT_CHANNELS = (16, 48, 96, 256, 512, 2048)
SWEPT_BATCHES = (1, 8, 32)
STRIP_WIDTH = 5


@dataclass(frozen=True)
class Case:
    """A depthwise convolution with stride 1 that keeps the size of its input.

    Attributes:
        name: short name for tables.
        batch: N.
        channels: C.
        height: H.
        width: W.
        kernel: (kh, kw) in taps, anchored at the middle tap; of an even size, at the second of the two middle ones.
        dilation: distance between neighboring taps in pixels.
    """

    name: str
    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    dilation: int = 1

    def __post_init__(self) -> None:
        check_dilation(f"the dilation of {self.name}", self.dilation)
        if min(self.shape) < 1:
            raise ArgumentError(f"the shape of {self.name} is {self.shape}: N, C, H and W must be positive")
        if min(self.kernel) < 1:
            raise ArgumentError(
                f"the kernel of {self.name} is {self.kernel[0]}x{self.kernel[1]}: both sizes must be positive"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return self.batch, self.channels, self.height, self.width

    @property
    def tensor_bytes(self) -> int:
        """Size of the input, which is also that of the output."""
        return BYTES * self.batch * self.channels * self.height * self.width

    @property
    def bytes_moved(self) -> int:
        """Minimum number of bytes that any algorithm reads and writes in each pass: two images and one kernel."""
        return self.bytes_moved_in(BYTES)

    def bytes_moved_in(self, size: int) -> int:
        """Return `bytes_moved` for numbers of `size` bytes."""
        return size * self.channels * (2 * self.batch * self.height * self.width + self.kernel[0] * self.kernel[1])

    @property
    def macs(self) -> int:
        """Multiply-accumulates in each pass, counting taps on pixels but not on padding."""
        rows, columns = inside(self.height, self.kernel[0], self.dilation), inside(self.width, self.kernel[1], self.dilation)
        return self.batch * self.channels * rows * columns

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte moved."""
        return 2 * self.macs / self.bytes_moved

    def __str__(self) -> str:
        sizes = "x".join(str(size) for size in self.shape)
        return f"{sizes} {self.kernel[0]}x{self.kernel[1]}" + (f"d{self.dilation}" if self.dilation > 1 else "")


@lru_cache(maxsize=1024)
def inside(extent: int, taps: int, dilation: int = 1) -> int:
    """Count the pairs of an output and a tap whose tap lies on a pixel, along an axis of `extent` pixels."""
    offsets = range(-(taps // 2), (taps - 1) // 2 + 1)
    return sum(max(0, extent - abs(offset) * dilation) for offset in offsets)


def _set(rows: str) -> dict[str, Case]:
    """Parse cases from lines "name C H W kh kw [N]"."""
    cases = {}
    for line in rows.strip().splitlines():
        name, *numbers = line.split()
        channels, height, width, kh, kw, *batch = (int(number) for number in numbers)
        cases[name] = Case(name, (batch or [DEFAULT_BATCH])[0], channels, height, width, (kh, kw))
    return cases


# Layers of the networks for which the operator was designed, and dense kernels of SLaK's size.
_TARGETS = _set("""
    replknet-1    128  56  56 31 31
    replknet-2    256  28  28 29 29
    replknet-3    512  14  14 27 27
    replknet-4   1024   7   7 13 13
    slak-1        124  56  56 51  5
    slak-1-wide   124  56  56  5 51
    slak-2        249  28  28 49  5
    slak-3-wide   499  14  14  5 47
    slak-4        998   7   7 13  5
    convnext-1     96  56  56  7  7
    convnext-2    192  28  28  7  7
    convnext-3    384  14  14  7  7
    convnext-4    768   7   7  7  7
    dense-51      128  56  56 51 51
    dense-61      128  56  56 61 61
    detection     128 200 320 31 31 1
""")
# One of each kind; takes a minute.
_SMALL = _set("""
    small-square   32  28  28 31 31
    small-strip    32  28  28 31  5
    small-wide     32  28  28  5 31
    small-map      64   7   7 13 13
    small-seven    32  28  28  7  7
""")
# The branches of UniRepLKNet's 13x13 layers, one by one; `bench branches` times them together.
_DILATED = {
    f"{name}-{side}x{side}d{dilation}": Case(f"{name}-{side}x{side}d{dilation}", *shape, (side, side), dilation)
    for name, shape in BLOCK_SHAPES.items()
    for side, dilation in BLOCK_BRANCHES
}
# Cases whose batch is part of their definition.
_FIXED_BATCH = frozenset({"detection"})
# Layers of published networks; takes a few minutes on a GPU.
_LAYERS = {name: case for name, case in _TARGETS.items() if name not in ("dense-51", "dense-61", "detection")}
SETS = ("targets", "layers", "small", "dilated", "sweep")


def choose(names: Sequence[str], batch: int | None = None) -> tuple[list[Case], list[str]]:
    """Return the cases named by `names`, each once, and a line about each kind of case that was left out.

    Args:
        names: names of sets (`SETS`), names of cases, or patterns such as `slak-*`.
        batch: N of all cases except those with a fixed batch; a sweep then covers this batch only.

    Raises:
        ArgumentError: if a name is unknown.
    """
    known = _TARGETS | _SMALL | _DILATED
    cases: list[Case] = []
    left_out: list[str] = []
    for name in names:
        if name == "sweep":
            swept, left_out = swept_cases((batch,) if batch else SWEPT_BATCHES)
            cases += swept
            continue
        cases_of_set = {"targets": _TARGETS, "layers": _LAYERS, "small": _SMALL, "dilated": _DILATED}.get(name)
        found = (
            list(cases_of_set.values()) if cases_of_set else [known[key] for key in known if fnmatch.fnmatchcase(key, name)]
        )
        if not found:
            raise ArgumentError(
                f"unknown case {name!r}.{nearest(name, [*SETS, *known])} Sets: {', '.join(SETS)}. Cases: {', '.join(known)}."
            )
        cases += [case if batch is None or case.name in _FIXED_BATCH else replace(case, batch=batch) for case in found]
    return list(dict.fromkeys(cases)), left_out


def parse_case(shape: str, kernel: str) -> Case:
    """Parse a case from strings such as `8,128,56,56` and `31x31`, or `7x7d2` for a dilation of 2.

    Raises:
        ArgumentError: if the strings have another form.
    """
    extent, _, dilation = kernel.partition("d")
    sizes, taps, apart = _numbers(shape, ","), _numbers(extent, "x"), _numbers(dilation or "1", ",")
    if sizes is None or len(sizes) != 4:
        raise ArgumentError(f"shape is {shape!r}, but must be four numbers N,C,H,W such as 8,128,56,56")
    if taps is None or len(taps) != 2 or apart is None or len(apart) != 1:
        raise ArgumentError(
            f"kernel is {kernel!r}, but must be two numbers HEIGHTxWIDTH such as 31x31 or 51x5, and may end with a dilation "
            "as in 7x7d2"
        )
    if not all(size % 2 for size in taps):
        raise ArgumentError(
            f"kernel is {kernel!r}, but both sizes must be positive odd numbers, because PyTorch and inference engines pad "
            "both sides of an image equally"
        )
    return Case("given", sizes[0], sizes[1], sizes[2], sizes[3], (taps[0], taps[1]), apart[0])


def _numbers(text: str, separator: str) -> list[int] | None:
    parts = [part.strip() for part in text.split(separator)]
    return [int(part) for part in parts] if all(part.isascii() and part.isdigit() for part in parts) else None


def swept_cases(batches: Sequence[int] = SWEPT_BATCHES, even: bool = False) -> tuple[list[Case], list[str]]:
    """Return the cases of a sweep, and a line about each kind of case that was left out.

    Args:
        batches: values of N.
        even: whether to include kernels of even sizes, which inference engines cannot compute.
    """
    cases: list[Case] = []
    outside = large = long = 0
    for case in _swept(batches, even):
        if max(case.kernel) > 2 * case.height - 1:
            outside += 1
        elif case.tensor_bytes > LARGEST_TENSOR:
            large += 1
        elif case.macs > MOST_MACS:
            long += 1
        else:
            cases.append(case)
    reasons = {
        "the outer taps of the kernel meet no pixel (more than 2·map − 1 of them)": outside,
        f"a tensor takes more than {LARGEST_TENSOR / 2**20:.0f} MiB": large,
        f"a pass takes more than {MOST_MACS / 1e9:.0f} G multiply-accumulates": long,
    }
    return cases, [f"{count} cases of the sweep are left out: {why}" for why, count in reasons.items() if count]


def _swept(batches: Sequence[int], even: bool) -> Iterator[Case]:
    kernels = [(size, size) for size in sorted((*SWEPT_KERNELS, *(SWEPT_EVEN if even else ())))]
    kernels += [strip for size in SWEPT_STRIPS for strip in ((size, STRIP_WIDTH), (STRIP_WIDTH, size))]
    for batch in batches:
        for extent in SWEPT_MAPS:
            for channels in SWEPT_CHANNELS:
                for kernel in kernels:
                    yield Case("sweep", batch, channels, extent, extent, kernel)
