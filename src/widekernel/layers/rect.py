"""Rectangular depthwise kernels with an anchor, and how sums of them collapse."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel.errors import ArgumentError
from widekernel.ops.checks import check_anchor
from widekernel.ops.jit_trace import eager_static_shape
from widekernel.ops.problem import Anchor


@dataclass(frozen=True)
class Rect:
    """A depthwise kernel and the position of the output pixel in it.

    Attributes:
        kernel: (C, 1, kh, kw).
        anchor: (row, column) of the tap that sits on the output pixel. It need not be the middle one: 17 tiles of width 3
            stand for a 49-tap strip as 51 columns, 24 to the left of the anchor and 26 to its right.

    Raises:
        ArgumentError: if the kernel has another shape or the anchor lies outside of it.
    """

    kernel: Tensor
    anchor: Anchor

    def __post_init__(self) -> None:
        sizes = eager_static_shape(self.kernel)
        if len(sizes) != 4 or sizes[1] != 1:
            raise ArgumentError(f"kernel has shape {tuple(self.kernel.shape)}: a Rect needs (C, 1, kh, kw)")
        check_anchor(sizes[2:], self.anchor)

    @classmethod
    def centered(cls, kernel: Tensor) -> Rect:
        """Anchor an odd-sized kernel at its middle tap."""
        sizes = eager_static_shape(kernel)
        return cls(kernel, (sizes[2] // 2, sizes[3] // 2))

    @classmethod
    def centred(cls, kernel: Tensor) -> Rect:
        """Do what `centered` does, under its old name, and warn."""
        text = "Rect.centred is now called Rect.centered; the old name will stop working in the next version"
        warnings.warn(text, FutureWarning, stacklevel=2)
        return cls.centered(kernel)

    @classmethod
    def identity(cls, like: Tensor) -> Rect:
        """Return the 1x1 kernel that copies its input, with the channels, dtype and device of the kernel `like`."""
        return cls(torch.ones_like(like[:, :, :1, :1]), (0, 0))

    @property
    def size(self) -> tuple[int, int]:
        """(kh, kw)."""
        sizes = eager_static_shape(self.kernel)
        return sizes[2], sizes[3]

    @property
    def reach(self) -> tuple[int, int, int, int]:
        """Numbers of taps above, below, left and right of the anchor."""
        (kh, kw), (row, column) = self.size, self.anchor
        return row, kh - 1 - row, column, kw - 1 - column

    def covers(self, other: Rect) -> bool:
        """Return whether every tap of `other` has a tap of this rectangle at the same offset from the anchor."""
        return all(mine >= theirs for mine, theirs in zip(self.reach, other.reach))

    def scaled(self, scale: Tensor) -> Rect:
        """Return the rectangle with the taps of each channel multiplied by its entry of `scale` (C,)."""
        return Rect(self.kernel * scale.view(-1, 1, 1, 1), self.anchor)

    def plus(self, other: Rect) -> Rect:
        """Return the sum of this rectangle and another one that it covers.

        Raises:
            ArgumentError: if this one does not cover the other, or has another number of channels.
        """
        if not self.covers(other) or self.kernel.shape[0] != other.kernel.shape[0]:
            raise ArgumentError(
                f"a {self.size[0]}x{self.size[1]} rectangle of {self.kernel.shape[0]} channels anchored at {self.anchor} "
                f"cannot absorb one of {other.size[0]}x{other.size[1]}, {other.kernel.shape[0]} channels, anchored at "
                f"{other.anchor}: it must cover it and have as many channels"
            )
        return Rect(self.kernel + other.taps_within(self), self.anchor)

    def taps_within(self, window: Rect) -> Tensor:
        """Return the kernel, cut and filled up with zeros to the place and the size of the rectangle `window`."""
        # Negative padding crops.
        up, down, left, right = (theirs - mine for theirs, mine in zip(window.reach, self.reach))
        return F.pad(self.kernel, (left, right, up, down))


def maximal_rectangles(rects: Iterable[Rect]) -> list[Rect]:
    """Reduce a sum of rectangles to those that no other one covers; the sum stays the same operator.

    A 31x31 and a 5x5 kernel become one of 31x31. The strips 51x5 and 5x51 stay two and absorb a 5x5 and the identity.
    """
    maximal: list[Rect] = []
    for rect in sorted(rects, key=lambda r: r.size[0] * r.size[1], reverse=True):
        for i, larger in enumerate(maximal):
            if larger.covers(rect):
                maximal[i] = larger.plus(rect)
                break
        else:
            maximal.append(rect)
    return maximal
