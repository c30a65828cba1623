"""The head that classifies RoIs and corrects their boxes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from widekernel.dense.conv_norm import conv_norm
from widekernel.errors import ArgumentError


class BoxOutputs(NamedTuple):
    """What a box head says of RoIs.

    Attributes:
        logits: (k, classes + 1), the background last
        deltas: (k, classes * 4), class by class: corrections of the box for each class, in units of the stage's deviations
    """

    logits: Tensor
    deltas: Tensor


class BoxHead(nn.Module):
    """Shared convolutions (3x3, batch norm, ReLU) and fully connected layers, then scores and boxes for each class.

    Four convolutions and one layer are the head of the cascade, two layers without convolutions that of Mask R-CNN. The
    batch norms see the RoIs of few images, so they should be synchronized over processes.

    Args:
        classes: number of classes, without the background.
        channels: channels of the features and of the convolutions.
        size: rows and columns of the features.
        convs: number of convolutions.
        fcs: number of fully connected layers, at least one.
        fc_channels: outputs of each of them.
    """

    def __init__(
        self, classes: int, channels: int = 256, size: int = 7, convs: int = 4, fcs: int = 1, fc_channels: int = 1024
    ) -> None:
        super().__init__()
        if classes < 1 or fcs < 1:
            raise ArgumentError(f"A box head has at least one class and one fully connected layer, not {classes} and {fcs}.")
        self.fc_cls = nn.Linear(fc_channels, classes + 1)
        self.fc_reg = nn.Linear(fc_channels, classes * 4)
        self.shared_convs = nn.ModuleList(conv_norm(channels, channels, 3) for _ in range(convs))
        inputs = [channels * size * size] + [fc_channels] * (fcs - 1)
        layers = [nn.Linear(number, fc_channels) for number in inputs]
        self.shared_fcs = nn.ModuleList(layers)
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.normal_(self.fc_reg.weight, std=0.001)
        for layer in (*layers, self.fc_cls, self.fc_reg):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> BoxOutputs:
        """Features (k, channels, size, size) -> scores and corrections."""
        for conv in self.shared_convs:
            x = conv(x)
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = layer(x).relu()
        return BoxOutputs(self.fc_cls(x), self.fc_reg(x))
