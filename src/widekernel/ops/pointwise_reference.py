"""The definition of blocks of products over channels or patches, in plain PyTorch: slow, readable, the oracle of tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from widekernel.ops.patch import NormAfter, Patch

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class ReferenceBlock:
    """y = residual + second · act(after(first · norm(x) + first_bias)) + second_bias, for every pixel.

    With a patch, `first` acts on the patches of norm(x): it is a convolution.

    Args:
        first: (H, C); with a patch, (H, C, rows, columns).
        first_bias: (H,), or None for none.
        activation: a key of `ACTIVATIONS`.
        second: (O, H), or None for none; then y = residual + act(first · norm(x) + first_bias).
        second_bias: (O,), or None for none.
        norm_eps: epsilon of a layer norm over the channels of x, without affine parameters; None for no norm.
        patch: the patches of images; None if every pixel is computed alone.
        after: a layer norm over the results of the first product; None for none.
    """

    def __init__(
        self,
        first: Tensor,
        first_bias: Tensor | None,
        activation: str,
        second: Tensor | None,
        second_bias: Tensor | None,
        norm_eps: float | None,
        patch: Patch | None = None,
        after: NormAfter | None = None,
    ) -> None:
        self.first, self.first_bias = first, first_bias
        self.activation = activation
        self.second, self.second_bias = second, second_bias
        self.norm_eps = norm_eps
        self.patch, self.after = patch, after

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) -> (N, O, H', W'), or rows (R, C) -> (R, O); `residual` has the shape of the result."""
        y = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
        if self.norm_eps is not None:
            y = F.layer_norm(y, y.shape[-1:], eps=self.norm_eps)
        if self.patch is not None:
            images, (_, stride, padding) = y.permute(0, 3, 1, 2), self.patch
            y = F.conv2d(images, self.first, self.first_bias, stride, padding).permute(0, 2, 3, 1)
        else:
            y = F.linear(y, self.first, self.first_bias)
        if self.after is not None:
            y = F.layer_norm(y, y.shape[-1:], self.after.scale, self.after.shift, self.after.eps)
        y = ACTIVATIONS[self.activation](y)
        if self.second is not None:
            y = F.linear(y, self.second, self.second_bias)
        y = y.permute(0, 3, 1, 2) if x.dim() == 4 else y
        return y if residual is None else residual + y
