"""Check of the images that are passed to a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from widekernel.errors import ShapeError
from widekernel.ops.jit_trace import static_shape


@register_notrace_module
class InputCheck(nn.Module):
    """Layer that passes images on, or raises an error that says what is wrong with their shape.

    Args:
        in_chans: number of channels that the network takes.
        stride: total stride of the network, in pixels; both sides of an image must be at least that long.
    """

    def __init__(self, in_chans: int, stride: int) -> None:
        super().__init__()
        self.in_chans, self.stride = in_chans, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> the same."""
        if torch.jit.is_scripting():
            self._check_in_script(x)
        else:
            self._check(static_shape(x))
        return x

    def _check_in_script(self, x: Tensor) -> None:
        # TorchScript can neither raise our errors nor build their messages.
        if x.dim() != 4 or x.shape[1] != self.in_chans or min(x.shape[2], x.shape[3]) < self.stride:
            raise ValueError(
                f"the input has shape {x.shape}: the network takes (N, {self.in_chans}, H, W), "
                f"H and W at least {self.stride} pixels"
            )

    @torch.jit.unused
    def _check(self, shape: Sequence[int]) -> None:
        if len(shape) != 4:
            raise ShapeError(f"the input has shape {tuple(shape)}: the network takes (N, {self.in_chans}, H, W)")
        if shape[1] != self.in_chans:
            raise ShapeError(
                f"the input has {shape[1]} channels but the network takes {self.in_chans}: "
                f"create it with in_chans={shape[1]}, or convert the images"
            )
        if shape[2] < self.stride or shape[3] < self.stride:
            raise ShapeError(
                f"the image is {shape[2]}x{shape[3]} but the network's stride is {self.stride}: "
                f"both sides must be at least {self.stride} pixels; enlarge the image"
            )
