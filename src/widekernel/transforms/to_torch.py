"""The rival of our networks: the same network on PyTorch's own convolutions.

Not by a backend: the gradients would then be the ones that our operator asks a backend for, while PyTorch has its own, which
take other times.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.layers import DepthwiseConv2d, FoldedLargeKernel, LargeKernel, PointwiseConv2d, PointwiseLinear, Rect
from widekernel.layers.sources import rects_of

# Layers that are subclasses of PyTorch's only to be computed another way.
_BASES: dict[type[nn.Module], type[nn.Module]] = {
    DepthwiseConv2d: nn.Conv2d,
    PointwiseConv2d: nn.Conv2d,
    PointwiseLinear: nn.Linear,
}


def on_pytorch(model: nn.Module) -> nn.Module:
    """Give a copy of a network that runs on PyTorch's convolutions, one a branch.

    Parameters and their order stay as they are.
    """
    plain = _replaced(copy.deepcopy(model), {})
    for module in plain.modules():
        if type(module) in _BASES:
            module.__class__ = _BASES[type(module)]
    return plain


def ours_in(model: nn.Module) -> list[str]:
    """Name the layers of a network that `on_pytorch` changes; in the copy they have the same names."""
    kinds = (LargeKernel, FoldedLargeKernel)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) or type(module) in _BASES]


class PlainLayer(nn.Module):
    """A large-kernel layer, in training or folded form, with each of its branches a convolution of PyTorch's.

    Args:
        layer: whose parameters are used.
    """

    def __init__(self, layer: LargeKernel | FoldedLargeKernel) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        layer = self.layer
        if isinstance(layer, FoldedLargeKernel):
            return _sum(x, layer.rects(), layer.bias)
        rects = rects_of(layer.source)
        if rects is None:  # a source that convolves by itself
            responses = layer.source.responses(x)
        elif not layer.norms:
            responses = [_sum(x, rects, None)]
        else:
            responses = [_convolved(x, rect, None) for rect in rects]
        norms = list(layer.norms) or [nn.Identity()] * len(responses)
        y = norms[0](responses[0])
        for norm, response in zip(norms[1:], responses[1:]):
            y = y + norm(response)
        return y + x if layer.identity else y


def _replaced(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in done:
        if isinstance(module, (LargeKernel, FoldedLargeKernel)):
            done[module] = PlainLayer(module).train(module.training)
            return done[module]
        done[module] = module
        for name, child in list(module._modules.items()):
            if child is not None:
                setattr(module, name, _replaced(child, done))
    return done[module]


def _sum(x: Tensor, rects: Sequence[Rect], bias: Tensor | None) -> Tensor:
    y = _convolved(x, rects[0], bias)
    for rect in rects[1:]:
        y = y + _convolved(x, rect, None)
    return y


def _convolved(x: Tensor, rect: Rect, bias: Tensor | None) -> Tensor:
    kernel, (row, column) = rect.kernel, rect.anchor
    height, width = x.shape[-2:]
    # PyTorch pads both sides alike: by the longer one, and what is too much is cut off.
    down, right = max(row, kernel.shape[2] - 1 - row), max(column, kernel.shape[3] - 1 - column)
    y = F.conv2d(x, kernel, bias, padding=(down, right), groups=x.shape[1])
    if y.shape == x.shape:
        return y
    return y[..., down - row :, right - column :][..., :height, :width]
