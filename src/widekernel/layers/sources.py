"""Kernel sources: modules that own the parameters of a large kernel and say which rectangles they stand for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, empty, nn

from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.layers.rect import Rect


class KernelSource(nn.Module, ABC):
    """Owns the parameters of one depthwise layer and computes its branches, each (N, C, H, W) -> (N, C, H, W).

    Attributes:
        channels: C.
        num_branches: how many outputs the layer adds up, each after a normalisation of its own.
    """

    channels: int
    num_branches: int

    @abstractmethod
    def responses(self, x: Tensor) -> list[Tensor]:
        """Compute the branches of `x` (N, C, H, W), before normalisation."""

    @abstractmethod
    def published_macs(self, height: int, width: int) -> int:
        """Count the multiply-accumulates of the convolutions that the authors' code runs for one H x W image."""


class RectSource(KernelSource):
    """A source whose branches are rectangles exactly, so that it can be folded.

    Attributes:
        dilation: distance of the taps on the map, see `dilate`. The parameters are those of a layer without.
    """

    dilation = 1

    @abstractmethod
    def rects(self) -> list[Rect]:
        """Give the rectangle of each branch before dilation, differentiable in the parameters."""

    def responses(self, x: Tensor) -> list[Tensor]:
        """Convolve with every rectangle, in one call where a backend has one."""
        return _branches(x, rects_of(self) or [])


class Rectangles(RectSource):
    """One free kernel a branch: `[(31, 31), (5, 5)]` is RepLKNet's layer, `[(51, 5), (5, 51), (5, 5)]` SLaK's.

    Args:
        channels: C.
        sizes: (kh, kw) of each branch, odd numbers.
    """

    def __init__(self, channels: int, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.channels, self.num_branches = channels, len(sizes)
        for size in sizes:
            check_odd("kernel size", *size)
        self.kernels = nn.ParameterList(nn.Parameter(empty(channels, 1, kh, kw)) for kh, kw in sizes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the kernels as `nn.Conv2d` would."""
        for kernel in self.kernels:
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))

    def rects(self) -> list[Rect]:
        """Give each kernel, anchored at its middle."""
        return [Rect.centred(kernel) for kernel in self.kernels]

    def published_macs(self, height: int, width: int) -> int:
        """Count every tap of every kernel at every pixel."""
        return height * width * sum(kernel.numel() for kernel in self.kernels)

    def extra_repr(self) -> str:
        """Name channels and sizes."""
        return f"{self.channels}, {[tuple(kernel.shape[2:]) for kernel in self.kernels]}"


class SourceGroup(KernelSource):
    """Several sources of one layer, their branches side by side.

    Args:
        sources: of the same number of channels.
    """

    def __init__(self, sources: Sequence[KernelSource]) -> None:
        super().__init__()
        if len({source.channels for source in sources}) != 1:
            raise ArgumentError(f"the sources have {[s.channels for s in sources]} channels: all must have the same number")
        self.sources = nn.ModuleList(sources)
        self.channels = sources[0].channels
        self.num_branches = sum(source.num_branches for source in sources)

    def responses(self, x: Tensor) -> list[Tensor]:
        """Compute the branches of every source: in one call if all are rectangles, otherwise source by source."""
        rects = rects_of(self)
        if rects is not None:
            return _branches(x, rects)
        return [response for source in self.sources for response in source.responses(x)]  # type: ignore[operator]

    def published_macs(self, height: int, width: int) -> int:
        """Add up the sources."""
        return sum(source.published_macs(height, width) for source in self.sources)  # type: ignore[operator]


def rects_of(source: nn.Module) -> list[Rect] | None:
    """Give the rectangles of every branch of a source, or None if some branch is not a rectangle."""
    if isinstance(source, RectSource):
        return [dilated(rect, source.dilation) for rect in source.rects()]
    if isinstance(source, SourceGroup) and _is_made_of_rects(source):
        return [rect for part in source.sources for rect in rects_of(part) or []]
    return None


SourceT = TypeVar("SourceT", bound=KernelSource)


def dilate(source: SourceT, dilation: int) -> SourceT:
    """Set the distance of the taps of a source on the map, and give the source.

    Raises:
        ArgumentError: if the source is not made of rectangles.
    """
    if dilation == 1:
        return source
    if not _is_made_of_rects(source):
        raise ArgumentError(
            "the branches of this layer are no rectangles and cannot be dilated: leave out output_stride, or padding='same'"
        )
    for part in source.modules():
        if isinstance(part, RectSource):
            part.dilation = dilation
    return source


def dilated(rect: Rect, dilation: int) -> Rect:
    """Put the taps of a rectangle `dilation` apart: a larger one with zeros between them."""
    if dilation == 1:
        return rect
    channels, _, kh, kw = rect.kernel.shape
    apart = F.pad(rect.kernel.view(channels, 1, kh, 1, kw, 1), (0, dilation - 1, 0, 0, 0, dilation - 1))
    kernel = apart.reshape(channels, 1, kh * dilation, kw * dilation)
    anchor = rect.anchor[0] * dilation, rect.anchor[1] * dilation
    return Rect(kernel[:, :, : (kh - 1) * dilation + 1, : (kw - 1) * dilation + 1], anchor)


def _is_made_of_rects(source: nn.Module) -> bool:
    if isinstance(source, SourceGroup):
        return all(_is_made_of_rects(part) for part in source.sources)
    return isinstance(source, RectSource)


def _branches(x: Tensor, rects: Sequence[Rect]) -> list[Tensor]:
    return ops.depthwise_branches(x, [rect.kernel for rect in rects], [rect.anchor for rect in rects]) if rects else []


def check_odd(what: str, *sizes: int) -> None:
    """Raise unless every size is a positive odd number."""
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size % 2 == 0:
            raise ArgumentError(
                f"{what} {size!r} is not a positive odd number: an even kernel has no middle tap; "
                f"use {size + 1 if isinstance(size, int) and size > 0 else 'an odd integer'}"
            )
