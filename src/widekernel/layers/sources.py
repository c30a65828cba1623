"""Kernel sources: modules that own the parameters of a large kernel and define the rectangles that they represent."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, empty, nn

from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.layers.rect import Rect
from widekernel.ops import plain
from widekernel.ops.checks import check_dilation
from widekernel.ops.jit_trace import static_shape
from widekernel.ops.problem import Anchor

# No `from __future__ import annotations` here: TorchScript reads the attribute annotations of `KernelSource` as types.

Branches = tuple[list[Tensor], list[Anchor], list[int]]
"""The kernel (C, 1, kh, kw), the anchor (row, column) and the dilation of each branch."""


class KernelSource(nn.Module, ABC):
    """Owns the parameters of one depthwise layer and computes its branches, each (N, C, H, W) -> (N, C, H, W).

    Attributes:
        channels: C.
        num_branches: number of outputs that the layer adds up, each after its own normalization.
    """

    channels: int
    num_branches: int

    @abstractmethod
    def responses(self, x: Tensor) -> list[Tensor]:
        """Compute the branches of `x` (N, C, H, W), before normalization."""

    @torch.jit.unused
    def branches(self) -> Branches | None:
        """Return the kernel, anchor and dilation of every branch, or None if some branch is not a rectangle."""
        return None

    @abstractmethod
    def published_macs(self, height: int, width: int) -> int:
        """Count the multiply-accumulates of the convolutions that the authors' code runs for one H x W image."""


class RectSource(KernelSource):
    """A source whose branches are exactly rectangles, so that it can be folded.

    A subclass defines either `rects`, or `branch_kernels`, `branch_anchors` and, if some branches are dilated,
    `branch_dilations`. The latter must be written in the part of Python that TorchScript compiles if layers with this source
    are to be scripted.

    Attributes:
        dilation: distance between taps on the feature map, see `dilate`. The parameters do not depend on it.
    """

    dilation: int

    def __init__(self) -> None:
        super().__init__()
        self.dilation = 1

    def branch_kernels(self) -> list[Tensor]:
        """Return the kernel (C, 1, kh, kw) of each branch, differentiable in the parameters."""
        raise NotImplementedError

    def branch_anchors(self) -> list[tuple[int, int]]:
        """Return the anchor (row, column) of each branch."""
        raise NotImplementedError

    def branch_dilations(self) -> list[int]:
        """Return the distance between the taps of each branch, before the dilation of the whole source."""
        return [1] * self.num_branches

    def rects(self) -> list[Rect]:
        """Return the rectangle of each branch before the dilation of the whole source, differentiable in the parameters."""
        branches = zip(self.branch_kernels(), self.branch_anchors(), self.branch_dilations())
        return [Rect(kernel, anchor, dilation) for kernel, anchor, dilation in branches]

    def responses(self, x: Tensor) -> list[Tensor]:
        """Convolve with every rectangle, in one call if a backend has a fused operator."""
        if torch.jit.is_scripting():
            dilations: list[int] = []
            for dilation in self.branch_dilations():
                dilations.append(dilation * self.dilation)
            return plain.depthwise_branches(x, self.branch_kernels(), self.branch_anchors(), dilations)
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            return _convolved(x, self.branches())

    @torch.jit.unused
    def branches(self) -> Branches:
        """Return the kernels, anchors and dilations of the branches, without the checks of `rects`."""
        if type(self).rects is RectSource.rects:
            dilations = [dilation * self.dilation for dilation in self.branch_dilations()]
            return self.branch_kernels(), self.branch_anchors(), dilations
        rects = self.rects()
        dilations = [rect.dilation * self.dilation for rect in rects]
        return [rect.kernel for rect in rects], [rect.anchor for rect in rects], dilations


