"""Rectangular depthwise kernels with an anchor, and the simplification of their sums."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel.errors import ArgumentError
from widekernel.ops.checks import check_anchor, check_dilation
from widekernel.ops.jit_trace import eager_static_shape
from widekernel.ops.problem import Anchor


@dataclass(frozen=True)
class Rect:
    """A depthwise kernel and the position of the output pixel in it.

    Attributes:
        kernel: (C, 1, kh, kw).
        anchor: (row, column) of the tap that sits on the output pixel. It need not be the middle one: 17 tiles of width 3
            stand for a 49-tap strip as 51 columns, 24 to the left of the anchor and 26 to its right.
        dilation: distance between neighboring taps in pixels; the gaps between them are not part of the kernel.

    Raises:
        ArgumentError: if the kernel has another shape, the anchor lies outside the kernel, or the dilation is not a positive
            whole number.
    """

    kernel: Tensor
    anchor: Anchor
    dilation: int = 1

    def __post_init__(self) -> None:
        sizes = eager_static_shape(self.kernel)
        if len(sizes) != 4 or sizes[1] != 1:
            raise ArgumentError(f"kernel has shape {tuple(self.kernel.shape)}: a Rect needs (C, 1, kh, kw)")
        check_anchor(sizes[2:], self.anchor)
        check_dilation("dilation", self.dilation)

    @classmethod
    def centered(cls, kernel: Tensor, dilation: int = 1) -> Rect:
        """Anchor an odd-sized kernel at its middle tap."""
        sizes = eager_static_shape(kernel)
        return cls(kernel, (sizes[2] // 2, sizes[3] // 2), dilation)

    @classmethod
    def centred(cls, kernel: Tensor) -> Rect:
        """Call `centered`, of which this is the old name, with a warning."""
        text = "Rect.centred is now called Rect.centered; the old name will stop working in the next version"
        warnings.warn(text, FutureWarning, stacklevel=2)
        return cls.centered(kernel)

    @classmethod
    def identity(cls, like: Tensor) -> Rect:
        """Return the 1x1 kernel that copies its input, with the channels, dtype and device of the kernel `like`."""
        return cls(torch.ones_like(like[:, :, :1, :1]), (0, 0))

    @property
    def size(self) -> tuple[int, int]:
        """(kh, kw), in taps."""
        sizes = eager_static_shape(self.kernel)
        return sizes[2], sizes[3]

    @property
    def reach(self) -> tuple[int, int, int, int]:
        """Distances in pixels from the anchor to the first and last row and to the first and last column of taps."""
        (kh, kw), (row, column), apart = self.size, self.anchor, self.dilation
        return row * apart, (kh - 1 - row) * apart, column * apart, (kw - 1 - column) * apart

    @property
    def label(self) -> str:
        """The size and, unless it is 1, the dilation, for people: "7×7 (dilation 2)"."""
        return f"{self.size[0]}×{self.size[1]}" + (f" (dilation {self.dilation})" if self.dilation > 1 else "")

    def covers(self, other: Rect) -> bool:
        """Return whether this rectangle has no gaps and a tap at every pixel within the reach of `other`."""
        return self.dilation == 1 and all(mine >= theirs for mine, theirs in zip(self.reach, other.reach))

    def with_kernel(self, kernel: Tensor) -> Rect:
        """Return a rectangle with another kernel of the same size, and the same anchor and dilation."""
        return replace(self, kernel=kernel)

    def dense(self) -> Rect:
        """Return the rectangle without gaps that computes the same: zeros fill the gaps between the taps."""
        if self.dilation == 1:
            return self
        return Rect(_with_gaps(self.kernel, self.dilation), (self.anchor[0] * self.dilation, self.anchor[1] * self.dilation))

    def scaled(self, scale: Tensor) -> Rect:
        """Return the rectangle with the taps of each channel multiplied by that channel's entry of `scale` (C,)."""
        return self.with_kernel(self.kernel * scale.view(-1, 1, 1, 1))

    def plus(self, other: Rect) -> Rect:
        """Return the sum of this rectangle and another one that it covers.

        Raises:
            ArgumentError: if this rectangle does not cover the other one, or their numbers of channels differ.
        """
        if not self.covers(other) or self.kernel.shape[0] != other.kernel.shape[0]:
            raise ArgumentError(
                f"a {self.size[0]}x{self.size[1]} rectangle of {self.kernel.shape[0]} channels anchored at {self.anchor} "
                f"cannot absorb one of {other.size[0]}x{other.size[1]}, {other.kernel.shape[0]} channels, anchored at "
                f"{other.anchor}: it must cover the other one and have as many channels"
            )
        return Rect(self.kernel + other.taps_within(self), self.anchor)

    def taps_within(self, window: Rect) -> Tensor:
        """Return the kernel without gaps, cropped and zero-padded to the position and reach of the rectangle `window`."""
        # Negative padding crops.
        up, down, left, right = (theirs - mine for theirs, mine in zip(window.reach, self.reach))
        return F.pad(self.dense().kernel, (left, right, up, down))


def maximal_rectangles(rects: Iterable[Rect]) -> list[Rect]:
    """Reduce a sum of rectangles to those that no other one covers, without changing the operator and without gaps.

    A 31x31 and a 5x5 kernel become one 31x31 kernel. The strips 51x5 and 5x51 remain and absorb a 5x5 and the identity. A
    7x7 kernel of dilation 2 becomes a 13x13 kernel or is absorbed by one.
    """
    maximal: list[Rect] = []
    for rect in sorted((rect.dense() for rect in rects), key=lambda r: r.size[0] * r.size[1], reverse=True):
        for i, larger in enumerate(maximal):
            if larger.covers(rect):
                maximal[i] = larger.plus(rect)
                break
        else:
            maximal.append(rect)
    return maximal


def _with_gaps(kernel: Tensor, dilation: int) -> Tensor:
    """Return a larger kernel with the taps of `kernel` (C, 1, kh, kw) `dilation` apart and zeros between them."""
    sizes = eager_static_shape(kernel)
    channels, kh, kw = sizes[0], sizes[2], sizes[3]
    apart = F.pad(kernel.reshape(channels, 1, kh, 1, kw, 1), [0, dilation - 1, 0, 0, 0, dilation - 1])
    wide = apart.reshape(channels, 1, kh * dilation, kw * dilation)
    return wide[:, :, : (kh - 1) * dilation + 1, : (kw - 1) * dilation + 1]
