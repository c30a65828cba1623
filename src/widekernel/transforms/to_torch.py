"""`to_torch`: networks of this library on PyTorch's own convolutions, as a baseline for speed and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.errors import ArgumentError
from widekernel.layers import (
    DepthwiseConv2d,
    FoldedLargeKernel,
    LargeKernel,
    NativeBatchNorm2d,
    PointwiseConv2d,
    PointwiseGradConv2d,
    PointwiseLinear,
    Rect,
    SourceGroup,
)
from widekernel.layers.folding import deep_copy
from widekernel.layers.large_kernel import add_normalized
from widekernel.layers.sources import KernelSource, tensors_of
from widekernel.ops.problem import Anchor
from widekernel.transforms.acceleration.fusion import FusedBlock, unchain, unfuse

ModelT = TypeVar("ModelT", bound=nn.Module)


def to_torch(model: ModelT) -> ModelT:
    """Return a copy of `model` in which our operators are plain PyTorch convolutions, one per rectangle.

    Outputs and gradients stay the same up to rounding. Names, state dict, hooks, training mode and `requires_grad` of
    every layer are kept, too. Fused blocks run the code of their own classes again. Unlike a backend that calls PyTorch, the
    copy also has PyTorch's own backward pass. Layers of other libraries and kernel sources that convolve by themselves are
    not changed. Call `compact` and `accelerate` before `to_torch`: applied to the copy, they may introduce our operators
    again.

    Args:
        model: any module, folded or not.

    Raises:
        ArgumentError: if a layer is a subclass of one of ours, parametrized layers included; what it computes is unknown.
    """
    torch_baseline = deep_copy(model)
    unchain(torch_baseline)
    for name, module in torch_baseline.named_modules():
        if isinstance(module, FusedBlock):
            unfuse(module)
        if isinstance(module, tuple(_TORCH_CLASSES)) and not isinstance(module, _DONE):
            module.__class__ = _torch_class(name, module)  # type: ignore[arg-type]
    return torch_baseline


def operator_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that `to_torch` changes; they have the same names in the copy."""
    ours = tuple(_TORCH_CLASSES)
    return [name for name, module in model.named_modules() if isinstance(module, ours) and not isinstance(module, _DONE)]


class TorchLargeKernel(LargeKernel):
    """A `LargeKernel` whose branches are PyTorch convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if torch.jit.is_scripting():
            return self._scripted(x)
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            return self._on_torch(x)

    @torch.jit.unused
    def _on_torch(self, x: Tensor) -> Tensor:
        branches, norms = self.source.branches(), list(self.norms)
        if norms:
            y = add_normalized(_responses(self.source, x), norms)
        elif branches is not None:
            kernels, anchors, dilations = branches
            y = _sum(x, kernels, anchors, None, dilations)
        else:
            y = torch.stack(_responses(self.source, x)).sum(0)
        return y + x if self.identity else y

    def folded(self, scale: Tensor | None = None, shift: Tensor | None = None) -> FoldedLargeKernel:
        """Fold as `LargeKernel` does, to a layer that runs on PyTorch's convolutions, too."""
        result = super().folded(scale, shift)
        result.__class__ = TorchFoldedLargeKernel
        return result


class TorchFoldedLargeKernel(FoldedLargeKernel):
    """A `FoldedLargeKernel` whose rectangles are PyTorch convolutions."""

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); with `relu`, ReLU is applied."""
        if torch.jit.is_scripting():
            return self._scripted(x, relu)
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            y = _sum(x, tensors_of(self.kernels), self.anchors, self.bias, [1] * len(self.anchors))
            return y.relu() if relu else y


# The last five compute the same as their base class, in another way.
_TORCH_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    LargeKernel: TorchLargeKernel,
    FoldedLargeKernel: TorchFoldedLargeKernel,
    DepthwiseConv2d: nn.Conv2d,
    PointwiseConv2d: nn.Conv2d,
    PointwiseGradConv2d: nn.Conv2d,
    PointwiseLinear: nn.Linear,
    NativeBatchNorm2d: nn.BatchNorm2d,
}
_DONE = (TorchLargeKernel, TorchFoldedLargeKernel)


def _torch_class(name: str, module: nn.Module) -> Any:
    kind = type(module)
    if kind not in _TORCH_CLASSES:
        raise ArgumentError(
            f"{name or 'the layer'} is a {kind.__name__}, a subclass of a layer of widekernel or a parametrized one, so its "
            "computation is unknown: remove its parametrizations, or replace it by a layer of widekernel"
        )
    return _TORCH_CLASSES[kind]


def _responses(source: KernelSource, x: Tensor) -> list[Tensor]:
    """Compute the branches of a source; branches that are not rectangles are left to the source itself."""
    branches = source.branches()
    if branches is not None:
        return [_convolution(x, kernel, anchor, None, dilation) for kernel, anchor, dilation in zip(*branches)]
    if isinstance(source, SourceGroup):
        return [response for part in source.sources for response in _responses(part, x)]  # type: ignore[arg-type]
    return source.responses(x)


def _sum(
    x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], bias: Tensor | None, dilations: Sequence[int]
) -> Tensor:
    y = _convolution(x, kernels[0], anchors[0], bias, dilations[0])
    for kernel, anchor, dilation in zip(kernels[1:], anchors[1:], dilations[1:]):
        y = y + _convolution(x, kernel, anchor, None, dilation)
    return y


def _convolution(x: Tensor, kernel: Tensor, anchor: Anchor, bias: Tensor | None, dilation: int) -> Tensor:
    """Convolve with one call of PyTorch's depthwise convolution, which needs the same padding on both sides of an axis."""
    up, down, left, right = Rect(kernel, anchor, dilation).reach
    height, width = x.shape[-2:]
    # Both sides get the larger padding, and the surplus is cropped.
    vertical, horizontal = max(up, down), max(left, right)
    y = F.conv2d(x, kernel, bias, padding=(vertical, horizontal), dilation=dilation, groups=x.shape[1])
    if y.shape == x.shape:
        return y
    return y[..., vertical - up :, horizontal - left :][..., :height, :width]