class Rectangles(RectSource):
    """One free kernel per branch: `[(31, 31), (5, 5)]` is RepLKNet's layer, `[(51, 5), (5, 51), (5, 5)]` SLaK's.

    UniRepLKNet's branches have dilations of their own: a 7x7 kernel of dilation 2 reaches as far as a 13x13 kernel.

    Args:
        channels: C.
        sizes: (kh, kw) of each branch, odd numbers, without dilation.
        dilations: distance between the taps of each branch; None for 1.

    Attributes:
        dilations: distance between the taps of each branch, before the dilation of the whole source.
    """

    dilations: list[int]

    def __init__(self, channels: int, sizes: Sequence[tuple[int, int]], dilations: Sequence[int] | None = None) -> None:
        super().__init__()
        self.channels, self.num_branches = channels, len(sizes)
        for size in sizes:
            check_odd("kernel size", *size)
        self.dilations = [1] * len(sizes) if dilations is None else list(dilations)
        if len(self.dilations) != len(sizes):
            raise ArgumentError(f"{len(self.dilations)} dilations for {len(sizes)} branches: give one for each, or None")
        for dilation in self.dilations:
            check_dilation("dilation", dilation)
        self.kernels = nn.ParameterList(nn.Parameter(empty(channels, 1, kh, kw)) for kh, kw in sizes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the kernels as `nn.Conv2d` does."""
        for kernel in self.kernels:
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))

    def branch_kernels(self) -> list[Tensor]:
        """Return each kernel."""
        if torch.jit.is_scripting():
            kernels: list[Tensor] = []
            for kernel in self.kernels:  # TorchScript has no comprehension over parameters
                kernels.append(kernel)
            return kernels
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            return tensors_of(self.kernels)

    def branch_anchors(self) -> list[tuple[int, int]]:
        """Return the middle tap of each kernel."""
        anchors: list[tuple[int, int]] = []
        for kernel in self.kernels:
            sizes = static_shape(kernel)
            anchors.append((sizes[2] // 2, sizes[3] // 2))
        return anchors

    def branch_dilations(self) -> list[int]:
        """Return the distance between the taps of each kernel."""
        return self.dilations

    def extents(self) -> list[tuple[int, int]]:
        """Return (height, width) of each branch with its own dilation, in pixels."""
        sizes = ((kernel.shape[2], kernel.shape[3]) for kernel in self.kernels)
        return [((kh - 1) * step + 1, (kw - 1) * step + 1) for (kh, kw), step in zip(sizes, self.dilations)]

    def published_macs(self, height: int, width: int) -> int:
        """Count every tap of every kernel at every pixel."""
        return height * width * sum(kernel.numel() for kernel in self.kernels)

    def extra_repr(self) -> str:
        """Return channels, sizes and dilations."""
        sizes = [tuple(kernel.shape[2:]) for kernel in self.kernels]
        return f"{self.channels}, {sizes}" + (f", dilations={self.dilations}" if max(self.dilations, default=1) > 1 else "")


class SourceGroup(KernelSource):
    """Several sources in one layer; the branches are those of all sources.

    Args:
        sources: sources with the same number of channels.
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
        branches = self.branches()
        if branches is not None:
            return _convolved(x, branches)
        return [response for source in self.sources for response in source.responses(x)]  # type: ignore[operator]

    @torch.jit.unused
    def branches(self) -> Branches | None:
        """Return the branches of all sources, or None if some branch is not a rectangle."""
        kernels: list[Tensor] = []
        anchors: list[Anchor] = []
        dilations: list[int] = []
        for source in self.sources:
            found: Branches | None = source.branches()  # type: ignore[operator]
            if found is None:
                return None
            kernels += found[0]
            anchors += found[1]
            dilations += found[2]
        return kernels, anchors, dilations

    def published_macs(self, height: int, width: int) -> int:
        """Add up the counts of all sources."""
        return sum(source.published_macs(height, width) for source in self.sources)  # type: ignore[operator]


def rects_of(source: nn.Module) -> list[Rect] | None:
    """Return the rectangles of every branch of a source, or None if some branch is not a rectangle."""
    branches = source.branches() if isinstance(source, KernelSource) else None
    return None if branches is None else [Rect(*branch) for branch in zip(*branches)]


SourceT = TypeVar("SourceT", bound=KernelSource)


def dilate(source: SourceT, dilation: int) -> SourceT:
    """Set the distance between the taps of a source on the feature map, and return the source.

    Raises:
        ArgumentError: if the source is not made of rectangles.
    """
    if dilation == 1:
        return source
    if not _is_made_of_rects(source):
        raise ArgumentError(
            "the branches of this layer are not rectangles and cannot be dilated: leave out output_stride or padding='same'"
        )
    for part in source.modules():
        if isinstance(part, RectSource):
            part.dilation = dilation
    return source


_KEYS = tuple(map(str, range(16)))


def tensors_of(parameters: nn.ParameterList) -> list[Tensor]:
    """Return the tensors of a parameter list.

    The list's own iterator takes as long as a small operator, because it looks up every entry through `nn.Module`.
    """
    held = parameters._parameters
    count = len(held)
    # Entries that are computed (pruned, parametrized) or belong to a replica are not parameters.
    if count == len(parameters) <= len(_KEYS):
        try:
            return [held[key] for key in _KEYS[:count]]  # type: ignore[misc]
        except KeyError:
            pass
    return list(parameters)


def check_odd(what: str, *sizes: int) -> None:
    """Raise unless every size is a positive odd number."""
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size % 2 == 0:
            raise ArgumentError(
                f"{what} {size!r} is not a positive odd number: an even kernel has no middle tap; "
                f"use {size + 1 if isinstance(size, int) and size > 0 else 'an odd integer'}"
            )


def _is_made_of_rects(source: nn.Module) -> bool:
    if isinstance(source, SourceGroup):
        return all(_is_made_of_rects(part) for part in source.sources)
    return isinstance(source, RectSource)


def _convolved(x: Tensor, branches: Branches) -> list[Tensor]:
    kernels, anchors, dilations = branches
    return ops.depthwise_branches(x, kernels, anchors, dilations=dilations) if kernels else []
