"""The head that draws a mask for each class in a RoI."""

from __future__ import annotations

from torch import Tensor, nn

from widekernel.dense.conv_norm import conv_norm
from widekernel.errors import ArgumentError


class MaskHead(nn.Module):
    """Convolutions (3x3, bias, ReLU), an upsampling by two (transposed convolution, ReLU), and a map for each class.

    Args:
        classes: number of classes.
        channels: channels of the features and of all layers.
        convs: number of convolutions before the upsampling.
    """

    def __init__(self, classes: int, channels: int = 256, convs: int = 4) -> None:
        super().__init__()
        if classes < 1:
            raise ArgumentError(f"A mask head has at least one class, not {classes}.")
        self.convs = nn.ModuleList(conv_norm(channels, channels, 3, norm="none") for _ in range(convs))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.conv_logits = nn.Conv2d(channels, classes, 1)
        for layer in (self.upsample, self.conv_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features (k, channels, m, m) -> logits (k, classes, 2 * m, 2 * m)."""
        for conv in self.convs:
            x = conv(x)
        return self.conv_logits(self.upsample(x).relu())
