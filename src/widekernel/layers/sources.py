"""Kernel sources: modules that own the parameters of a large kernel and say which rectangles they stand for."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, empty, nn

from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.layers.rect import Rect
from widekernel.ops import plain
from widekernel.ops.jit_trace import static_shape

# No `from __future__ import annotations` here: TorchScript reads the attributes' types of `KernelSource` and needs types.


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

    A source of one's own says which they are by `branch_kernels` and `branch_anchors`, in the part of Python that
    TorchScript knows if layers with it are to be scripted; or by `rects` alone.

    Attributes:
        dilation: distance of the taps on the map, see `dilate`. The parameters are those of a layer without.
    """

    dilation: int

    def __init__(self) -> None:
        super().__init__()
        self.dilation = 1

    def branch_kernels(self) -> list[Tensor]:
        """Give the kernel (C, 1, kh, kw) of each branch, differentiable in the parameters."""
        raise NotImplementedError

    def branch_anchors(self) -> list[tuple[int, int]]:
        """Give the anchor (row, column) of each branch."""
        raise NotImplementedError

    def rects(self) -> list[Rect]:
        """Give the rectangle of each branch before dilation, differentiable in the parameters."""
        return [Rect(kernel, anchor) for kernel, anchor in zip(self.branch_kernels(), self.branch_anchors())]

    def responses(self, x: Tensor) -> list[Tensor]:
        """Convolve with every rectangle, in one call where a backend has one."""
        if torch.jit.is_scripting():
            kernels: list[Tensor] = []
            for kernel in self.branch_kernels():
                kernels.append(dilated_kernel(kernel, self.dilation))
            anchors: list[tuple[int, int]] = []
            for row, column in self.branch_anchors():
                anchors.append((row * self.dilation, column * self.dilation))
            return plain.depthwise_branches(x, kernels, anchors)
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
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

    def branch_kernels(self) -> list[Tensor]:
        """Give each kernel."""
        kernels: list[Tensor] = []
        for kernel in self.kernels:  # TorchScript has no comprehension over parameters
            kernels.append(kernel)
        return kernels

    def branch_anchors(self) -> list[tuple[int, int]]:
        """Give the middle of each kernel."""
        anchors: list[tuple[int, int]] = []
        for kernel in self.kernels:
            sizes = static_shape(kernel)
            anchors.append((sizes[2] // 2, sizes[3] // 2))
        return anchors

    def rects(self) -> list[Rect]:
        """Give each kernel, anchored at its middle."""
        # Looking through a list of parameters takes as long as a small operator: once, and not for anchors again.
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
        if torch.jit.is_scripting():
            responses: list[Tensor] = []
            for source in self.sources:
                responses += source.responses(x)  # type: ignore[operator]
            return responses
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            return self._in_one_call(x)

    @torch.jit.unused
    def _in_one_call(self, x: Tensor) -> list[Tensor]:
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
    return Rect(dilated_kernel(rect.kernel, dilation), (rect.anchor[0] * dilation, rect.anchor[1] * dilation))


def dilated_kernel(kernel: Tensor, dilation: int) -> Tensor:
    """Put the taps of a kernel (C, 1, kh, kw) `dilation` apart, with zeros between them. TorchScript knows it."""
    if dilation == 1:
        return kernel
    sizes = static_shape(kernel)
    channels, kh, kw = sizes[0], sizes[2], sizes[3]
    apart = F.pad(kernel.reshape(channels, 1, kh, 1, kw, 1), [0, dilation - 1, 0, 0, 0, dilation - 1])
    wide = apart.reshape(channels, 1, kh * dilation, kw * dilation)
    return wide[:, :, : (kh - 1) * dilation + 1, : (kw - 1) * dilation + 1]


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
