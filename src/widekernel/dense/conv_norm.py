"""Convolution, norm and activation as the heads for dense prediction use them, under the names of the authors' files."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from widekernel.layers import ConvNorm
from widekernel.settings import require_one_of

Norm = Literal["batch", "group", "none"]
_GROUPS = 32


class ConvGroupNorm(nn.Module):
    """Convolution, group norm and activation.

    Args:
        conv: the convolution.
        gn: the norm after it.
        act: the activation after the norm.
    """

    def __init__(self, conv: nn.Conv2d, gn: nn.GroupNorm, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.gn, self.act = conv, gn, act

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        return self.act(self.gn(self.conv(x)))  # type: ignore[no-any-return]


class ConvActivation(nn.Module):
    """Convolution and activation, without a norm.

    Args:
        conv: the convolution.
        act: the activation after it.
    """

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.act = conv, act

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        return self.act(self.conv(x))  # type: ignore[no-any-return]


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, norm: Norm = "batch", relu: bool = True
) -> nn.Module:
    """Create a convolution that keeps the size at stride 1, its norm and a ReLU; weights are drawn as He et al. propose.

    The parts are called `conv`, `bn` or `gn`, and `act`. Only a convolution without a norm has a bias.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels; a multiple of 32 for a group norm.
        kernel_size: side of the kernel, odd.
        stride: stride of the convolution.
        norm: "batch" for a batch norm, "group" for a group norm with 32 groups, "none" for no norm.
        relu: whether a ReLU follows.

    Raises:
        ArgumentError: `norm` is unknown.
    """
    require_one_of("norm", norm, ("batch", "group", "none"))
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    act = nn.ReLU() if relu else nn.Identity()
    if norm == "batch":
        return ConvNorm(conv, nn.BatchNorm2d(out_channels), act)
    return ConvGroupNorm(conv, nn.GroupNorm(_GROUPS, out_channels), act) if norm == "group" else ConvActivation(conv, act)
