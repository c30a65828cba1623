"""What a layer costs to run, as a time, so that a smaller layer is never a slower one as far as can be known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from widekernel.errors import ArgumentError


@dataclass(frozen=True)
class CostModel:
    """Prices of a depthwise layer.

    The defaults were measured on a CPU (AVX-512, 2 threads that sleep between operators, float32) with PyTorch's
    convolutions. Channels are computed sixteen at a time there, and a number that is no multiple of 16 makes all of them
    15 % slower. Other devices want other numbers; outputs are equal with any.

    Attributes:
        mac: picoseconds of one multiply-accumulate.
        move: nanoseconds of gathering one pixel of one channel for a group and writing it back.
        outside: nanoseconds of writing one pixel of one channel that may lie outside of all groups.
        call: microseconds that a convolution takes however small it is.
        group: microseconds that a group takes for being one more.
        block: channels that are computed together.
        ragged: factor on the multiply-accumulates of a convolution whose channels do not fill the last block.
        fill: a group is filled up to whole blocks with dead channels if they are at most this share of it.

    Raises:
        ArgumentError: for a price below zero, a block below one or a `ragged` below 1.
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
            raise ArgumentError(f"{self}: prices must be at least 0, block and ragged at least 1")

    @classmethod
    def one_thread(cls) -> CostModel:
        """Give the prices on one thread, where operators are called for little, so that smaller groups pay."""
        return cls(mac=20.0, move=2.0, outside=0.4, call=30.0, group=60.0)

    def convolutions(self, channels: int, taps: Sequence[int], pixels: int) -> float:
        """Give the microseconds of one convolution of `channels` channels for each entry of `taps`, its taps a channel."""
        if not channels:
            return 0.0
        padded = math.ceil(channels / self.block) * self.block
        work = padded * (self.ragged if padded != channels else 1.0)
        return 1e-6 * self.mac * work * sum(taps) * pixels + self.call * len(taps)

    def grouped(self, channels: int, taps: Sequence[int], pixels: int) -> float:
        """Give the microseconds of a group: its convolutions, and moving its channels."""
        return self.convolutions(channels, taps, pixels) + 1e-3 * self.move * channels * pixels + self.group


@dataclass(frozen=True)
class Image:
    """What a layer sees, as far as it is known.

    Attributes:
        pixels: N · H · W.
        extent: (H, W), None if unknown: taps that lie further from the output pixel see padding only, and are not computed.
    """

    pixels: int = 4 * 28 * 28
    extent: tuple[int, int] | None = None
