"""Estimates of a layer's run time, with which compaction avoids smaller layers that would be slower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from widekernel.errors import ArgumentError


@dataclass(frozen=True)
class CostModel:
    """Costs of the parts of a depthwise layer.

    The defaults were measured on a CPU (AVX-512, 2 threads that sleep between operators, float32) with PyTorch's
    convolutions. These compute sixteen channels at a time, and a number of channels that is not a multiple of 16 makes all
    of them 15 % slower. Other devices need other costs; the outputs do not depend on the costs.

    Attributes:
        mac: time of one multiply-accumulate, in picoseconds.
        move: time to gather one pixel of one channel for a group and to write it back, in nanoseconds.
        outside: time to write one pixel of one channel that may lie outside all groups, in nanoseconds.
        call: fixed time of a convolution, however small it is, in microseconds.
        group: time that every group adds, in microseconds.
        block: number of channels that are computed together.
        ragged: factor on the multiply-accumulates of a convolution whose channels do not fill the last block.
        fill: largest share of dead channels that may be added to a group to fill whole blocks.

    Raises:
        ArgumentError: for a cost below 0, a `block` below 1 or a `ragged` below 1.
    """

    mac: float = 10.0
    move: float = 1.2
    outside: float = 0.2
    call: float = 200.0
    group: float = 300.0
    block: int = 16
    ragged: float = 1.15
    fill: float = 0.125

    def __post_init__(self) -> None:
        prices = (self.mac, self.move, self.outside, self.call, self.group, self.fill)
        if min(prices) < 0 or self.block < 1 or self.ragged < 1:
            raise ArgumentError(f"{self}: costs must be at least 0, block and ragged at least 1")

    @classmethod
    def one_thread(cls) -> CostModel:
        """Return the costs for one thread, where calling an operator is cheap, so that smaller groups pay off."""
        return cls(mac=20.0, move=2.0, outside=0.4, call=30.0, group=60.0)

    def convolutions(self, channels: int, taps: Sequence[int], pixels: int) -> float:
        """Return the time of several convolutions of the same channels, in microseconds.

        Args:
            channels: number of channels.
            taps: number of taps per channel of each convolution.
            pixels: number of output pixels, N · H · W.
        """
        if not channels:
            return 0.0
        padded = math.ceil(channels / self.block) * self.block
        work = padded * (self.ragged if padded != channels else 1.0)
        return 1e-6 * self.mac * work * sum(taps) * pixels + self.call * len(taps)

    def grouped(self, channels: int, taps: Sequence[int], pixels: int) -> float:
        """Return the time of a group, its convolutions and moving its channels, in microseconds.

        The arguments are those of `convolutions`.
        """
        return self.convolutions(channels, taps, pixels) + 1e-3 * self.move * channels * pixels + self.group


@dataclass(frozen=True)
class Image:
    """The input of a layer, as far as it is known.

    Attributes:
        pixels: N · H · W.
        extent: (H, W), None if unknown. Taps that are farther from the output pixel only meet padding and are not computed.
    """

    pixels: int = 4 * 28 * 28
    extent: tuple[int, int] | None = None
