"""Convolutions as products over patches: the geometry of the patches, and a norm after the product."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Patch(NamedTuple):
    """The pixels of an image that one output pixel of a convolution depends on.

    Attributes:
        kernel: rows and columns of the kernel.
        stride: distance between neighboring patches, down and to the right.
        padding: rows of zeros above and below the image, and columns of zeros on the left and on the right.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the result for an image of that size; not positive if no patch fits."""
        sides = zip((height, width), self.kernel, self.stride, self.padding)
        rows, columns = ((side + 2 * pad - taps) // step + 1 for side, taps, step, pad in sides)
        return rows, columns


class NormAfter(NamedTuple):
    """A layer norm over the results of a product.

    Attributes:
        eps: number added to the variance.
        scale: factors (O,), or None.
        shift: summands (O,), or None.
    """

    eps: float
    scale: Tensor | None = None
    shift: Tensor | None = None
